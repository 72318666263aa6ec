"""Checkpoints that several processes write together, and that any other number of them can continue from.

A folder of ``torch.distributed.checkpoint`` holds model, inner optimizer, weight average, and what parts of the method have for each
parameter, all by the names of the parameters. The state of the private step is in it as one JSON text. ``torch`` reads such folders
with ``pickle``: load only what you trust.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from opacus_ac.budget.account import Account
from opacus_ac.budget.charges import Terms
from opacus_ac.budget.spending import kept_terms
from opacus_ac.checkpoint.file import check_settings
from opacus_ac.distributed.reducers import Reducer
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.parameters import named_parameters
from opacus_ac.optimizer.state import check_private_state, load_private_state, private_state

VERSION = 1
_TEXT = "privacy"


def save(
    folder: str | os.PathLike[str], account: Account, model: nn.Module, optimizer: AdaptiveClipDPOptimizer
) -> None:
    """Save a run; every rank has to call it, between two steps.

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
    temporary = Path(ranks.on_first(lambda: _new_folder(target)))
    text = ranks.on_first(lambda: _text(account, model, optimizer))
    state = {**_tensors(model, optimizer), **_further_tensors(model, optimizer), _TEXT: text}
    _run(lambda: dcp.save(state, checkpoint_id=temporary))
    ranks.on_first(lambda: os.replace(temporary, target))


def load(
    folder: str | os.PathLike[str], account: Account, model: nn.Module, optimizer: AdaptiveClipDPOptimizer
) -> None:
    """Continue from :func:`save`, with any number of processes, sharded or not; every rank has to call it.

    Args:
        folder: what was saved. It must come from a trusted place: reading it can run code.
        account: the account of a run with the settings of the run that was saved; what it has spent stays spent.
        model: its model.
        optimizer: its private optimizer.

    Raises:
        ValueError: If it is no checkpoint of this version, or of other parameters, settings or another ledger; nothing was
            loaded then.
        LedgerError: If the ledger does not contain what the checkpoint says it does.
    """
    ranks = optimizer.reducer
    saved = _read_text(folder)
    ranks.on_first(lambda: account.check_checkpoint(saved["ledger"]))
    ranks.on_first(lambda: account.check_terms(_terms(saved)))
    for part in optimizer.further:
        saved["step"][part] = _further_state(model, optimizer, part, saved["step"].get(part), folder)
    _check_fits(account, optimizer, saved)
    tensors = _tensors(model, optimizer)
    _check_shapes(folder, tensors)
    _run(lambda: dcp.load(tensors, checkpoint_id=folder))
    set_model_state_dict(model, tensors["model"])
    ranks.refresh()
    set_optimizer_state_dict(model, optimizer.original_optimizer, tensors["optimizer"])
    state = saved["step"]
    if optimizer.ema is not None:
        averages = [_local(t) for t in tensors["ema"].values()]
        state = {**state, "ema": {"updates": state["ema"], "average": averages}}
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
    """Read or write; torch's own error is no ``Exception``, and would go past every handler."""
    try:
        work()
    except CheckpointException as error:
        raise ValueError(f"the checkpoint could not be written or read: {error}") from error


