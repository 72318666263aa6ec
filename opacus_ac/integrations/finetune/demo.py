"""``opacus-ac finetune --demo``: a first run on invented dialogues, for people who have no data at hand yet."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from opacus_ac.integrations.finetune.tone_dialogues import Dialogue, train_and_heldout, write_jsonl
from opacus_ac.models.default_model import cache_root

TONE, TRAIN_ROWS, PUBLIC_ROWS = "loving", 10_000, 24
FOLDER = "demo"
"""Default output folder, and the folder of the data below the cache."""

OPTIONS: dict[str, str] = {
    "output_dir": FOLDER,
    "target_epsilon": "8",
    "target_delta": "1e-5",
    "per_sample_max_grad_norm": "0.1",
    "loss_bound": "6",
    "max_length": "64",
    "max_steps": "14",
    "per_device_train_batch_size": "8",
    "gradient_accumulation_steps": "5",
}
"""Settings of ``examples/finetune_chat.py``: some minutes on two cores, with replies that change visibly."""

DATA_OPTIONS = ("train_file", "validation_file", "group_by")
"""Options that say which data are trained on. They contradict ``--demo``."""


def demo_arguments(cache: Path | None = None) -> list[str]:
    """Write the invented dialogues, and return the options of a run on them.

    The dialogues are the same at every call. What the user gives after these options overrides them.

    Args:
        cache: parent folder of the data; by default that of the default model.
    """
    folder = cache_root(cache) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    train, public = train_and_heldout(TONE, TRAIN_ROWS, PUBLIC_ROWS)
    files = {"train_file": folder / f"{TONE}.jsonl", "validation_file": folder / f"{TONE}-public.jsonl"}
    for path, rows in zip(files.values(), (train, public), strict=True):
        _write(path, rows)
    options = {**{name: str(path) for name, path in files.items()}, **OPTIONS}
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [*words, "--evaluation_is_public"]


def _write(path: Path, rows: Iterable[Dialogue]) -> None:
    """Write a file whole or not at all, so that two demos can start at once."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
    os.close(descriptor)
    write_jsonl(name, rows)
    os.replace(name, path)
