"""Which options of a resumed run are others than those that it began with, as the user wrote them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from opacus_ac.integrations.finetune.arguments import TRAINING_DEFAULTS
from opacus_ac.integrations.finetune.errors import FinetuneError
from opacus_ac.integrations.finetune.output import SETTINGS
from opacus_ac.integrations.finetune.spelling import OWN_TYPES
from opacus_ac.integrations.finetune.words import given_values

_FREE = ("resume_from_checkpoint", "output_dir", "ledger", "report_to", "logging_steps", "save_steps", "run_name")
"""Options that a resumed run may change: they are not told."""

_BUDGET = ("target_epsilon", "noise_multiplier")
_DEFAULTS = {field.name: field.default for kind in OWN_TYPES for field in fields(kind)} | TRAINING_DEFAULTS


def noted_words(folder: Path) -> list[str] | None:
    """Return the options that the run in a folder was started with; None where they were not noted."""
    try:
        words = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["arguments"]
        return [str(word) for word in words]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def changed_options(before: Sequence[str] | None, now: Sequence[str]) -> str:
    """Return a sentence that names every changed option; empty where none is known to have changed.

    >>> changed_options(["--target_epsilon", "8"], ["--target_epsilon", "4"])
    'the run was started with --target_epsilon 8, and not 4: resume with the same options, or begin a run of its own'
    """
    if before is None:
        return ""
    try:
        old, new = (_DEFAULTS | given_values(words) for words in (before, now))
    except FinetuneError:
        return ""
    names = [name for name in dict.fromkeys([*old, *new]) if name not in _FREE and old.get(name) != new.get(name)]
    if not names:
        return ""
    changes = " and ".join(_change(name, old.get(name), new.get(name)) for name in names)
    return f"the run was started with {changes}: resume with the same options, or begin a run of its own"


def changed_budget(before: Sequence[str] | None, now: Sequence[str]) -> str:
    """Return a sentence that names changed options where the budget is among them, which no run can resume with."""
    if before is None:
        return ""
    try:
        old, new = given_values(before), given_values(now)
    except FinetuneError:
        return ""
    return changed_options(before, now) if any(old.get(name) != new.get(name) for name in _BUDGET) else ""


def _change(name: str, old: Any, new: Any) -> str:
    if old is None:
        return f"--{name} left out, and not {_shown(new)}"
    return f"--{name} {_shown(old)}, and not {'left out' if new is None else _shown(new)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
