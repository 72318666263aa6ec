"""Files that hold a run: written atomically, read without running code, checked before anything is loaded."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from opacus_ac.optimizer import AdaptiveClipDPOptimizer


def write(state: dict[str, Any], path: Any, **save_options: Any) -> None:
    """Save ``state`` to a binary file object, or to a path, where the file is replaced as a whole or not at all."""
    if not isinstance(path, str | os.PathLike):
        torch.save(state, path, **save_options)
        return
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        torch.save(state, temporary, **save_options)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def check(state: Any, module: nn.Module, optimizer: DPOptimizer | None, mechanism: str) -> None:
    """Raise ``ValueError`` when a checkpoint does not fit model, optimizer or accountant."""
    needed = ["module_state_dict", "privacy_accountant_state_dict"]
    if optimizer is not None:
        needed.append("optimizer_state_dict")
    missing = [key for key in needed if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"the checkpoint has no {', '.join(missing)}: it was not written by save_checkpoint")
    written = state["privacy_accountant_state_dict"]["mechanism"]
    if written != mechanism:
        raise ValueError(f"the checkpoint was accounted by {written!r}, this engine uses {mechanism!r}")
    mine = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in state["module_state_dict"].items()}
    wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if wrong:
        raise ValueError(f"the checkpoint is of another model: {wrong[0]} differs ({len(wrong)} entries in all)")
    if isinstance(optimizer, AdaptiveClipDPOptimizer):
        optimizer.check_state_dict(state["optimizer_state_dict"])
