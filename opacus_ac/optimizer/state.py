"""What ledger and checkpoint know of a private optimizer, beside the state of the inner one: what its parts say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.optim import Optimizer

from opacus_ac.protocols.part import Part

STATE_KEY = "opacus_ac"
STATE_VERSION = 1

_ARGUMENTS = {"control": "lr_control", "ema": "ema_decay", "allocation": "noise_allocation"}
"""Arguments that add a part, where they have another name, for messages."""

_MAY_DIFFER = ("plan",)
"""Parts that may be in a state or in an optimizer alone: a loop that makes its batches by hand has no plan."""


class PrivateOptimizer(Protocol):
    """A private optimizer, as a collection of parts."""

    original_optimizer: Optimizer
    steps_taken: int

    @property
    def parts(self) -> Mapping[str, Part | None]:
        """The parts, by their names in a state; None for one that was not asked for."""


def public_settings(optimizer: PrivateOptimizer) -> dict[str, Any]:
    """Return the settings of a run on which its guarantee depends, for ledger and checkpoint; plain values only."""
    settings = {"inner_optimizer": type(optimizer.original_optimizer).__name__}
    for part in optimizer.parts.values():
        settings |= {} if part is None else part.public_settings()
    return settings


def private_state(optimizer: PrivateOptimizer) -> dict[str, Any]:
    """Return the state of all parts; noise streams are in it only when they were seeded for a test."""
    states = {name: None if part is None else part.state_dict() for name, part in optimizer.parts.items()}
    return {"version": STATE_VERSION, "steps_taken": optimizer.steps_taken, **states}


def check_private_state(optimizer: PrivateOptimizer, state: dict[str, Any] | None) -> dict[str, Any]:
    """Return ``state`` if it fits; change nothing.

    Raises:
        ValueError: If it is missing, damaged, of another version, or of an optimizer built with other settings.
    """
    if state is None:
        raise ValueError(
            "the state has no 'opacus_ac' part: it was not written by AdaptiveClipDPOptimizer, and clipping "
            "norm, EMA and step count cannot be restored from it"
        )
    if state["version"] != STATE_VERSION:
        raise ValueError(f"the state has version {state['version']}, this package reads {STATE_VERSION}")
    parts = optimizer.parts
    for name in dict.fromkeys([*parts, *state]):
        if name not in ("version", "steps_taken", *_MAY_DIFFER):
            _check_has_part(name, state.get(name) is not None, parts.get(name) is not None)
    try:
        int(state["steps_taken"])
        for name, part in parts.items():
            if part is not None and state.get(name) is not None:
                part.check_state(state[name])
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"the state is damaged or incomplete: {error!r}") from error
    return state


def _check_has_part(name: str, theirs: bool, mine: bool) -> None:
    if theirs != mine:
        raise ValueError(
            f"the state was written with another {_ARGUMENTS.get(name, name)} ({theirs}) than this optimizer's "
            f"({mine}): build it with the same settings"
        )


def load_private_state(optimizer: PrivateOptimizer, state: Mapping[str, Any]) -> None:
    """Continue from a state that :func:`check_private_state` has accepted."""
    for name, part in optimizer.parts.items():
        if part is not None and state.get(name) is not None:
            part.load_state_dict(state[name])
    optimizer.steps_taken = int(state["steps_taken"])
