"""One file that holds a run of one process, or its account alone; all of it is checked before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from opacus_ac.budget.account import Account
from opacus_ac.budget.charges import Terms
from opacus_ac.budget.spending import kept_terms
from opacus_ac.checkpoint.file import DIGEST, check_digest, check_settings, digest, write
from opacus_ac.distributed.reducers import LOCAL, Reducer
from opacus_ac.noise.streams import RandomStream
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer

SETTINGS = "privacy_settings"
_ACCOUNTANT = "privacy_accountant_state_dict"
TERMS = "account"
"""What holds for the charges (:class:`opacus_ac.budget.charges.Terms`); not in checkpoints of older versions."""
_LEDGER = "ledger"
_NAME = "checkpoint_name"
_STREAM = "sampling_stream"
_MODULE = "module_state_dict"
_OPTIMIZER = "optimizer_state_dict"


# ---------------------------------------------------------------- the whole run


def save(
    path: Any,
    account: Account,
    stream: RandomStream | None,
    module: nn.Module,
    optimizer: DPOptimizer | None,
    *,
    entries: Mapping[str, Any],
    schedulers: Mapping[str, Any],
    module_options: Mapping[str, Any],
    save_options: Mapping[str, Any],
) -> None:
    """Save a run; a file is replaced as a whole or not at all.

    Args:
        path: file path, or a binary file object.
        account: its account.
        stream: stream of its draws, of which only a seeded one has a state; None without one.
        module: its model, wrapped or bare.
        optimizer: its private optimizer, or None.
        entries: further entries.
        schedulers: schedulers of Opacus by name.
        module_options: for ``module.state_dict``.
        save_options: for ``torch.save``.
    """
    state = dict(entries)
    state[_MODULE] = module.state_dict(**module_options)
    if optimizer is not None:
        state[_OPTIMIZER] = optimizer.state_dict()
    for name, scheduler in schedulers.items():
        state[f"{name}_state_dict"] = scheduler.state_dict()
    save_account(path, account, stream, state, **save_options)


def load(
    path: Any,
    account: Account,
    stream: RandomStream | None,
    module: nn.Module,
    optimizer: DPOptimizer | None,
    *,
    schedulers: Mapping[str, Any],
    module_options: Mapping[str, Any],
    load_options: Mapping[str, Any],
) -> dict[str, Any]:
    """Continue from :func:`save`, and return the further entries; the arguments are those of there.

    Raises:
        ValueError: If the checkpoint is damaged, or of other parameters, settings or another ledger; nothing was
            loaded.
    """
    needed = [_MODULE, *(f"{name}_state_dict" for name in schedulers), *([] if optimizer is None else [_OPTIMIZER])]
    state = read_account(path, account, *needed, **load_options)
    _check_model(state[_MODULE], module)
    if optimizer is not None:
        check_settings(state[SETTINGS], account.settings)
    if isinstance(optimizer, AdaptiveClipDPOptimizer):
        optimizer.check_state_dict(state[_OPTIMIZER])
    check_account(state, account)
    if optimizer is not None:
        optimizer.load_state_dict(state.pop(_OPTIMIZER))
    module.load_state_dict(state.pop(_MODULE), **module_options)
    load_account(state, account, LOCAL, stream)
    for name, scheduler in schedulers.items():
        scheduler.load_state_dict(state.pop(f"{name}_state_dict"))
    return state


def _check_model(saved: Mapping[str, Tensor], module: nn.Module) -> None:
    mine = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in saved.items()}
    wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if wrong:
        raise ValueError(f"the checkpoint is of another model: {wrong[0]} differs ({len(wrong)} entries in all)")


# ---------------------------------------------------------------- the account


def save_account(
    path: Any, account: Account, stream: RandomStream | None, entries: Mapping[str, Any], **save_options: Any
) -> None:
    """Save an account with further entries, all of them under one digest."""
    state = {
        **entries,
        _ACCOUNTANT: account.accountant.state_dict(),
        _STREAM: {} if stream is None else stream.state_dict(),
        TERMS: account.state_dict(),
        SETTINGS: account.settings,
        _LEDGER: account.ledger_head,
        _NAME: account.mark(),
    }
    write({**state, DIGEST: digest(state)}, path, **save_options)


def read_account(path: Any, account: Account, *needed: str, **load_options: Any) -> dict[str, Any]:
    """Return the content of a file after a check of its digest; nothing of it is loaded yet.

    Args:
        path: file path, or a binary file object.
        account: the account that is to go on.
        *needed: further entries that must be there.
        **load_options: for ``torch.load``.

    Raises:
        ValueError: If an entry is missing or was changed, or the accountant is of another kind.
    """
    state: dict[str, Any] = torch.load(path, weights_only=True, **load_options)
    expected = [_ACCOUNTANT, SETTINGS, _LEDGER, _NAME, DIGEST, *needed]
    missing = [key for key in expected if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise ValueError(f"the checkpoint has no {', '.join(missing)}: it was not written by save_checkpoint")
    check_digest(state)
    written, mine = state[_ACCOUNTANT]["mechanism"], account.accountant.name
    if written != mine:
        raise ValueError(f"the checkpoint was accounted by {written!r}, this engine uses {mine!r}")
    return state


def check_account(state: Mapping[str, Any], account: Account) -> None:
    """Raise unless the charges that were saved can be taken over.

    Raises:
        ValueError: If they are of another ledger, or protect something else than those of ``account``.
        LedgerError: If the ledger does not contain what the checkpoint says it does.
    """
    account.check_checkpoint(state[_LEDGER])
    account.check_terms(_terms(state))


def load_account(state: dict[str, Any], account: Account, ranks: Reducer, stream: RandomStream | None) -> None:
    """Continue account and seeded draws, and take their entries out of ``state``; every rank has to call it."""
    terms = _terms(state)
    spent_before, name, draws = state.pop(_ACCOUNTANT), state.pop(_NAME), state.pop(_STREAM, {})
    for key in (SETTINGS, TERMS, _LEDGER, DIGEST):
        state.pop(key, None)
    ranks.on_first(lambda: account.resume(spent_before, name, terms))
    account.join(ranks)
    if stream is not None:
        stream.load_state_dict(draws)


def _terms(state: Mapping[str, Any]) -> Terms:
    """Return what holds for the charges that were saved."""
    return kept_terms(state[_ACCOUNTANT], state.get(TERMS), state[SETTINGS])
