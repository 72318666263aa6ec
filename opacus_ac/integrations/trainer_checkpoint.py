"""The privacy state in a checkpoint folder of the Trainer: what was spent, and that all files belong together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opacus_ac import checkpoint
from opacus_ac.engine import PrivacyEngine

PRIVACY_STATE = "privacy_state.pt"
"""File beside ``optimizer.pt``: accountant, settings, head of the ledger, step, and the hashes of the other files."""

_SUFFIXES = (".safetensors", ".bin", ".pt")


def save(engine: PrivacyEngine, folder: Path, step: int) -> None:
    """Write, on rank 0, the privacy state of a folder that has weights and optimizer already; every rank calls it."""
    state = {"step": step, "files": _digests(folder), "module_state_dict": {}}
    engine._ranks.on_first(lambda: engine._write(state, folder / PRIVACY_STATE))


def verify(engine: PrivacyEngine, folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ``ValueError``, on every rank, unless the folder is one whole checkpoint of a run with these public settings.

    Raises:
        LedgerError: the ledger does not contain what the checkpoint says it does.
    """
    ranks = engine._ranks
    state: dict[str, Any] = {}
    error: Exception | None = None
    try:
        state = _verified(engine, folder, settings)
    except Exception as reason:  # raised again below, once the other ranks know of it
        error = reason
    found = ranks.gather_objects((state.get(checkpoint.DIGEST), None if error is None else str(error)))
    if error is not None:
        raise error
    for rank, (digest, failure) in enumerate(found):
        if failure is not None:
            raise ValueError(f"rank {rank} cannot resume: {failure}")
        if digest != found[0][0]:
            raise ValueError(
                f"ranks 0 and {rank} read different checkpoints at {folder}: use a folder that all of them see"
            )
    ranks.on_first(lambda: engine._account.check_checkpoint(state[checkpoint.LEDGER]))


def _verified(engine: PrivacyEngine, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the privacy state of the folder, as this rank reads it, once all of it was found to be whole."""
    state = _read(folder)
    checkpoint.check(state, nn.Identity(), None, engine.accountant.mechanism(), None, ("step", "files"))
    _check_settings(state[checkpoint.SETTINGS] or {}, settings)
    found, written = _digests(folder), state["files"]
    wrong = sorted(name for name in found.keys() | written.keys() if found.get(name) != written.get(name))
    if wrong:
        raise ValueError(f"{folder / wrong[0]} is missing, new or changed since the checkpoint was written")
    progress = folder / "trainer_state.json"
    step = json.loads(progress.read_text(encoding="utf-8"))["global_step"] if progress.is_file() else None
    if step != state["step"]:
        raise ValueError(
            f"{progress} is of step {step}, {PRIVACY_STATE} of step {state['step']}: one of them was replaced"
        )
    return state


def load(engine: PrivacyEngine, folder: Path) -> None:
    """Take over what the checkpoint has spent; every rank calls it, after :func:`verify`."""
    state = _read(folder)
    checkpoint.check(state, nn.Identity(), None, engine.accountant.mechanism(), None, ("step", "files"))
    engine._take_over(state)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / PRIVACY_STATE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: what the run has spent is not known, so it cannot be resumed. Resume from a checkpoint of "
            "PrivateTrainer that was saved without save_only_model"
        )
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of weights and states."""
    return {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in _SUFFIXES and path.name not in (PRIVACY_STATE, "training_args.bin")
    }


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _check_settings(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for name in sorted(theirs.keys() | mine.keys()):
        if theirs.get(name) != mine.get(name):
            raise ValueError(
                f"the checkpoint was written with {name} = {theirs.get(name)!r}, this run has {mine.get(name)!r}: resume "
                "with the same PrivacyArguments, batch size, dataset and number of steps"
            )
