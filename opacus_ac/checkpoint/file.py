"""Files that hold a run: written atomically, read without running code, checked as a whole before anything is loaded."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer

DIGEST = "digest"
SETTINGS = "privacy_settings"
ACCOUNT = "account"
"""What holds for the charges (:class:`opacus_ac.budget.charges.Terms`); not in checkpoints of older versions."""
LEDGER = "ledger"
NAME = "checkpoint_name"
_ACCOUNTANT = "privacy_accountant_state_dict"


def write(state: dict[str, Any], path: Any, **save_options: Any) -> None:
    """Save ``state`` to a binary file object, or to a path, where the file is replaced as a whole or not at all."""
    if not isinstance(path, str | os.PathLike):
        torch.save(state, path, **save_options)
        return
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file, **save_options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def digest(state: Mapping[str, Any]) -> str:
    """Return a hash over names, types and values of all entries but the digest itself.

    It finds damage and edits made without it in mind; it is no signature.
    """
    total = hashlib.sha256()
    _update(total, {key: value for key, value in state.items() if key != DIGEST})
    return total.hexdigest()


def _update(total: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        total.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        total.update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=repr):
            total.update(f"{key!r}:".encode())
            _update(total, value[key])
    elif isinstance(value, list | tuple):
        total.update(f"sequence {len(value)};".encode())
        for item in value:
            _update(total, item)
    else:
        total.update(f"{type(value).__name__} {value!r};".encode())


def check(
    state: Any,
    module: nn.Module,
    optimizer: DPOptimizer | None,
    mechanism: str,
    settings: Mapping[str, Any] | None,
    extra: tuple[str, ...] = (),
) -> None:
    """Raise ``ValueError`` when a checkpoint is damaged, or does not fit; nothing has been loaded then.

    Args:
        state: what was read.
        module: model to load into.
        optimizer: optimizer to load into, or None.
        mechanism: name of the engine's accountant.
        settings: the engine's public settings; None before ``make_private``.
        extra: further entries that must be there.
    """
    needed = ["module_state_dict", _ACCOUNTANT, SETTINGS, LEDGER, NAME, DIGEST, *extra]
    if optimizer is not None:
        needed.append("optimizer_state_dict")
    missing = [key for key in needed if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"the checkpoint has no {', '.join(missing)}: it was not written by save_checkpoint")
    if state[DIGEST] != digest(state):
        raise ValueError("the checkpoint was changed after it was written, or is damaged: its digest differs")
    written = state[_ACCOUNTANT]["mechanism"]
    if written != mechanism:
        raise ValueError(f"the checkpoint was accounted by {written!r}, this engine uses {mechanism!r}")
    _check_model(state["module_state_dict"], module)
    if optimizer is not None:
        check_settings(state[SETTINGS], settings)
    if isinstance(optimizer, AdaptiveClipDPOptimizer):
        optimizer.check_state_dict(state["optimizer_state_dict"])


def _check_model(saved: Mapping[str, Tensor], module: nn.Module) -> None:
    mine = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in saved.items()}
    wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if wrong:
        raise ValueError(f"the checkpoint is of another model: {wrong[0]} differs ({len(wrong)} entries in all)")


def check_settings(saved: Mapping[str, Any] | None, mine: Mapping[str, Any] | None) -> None:
    """Refuse to continue a run under other privacy settings than it began with."""
    if saved is None or mine is None:
        return  # an optimizer that this engine did not make: its own state is checked
    for name in sorted(saved.keys() | mine.keys()):
        if saved.get(name) != mine.get(name):
            raise ValueError(
                f"the checkpoint was written with {name} = {saved.get(name)!r}, this run has {mine.get(name)!r}: call "
                "make_private with the same settings"
            )