def _text(account: Account, model: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> str:
    """Return the state of the private step and of the account as JSON; floats come back to the last bit."""
    state = private_state(optimizer)
    state["mechanism"] = {**state["mechanism"], "stream": {}, "statistics_stream": {}}
    state["ema"] = None if optimizer.ema is None else optimizer.ema.updates
    for name, part in optimizer.further.items():
        trained = named_parameters(model, optimizer.original_optimizer)[1]
        state[name] = {**state[name], **dict.fromkeys(part.by_parameter), "trained": trained}
    return json.dumps(
        {
            "version": VERSION,
            "world": optimizer.reducer.world,
            "step": state,
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
    if version != VERSION:
        raise ValueError(f"{folder} has version {version!r} of the checkpoint, this package reads {VERSION}")
    saved["accountant"]["history"] = [tuple(run) for run in saved["accountant"]["history"]]
    return saved


def _check_fits(account: Account, optimizer: AdaptiveClipDPOptimizer, saved: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` when the run that was saved had other settings."""
    written, mine = saved["accountant"]["mechanism"], account.accountant.name
    if written != mine:
        raise ValueError(f"the checkpoint was accounted by {written!r}, this engine uses {mine!r}")
    check_settings(saved["settings"], account.settings)
    state = dict(saved["step"])
    if state["ema"] is not None:
        state["ema"] = {"average": [] if optimizer.ema is None else optimizer.ema.average}
    check_private_state(optimizer, state)


def _tensors(model: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> dict[str, dict[str, Any]]:
    """Return what is saved as tensors, by name; sharded where the parameters are."""
    inner = optimizer.original_optimizer
    state: dict[str, dict[str, Any]] = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, inner),
    }
    if optimizer.ema is not None:
        parameters, names = named_parameters(model, inner)
        averages = zip(names, parameters, optimizer.ema.average, strict=True)
        state["ema"] = {name: _like(average, parameter) for name, parameter, average in averages}
    return state


def _further_tensors(model: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> dict[str, dict[str, Tensor]]:
    """Return what parts of the method hold for single parameters, by part and name; the same on all ranks."""
    names = named_parameters(model, optimizer.original_optimizer)[1]
    found: dict[str, dict[str, Tensor]] = {}
    for key, part in optimizer.further.items():
        state = part.state_dict()
        held = {
            f"{kind}.{name}": tensor
            for kind in part.by_parameter
            for name, tensor in zip(names, state[kind] or [], strict=False)
            if tensor is not None
        }
        if held:
            found[key] = held
    return found


def _further_state(
    model: nn.Module,
    optimizer: AdaptiveClipDPOptimizer,
    part: str,
    plain: dict[str, Any] | None,
    folder: str | os.PathLike[str],
) -> dict[str, Any] | None:
    """Return the state of a part of the method, its tensors read into new memory; None where there is none.

    Raises:
        ValueError: If it is of a run that trained other parameters, whose tensors are not those of these.
    """
    if plain is None:
        return None
    names = named_parameters(model, optimizer.original_optimizer)[1]
    if plain["trained"] != names:
        raise ValueError(
            f"the checkpoint is of a run that trained other parameters ({len(plain['trained'])}, this one {len(names)}): build "
            "the model and its optimizer as they were then"
        )
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {
        name.removeprefix(f"{part}."): torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(f"{part}.") and isinstance(entry, TensorStorageMetadata)
    }
    if found:
        _run(lambda: dcp.load({part: found}, checkpoint_id=folder))
    held = {kind: [found.get(f"{kind}.{name}") for name in names] for kind in optimizer.further[part].by_parameter}
    return {**plain, **held}


def _like(local: Tensor, parameter: Any) -> Tensor:
    """Return the part that this rank has of something of a parameter's shape, as the parameter is: sharded or not."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    whole: Tensor = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return whole


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check_shapes(folder: str | os.PathLike[str], tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` when the checkpoint has other tensors, before one of them is loaded."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    theirs = {name: tuple(entry.size) for name, entry in entries.items() if hasattr(entry, "size")}
    mine = {f"{part}.{name}": tuple(t.shape) for part in ("model", "ema") for name, t in tensors.get(part, {}).items()}
    theirs = {name: size for name, size in theirs.items() if name.split(".")[0] in ("model", "ema")}
    wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if wrong:
        raise ValueError(f"the checkpoint is of another model: {wrong[0]} differs ({len(wrong)} entries in all)")


def _resume(account: Account, ranks: Reducer, saved: Mapping[str, Any]) -> None:
    """Take over what had been spent, on rank 0, and have the others follow it."""
    ranks.on_first(lambda: account.resume(saved["accountant"], saved["name"], _terms(saved)))
    account.join(ranks)


def _terms(saved: Mapping[str, Any]) -> Terms:
    """Return what holds for the charges that were saved."""
    return kept_terms(saved["accountant"], saved.get("account"), saved["settings"])
