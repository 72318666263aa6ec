"""The state of the private step beside the inner optimizer's: what a checkpoint holds of it, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from opacus_ac.allocation.weights import GroupWeights
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.optimizer.ema import WeightEMA
from opacus_ac.optimizer.lr_control import ClipRateControl
from opacus_ac.release.mechanism import GaussianMechanism
from opacus_ac.release.statistics import StepStatistics
from opacus_ac.sampling.plan import SamplingPlan

STATE_KEY = "opacus_ac"
STATE_VERSION = 1


class Part(Protocol):
    """What describes and saves itself."""

    by_parameter: ClassVar[tuple[str, ...]]
    """Entries of the state that have a tensor, or None, for each trained parameter; the others are plain values."""

    def public_settings(self) -> dict[str, Any]:
        """Return the settings on which the guarantee depends, for ledger and checkpoint; plain values."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def check_state(self, state: dict[str, Any] | None) -> None:
        """Raise ``ValueError`` unless ``state`` fits; None where it has no such part."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that :meth:`check_state` has accepted."""


class PrivateParts(Protocol):
    """What the private step is made of."""

    steps_taken: int
    mechanism: GaussianMechanism
    policy: ClipPolicy
    statistics: StepStatistics
    control: ClipRateControl | None
    ema: WeightEMA | None
    plan: SamplingPlan | None
    allocation: GroupWeights | None

    @property
    def further(self) -> Mapping[str, Part]:
        """Parts of the method of training, by the names of their states."""


def private_state(parts: PrivateParts) -> dict[str, Any]:
    """Return the state of the private step; noise streams are in it only when they were seeded for a test."""
    return {
        "version": STATE_VERSION,
        "steps_taken": parts.steps_taken,
        "mechanism": parts.mechanism.state_dict(),
        "policy": parts.policy.state_dict(),
        "statistics": parts.statistics.configuration(),
        "control": None if parts.control is None else parts.control.state_dict(),
        "ema": None if parts.ema is None else parts.ema.state_dict(),
        "plan": None if parts.plan is None else parts.plan.state_dict(),
        "allocation": None if parts.allocation is None else parts.allocation.state_dict(),
        **{name: part.state_dict() for name, part in parts.further.items()},
    }


def check_private_state(parts: PrivateParts, state: dict[str, Any] | None) -> dict[str, Any]:
    """Return ``state`` if it fits.

    Raises:
        ValueError: it is missing, of another version, or of an optimizer built with other settings.
    """
    if state is None:
        raise ValueError(
            "the state has no 'opacus_ac' part: it was not written by AdaptiveClipDPOptimizer, and clipping "
            "norm, EMA and step count cannot be restored from it"
        )
    if state["version"] != STATE_VERSION:
        raise ValueError(f"the state has version {state['version']}, this package reads {STATE_VERSION}")
    mine = {
        "clip_policy": parts.policy.name,
        "statistics": parts.statistics.configuration(),
        "lr_control": parts.control is not None,
        "ema_decay": parts.ema is not None,
        "noise_allocation": parts.allocation is not None,
    }
    theirs = {
        "clip_policy": state["policy"]["name"],
        "statistics": state["statistics"],
        "lr_control": state["control"] is not None,
        "ema_decay": state["ema"] is not None,
        "noise_allocation": state.get("allocation") is not None,
    }
    for name in mine:
        if mine[name] != theirs[name]:
            raise ValueError(
                f"the state was written with another {name} ({theirs[name]}) than this optimizer's "
                f"({mine[name]}): build it with the same settings"
            )
    if parts.ema is not None:
        parts.ema.check_state(state["ema"])
    if parts.allocation is not None:
        parts.allocation.check_state(state["allocation"])
    for name, part in parts.further.items():
        part.check_state(state.get(name))
    return state


def load_private_state(parts: PrivateParts, state: dict[str, Any]) -> None:
    """Continue from a state that :func:`check_private_state` has accepted."""
    parts.policy.load_state_dict(state["policy"])
    parts.mechanism.load_state_dict(state["mechanism"])
    parts.steps_taken = state["steps_taken"]
    if parts.control is not None:
        parts.control.load_state_dict(state["control"])
    if parts.ema is not None:
        parts.ema.load_state_dict(state["ema"])
    if parts.allocation is not None:
        parts.allocation.load_state_dict(state["allocation"])
    for name, part in parts.further.items():
        part.load_state_dict(state[name])
    if parts.plan is not None and state["plan"] is not None:
        parts.plan.load_state_dict(state["plan"])
