"""Names of options as the command line spells them. Needs neither torch nor transformers."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from opacus_ac.integrations.finetune.arguments import DataArguments, ModelArguments
from opacus_ac.integrations.trainer.arguments import PrivacyArguments

OWN_TYPES: tuple[Any, ...] = (DataArguments, ModelArguments, PrivacyArguments)
OWN_OPTIONS = ("demo", "config", "dry_run", "help_all", "debug")
"""Options of the command itself."""

_NO_VALUE = {"None": "0"}  # loss_bound and ema_decay, the only ones whose messages name None, take 0 for it
_WORDS = {
    "PrivacyArguments": "privacy options",
    "TrainingArguments": "training options",
    "eval_dataset": "--validation_file",
    "train_dataset": "--train_file",
    " (0 on a command line)": "",
}
"""Other words of Python, and what they are on the command line."""


@lru_cache(maxsize=1)
def training_fields() -> Mapping[str, str]:
    """Return the annotation of every field of ``TrainingArguments``, read from its source, which is not imported.

    Empty where the source cannot be read. The parser that imports it then checks the names.
    """
    try:
        found = importlib.util.find_spec("transformers")
        folder = (found.submodule_search_locations or [""])[0] if found is not None else ""
        tree = ast.parse((Path(folder) / "training_args.py").read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError, ImportError):
        return {}
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return {
        node.target.id: ast.unparse(node.annotation)
        for one in classes
        for node in one.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@lru_cache(maxsize=1)
def option_names() -> tuple[str, ...]:
    """Return the names of all options, with underscores."""
    own = [field.name for kind in OWN_TYPES for field in fields(kind)]
    return tuple(dict.fromkeys([*own, *OWN_OPTIONS, *training_fields()]))


def nearest(name: str, known: Iterable[str], form: str = "{}") -> str:
    """Return a question for the end of a message: the known name that a misspelt one may have meant.

    >>> nearest("target_eps", ["target_epsilon", "target_delta"], "--{}")
    ': did you mean --target_epsilon?'
    """
    wanted, names = name.replace("-", "_"), list(known)
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)
    near = near or [known for known in names if len(wanted) > 2 and known.startswith(wanted)][:1]
    return f": did you mean {form.format(near[0])}?" if near else ""


def on_the_command_line(text: str) -> str:
    """Return a message that names arguments of Python with options of the command line instead.

    >>> on_the_command_line("say evaluation_is_public=True, or lower lora_layers (now lora_layers=3)")
    'say --evaluation_is_public, or lower --lora_layers (now --lora_layers 3)'
    """
    return _python_words().sub(lambda match: _WORDS[match[0]], _python_names().sub(_option, text))


def _option(match: re.Match[str]) -> str:
    name, value, closing = match["name"], match["value"], match["closing"] or ""
    if value is None and "_" not in name and not match["owner"]:
        return match[0]  # a word of English, such as "sampling"
    owner = match["owner"] or ""
    if owner.endswith("("):
        closing = closing[1:]
    text = "" if value in (None, "True") else " " + _NO_VALUE.get(value, value.strip("'\""))
    return f"--{name}{text}{closing}"


@lru_cache(maxsize=1)
def _python_names() -> re.Pattern[str]:
    names = "|".join(sorted(map(re.escape, option_names()), key=len, reverse=True))
    return re.compile(
        r"(?<![\w/.\-\"'\\:])(?P<owner>(?:PrivacyArguments|TrainingArguments)[.(])?"
        rf"(?P<name>{names})(?![\w/\-\"'])(?!\.\w)"
        r"(?:\s?=\s?(?P<value>'[^']*'|\"[^\"]*\"|[^\s,;:)]+))?(?P<closing>\))?"
    )


@lru_cache(maxsize=1)
def _python_words() -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, _WORDS)))
