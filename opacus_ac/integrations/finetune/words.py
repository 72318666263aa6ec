"""Reads the words of a command line of ``opacus-ac finetune``, and a file of options, without torch or transformers."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml

from opacus_ac.integrations.finetune.arguments import AUTO
from opacus_ac.integrations.finetune.errors import BAD_OPTION, FinetuneError
from opacus_ac.integrations.finetune.spelling import OWN_TYPES, nearest, option_names, training_fields

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
_SIMPLE = re.compile(r"(int|float|bool)( \| None)?")
_TYPES: dict[str, Callable[[str], Any]] = {"int": int, "float": float}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the process."""
        raise FinetuneError(message, BAD_OPTION)


def given_values(words: Sequence[str]) -> dict[str, Any]:
    """Return the values that words of a command line give to options, by name; options that are not given are left out.

    Raises:
        FinetuneError: If there is no such option, or a value is of the wrong type.
    """
    values, rest = _parser().parse_known_args(list(words))
    if rest:
        _refuse_words(rest)
    return {name: value for name, value in vars(values).items() if value is not None}


def learning_rate(text: str) -> float | str:
    """Return the learning rate that a word of the command line stands for.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    if text == AUTO:
        return AUTO
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or {AUTO!r}, got {text!r}") from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=None)
    for kind in OWN_TYPES:
        hints = get_type_hints(kind)
        for field in fields(kind):
            types = [t for t in getattr(hints[field.name], "__args__", (hints[field.name],)) if t is not type(None)]
            _add(parser, field.name, types[0].__name__)
    for name, annotation in training_fields().items():
        match = _SIMPLE.fullmatch(annotation)
        _add(parser, name, match[1] if match else "list" if "list" in annotation else "str")
    return parser


def _add(parser: argparse.ArgumentParser, name: str, kind: str) -> None:
    """Add an option with both of its spellings."""
    spellings = list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))
    if name == "learning_rate":
        parser.add_argument(*spellings, dest=name, type=learning_rate)
    elif kind == "bool":
        parser.add_argument(*spellings, dest=name, type=_truth, nargs="?", const=True)
        negated = [word.replace("--", "--no_" if "_" in word else "--no-") for word in spellings]
        negated += [f"--no_{name}"] if "_" not in name else []
        parser.add_argument(*dict.fromkeys(negated), dest=name, action="store_false", default=None)
    elif kind in ("int", "float"):
        parser.add_argument(*spellings, dest=name, type=_TYPES[kind])
    elif kind == "str":
        parser.add_argument(*spellings, dest=name)
    else:
        parser.add_argument(*spellings, dest=name, nargs="*")


def _truth(text: str) -> bool:
    if text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")


def _refuse_words(rest: Sequence[str]) -> NoReturn:
    """Refuse words that are no options.

    Raises:
        FinetuneError: Always.
    """
    word = next((word for word in rest if word.startswith("--") and len(word) > 2), rest[0])
    if not word.startswith("-"):
        raise FinetuneError(
            f"{word!r} belongs to no option: the private file is given as --train_file FILE", BAD_OPTION
        )
    name = word.lstrip("-").partition("=")[0]
    known = option_names()
    if name.replace("-", "_") in known:
        raise FinetuneError(f"--{name} takes a value, or none, in another form: see --help-all", BAD_OPTION)
    hint = nearest(name, known, "--{}") or ". --help-all lists all options"
    raise FinetuneError(f"there is no option {word.partition('=')[0]}{hint}", BAD_OPTION)


# ---------------------------------------------------------------- a file of options


def words_of_config(path: str | None) -> list[str]:
    """Return the options in a YAML file as words of a command line.

    Raises:
        FinetuneError: If the file cannot be read, or has an option that there is not.
    """
    if path is None:
        return []
    found = _mapping(path)
    words = []
    for name, value in found.items():
        if training_fields() and str(name).replace("-", "_") not in option_names():
            hint = nearest(str(name), option_names())
            raise FinetuneError(f"{path}: there is no option {name!r}{hint}", BAD_OPTION)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            shown = [json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values]
            for text in shown:
                _refuse_option(path, str(name), text)
            words += [f"--{name}", *shown]
    return words


def _mapping(path: str) -> dict[Any, Any]:
    try:
        found = yaml.safe_load(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise FinetuneError(f"--config {path}: there is no such file", BAD_OPTION) from error
    except OSError as error:
        raise FinetuneError(f"--config {path} cannot be read: {error.strerror}", BAD_OPTION) from error
    except yaml.YAMLError as error:
        raise FinetuneError(f"{path} is not valid YAML: {' '.join(str(error).split())}", BAD_OPTION) from error
    if not isinstance(found, dict):
        raise FinetuneError(f"{path} is not a mapping of options, such as: target_epsilon: 8", BAD_OPTION)
    return found


def _refuse_option(path: str, name: str, text: str) -> None:
    """Refuse a value that the parser would read as an option: a value must not change another setting."""
    try:
        float(text)  # a negative number
    except ValueError:
        if text.startswith("-"):
            raise FinetuneError(
                f"{path}: the value {text!r} of {name} starts with '-' and would be read as an option: write options "
                "as names of their own, such as: target_epsilon: 8",
                BAD_OPTION,
            ) from None
