"""Checkpoints that several processes write together, and that any other number of them can continue from.

A folder of ``torch.distributed.checkpoint`` holds, by the names of the parameters, the model, the inner optimizer, and
what parts of the private step have for each parameter, such as their average. All else of the private step is one JSON
text. ``torch`` reads such folders with ``pickle``: load only what you trust.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from opacus_ac.budget.account import Account
from opacus_ac.budget.charges import Terms
from opacus_ac.budget.spending import kept_terms
from opacus_ac.checkpoint.file import check_settings
from opacus_ac.checkpoint.part_tensors import Entries, PartTensors, upgraded
from opacus_ac.distributed.reducers import Reducer
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.state import check_private_state, load_private_state

VERSION = 2
_TEXT = "privacy"


def save(
    folder: str | os.PathLike[str], account: Account, model: nn.Module, optimizer: AdaptiveClipDPOptimizer
) -> None:
    """Save a run. Every rank has to call it, between two steps.

    Args:
        folder: a new folder, on a file system that all ranks see; it gets its name when everything is written.
        account: the account of the run.
        model: its model.
        optimizer: its private optimizer, whose reducer knows the ranks.

    Guarantees:
        The state of noise and sampling streams is never saved, also not of seeded ones.

    Raises:
        ValueError: If the folder exists; on every rank.
    """
    ranks, target = optimizer.reducer, Path(folder)
    parts = PartTensors.of(model, optimizer)
    temporary = Path(ranks.on_first(lambda: _new_folder(target)))
    text = ranks.on_first(lambda: _text(account, parts))
    state = {**_tensors(model, optimizer), **parts.tensors(), _TEXT: text}
    _run(lambda: dcp.save(state, checkpoint_id=temporary))
    ranks.on_first(lambda: os.replace(temporary, target))


def load(
    folder: str | os.PathLike[str], account: Account, model: nn.Module, optimizer: AdaptiveClipDPOptimizer
) -> None:
    """Continue from :func:`save`, with any number of processes, sharded or not. Every rank has to call it.

    Args:
        folder: what was saved. It must come from a trusted place: reading it can run code.
        account: the account of a run with the settings of the run that was saved; what it has spent stays spent.
        model: its model.
        optimizer: its private optimizer.

    Raises:
        ValueError: If it is no checkpoint of this version, or of other parameters, settings or another ledger; nothing
            is loaded then.
        LedgerError: If the ledger does not contain what the checkpoint says it does.
    """
    ranks, parts = optimizer.reducer, PartTensors.of(model, optimizer)
    saved = _read_text(folder)
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    if saved["version"] == 1:
        saved = upgraded(saved, entries, parts.names)
    ranks.on_first(lambda: account.check_checkpoint(saved["ledger"]))
    ranks.on_first(lambda: account.check_terms(_terms(saved)))
    tensors = _tensors(model, optimizer)
    _check_run(account, saved, parts)
    _check_model(entries, tensors["model"])
    state = parts.whole(
        saved["step"], entries, saved["version"], lambda wanted: _run(lambda: dcp.load(wanted, checkpoint_id=folder))
    )
    check_private_state(optimizer, state)
    _run(lambda: dcp.load(tensors, checkpoint_id=folder))
    set_model_state_dict(model, tensors["model"])
    ranks.refresh()
    set_optimizer_state_dict(model, optimizer.original_optimizer, tensors["optimizer"])
    load_private_state(optimizer, state)
    _resume(account, ranks, saved)


def _new_folder(target: Path) -> str:
    if target.exists():
        raise ValueError(f"{target} exists: give each checkpoint a folder of its own")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(8)}"
    shutil.rmtree(temporary, ignore_errors=True)
    return str(temporary)


def _run(work: Callable[[], Any]) -> None:
    """Read or write, with a ``ValueError`` for torch's own error, which is no ``Exception``."""
    try:
        work()
    except CheckpointException as error:
        raise ValueError(f"the checkpoint could not be written or read: {error}") from error


def _text(account: Account, parts: PartTensors) -> str:
    """Return the state of the private step and of the account as JSON; floats come back to the last bit."""
    return json.dumps(
        {
            "version": VERSION,
            "world": parts.optimizer.reducer.world,
            "trained": parts.names,
            "step": parts.plain(),
            "accountant": account.accountant.state_dict(),
            "account": account.state_dict(),
            "settings": account.settings,
            "ledger": account.ledger_head,
            "name": account.mark(),
        }
    )


def _read_text(folder: str | os.PathLike[str]) -> dict[str, Any]:
    state = {_TEXT: ""}
    try:
        _run(lambda: dcp.load(state, checkpoint_id=folder))
        saved: dict[str, Any] = json.loads(state[_TEXT])
        version = saved["version"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder} is no folder that save_checkpoint wrote: {error}") from error
    if version not in (1, 2):
        raise ValueError(f"{folder} has version {version!r} of the checkpoint, this package reads 1 and 2")
    saved["accountant"]["history"] = [tuple(run) for run in saved["accountant"]["history"]]
    return saved


def _check_run(account: Account, saved: Mapping[str, Any], parts: PartTensors) -> None:
    """Raise ``ValueError`` when the run that was saved had another accountant, other settings or trained parameters."""
    written, mine = saved["accountant"]["mechanism"], account.accountant.name
    if written != mine:
        raise ValueError(f"the checkpoint was accounted by {written!r}, this engine uses {mine!r}")
    check_settings(saved["settings"], account.settings)
    if saved["trained"] != list(parts.names):
        raise ValueError(
            f"the checkpoint is of a run that trained other parameters ({len(saved['trained'])}, this one "
            f"{len(parts.names)}): build the model and its optimizer as they were then"
        )


def _tensors(model: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> dict[str, dict[str, Any]]:
    """Return model and inner optimizer as they are saved, by name; sharded where the parameters are."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer.original_optimizer),
    }


def _check_model(entries: Entries, model: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` when the checkpoint is of another model, before a tensor of it is loaded."""
    theirs = {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}
    theirs = {name: size for name, size in theirs.items() if name.startswith("model.")}
    mine = {f"model.{name}": tuple(t.shape) for name, t in model.items()}
    wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if wrong:
        raise ValueError(f"the checkpoint is of another model: {wrong[0]} differs ({len(wrong)} entries in all)")


def _resume(account: Account, ranks: Reducer, saved: Mapping[str, Any]) -> None:
    """Take over the charges of the checkpoint on rank 0; the other ranks follow it."""
    ranks.on_first(lambda: account.resume(saved["accountant"], saved["name"], _terms(saved)))
    account.join(ranks)


def _terms(saved: Mapping[str, Any]) -> Terms:
    """Return what holds for the charges that were saved."""
    return kept_terms(saved["accountant"], saved.get("account"), saved["settings"])
