"""Weights of the groups of parameters, as they change over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opacus_ac.allocation.rule import group_of, optimal_weights
from opacus_ac.allocation.settings import FOLLOWING, NoiseAllocation
from opacus_ac.protocols.part import Part
from opacus_ac.release.values import FloatArray, NoisyProfile

MAX_CHANGE = 1.25
"""Largest factor by which a history moves a weight in one step: C follows scaled norms through a window of steps."""


SMALLEST_IMPORTANCE = 1e-3
"""Least importance of a group, as a share of the largest: the second factor of LoRA starts at zero."""


class GroupWeights(Part):
    """The public weights of a run's parameters, and the history of releases that moves them.

    Args:
        allocation: the settings.
        parameters: trainable parameters, in the order of the optimizer.
        names: their names in the model.

    Attributes:
        weights: one per parameter, a new list whenever they change.
    """

    def __init__(self, allocation: NoiseAllocation, parameters: Sequence[nn.Parameter], names: Sequence[str]) -> None:
        self.allocation = allocation
        found = [group_of(allocation.groups, name) for name in names]
        self.groups = list(dict.fromkeys(found))
        self._member = {id(p): self.groups.index(g) for p, g in zip(parameters, found, strict=True)}
        self._parameters = list(parameters)
        self._sizes = np.zeros(len(self.groups))
        for parameter in self._parameters:
            self._sizes[self._member[id(parameter)]] += parameter.numel()
        self._signal, self._variance = np.zeros(len(self.groups)), np.zeros(len(self.groups))
        self._seen = np.zeros((2, len(self.groups)))
        self.updates = 0
        self._set(self._initial())

    def _initial(self) -> list[float]:
        if self.allocation.source == "dimension":
            return optimal_weights(self._sizes.tolist(), [1.0] * len(self.groups), clamp=self.allocation.clamp)
        if self.allocation.source in FOLLOWING:
            return [1.0] * len(self.groups)
        return [self._constant(group) for group in self.groups]

    def _constant(self, group: str) -> float:
        given = self.allocation.weights or {}
        fitting = [w for pattern, w in given.items() if pattern == group] or [
            w for pattern, w in given.items() if fnmatchcase(group, pattern)
        ]
        if not fitting:
            raise ValueError(
                f"noise allocation has no weight for {group!r}: give it one, or end the weights with a pattern '*'"
            )
        return float(fitting[0])

    def _set(self, by_group: Sequence[float]) -> None:
        self._by_group = [float(w) for w in by_group]
        self.weights = [self._by_group[self._member[id(p)]] for p in self._parameters]

    @property
    def by_group(self) -> dict[str, float]:
        """The weight of each group, by its name."""
        return dict(zip(self.groups, self._by_group, strict=True))

    def observe(
        self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], stds: Sequence[float], unit: float
    ) -> None:
        """Take in released gradients, for the next :meth:`update`.

        Args:
            parameters: some of the parameters.
            gradients: what was released of them; noised already.
            stds: std of the noise in each.
            unit: public factor in the gradients that changes from step to step, such as C0 / C_t.
        """
        if self.allocation.source != "history":
            return
        for parameter, gradient, std in zip(parameters, gradients, stds, strict=True):
            group, noise = self._member[id(parameter)], (std / unit) ** 2
            energy = float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2 / unit**2
            self._seen[:, group] += energy - gradient.numel() * noise, 2 * gradient.numel() * noise**2

    def statistics(self) -> dict[str, Any]:
        """Return what the release of a step must hold for these weights, as arguments of ``StepStatistics``."""
        if self.allocation.source != "paid":
            return {}
        return {"groups": len(self.groups), "group_weight": self.allocation.statistic_weight}

    def check_statistics(self, groups: int) -> None:
        """Raise ``ValueError`` when a step does not release the profile of these groups."""
        needed = self.statistics().get("groups", 0)
        if groups != needed:
            raise ValueError(
                f"noise allocation by {self.allocation.source!r} needs the profile of {needed} groups in the release, "
                f"and statistics has {groups}: pass StepStatistics(groups={needed})"
            )

    def by_groups(self, squares: FloatArray) -> FloatArray:
        """Return squared norms by group ``[B, G]`` from those by parameter ``[B, P]``. Private."""
        total = np.zeros((len(squares), len(self.groups)))
        for column, parameter in zip(squares.T, self._parameters, strict=True):
            total[:, self._member[id(parameter)]] += column
        return total

    def observe_profile(self, profile: NoisyProfile | None) -> None:
        """Take in a released profile, for the next :meth:`update`."""
        if profile is not None and self.allocation.source == "paid":
            self._seen += profile.energies, np.full(len(self.groups), profile.std**2)

    def update(self) -> None:
        """Move the weights by what was observed since the last call; nothing but released values enters."""
        if self.allocation.source not in FOLLOWING:
            return
        decay = self.allocation.decay
        self._signal = decay * self._signal + (1 - decay) * self._seen[0]
        self._variance = decay**2 * self._variance + (1 - decay) ** 2 * self._seen[1]
        self._seen = np.zeros_like(self._seen)
        self.updates += 1
        if self.updates <= self.allocation.warmup_steps:
            return
        wanted = np.asarray(self._optimal())
        now = np.asarray(self._by_group)
        self._set((now * np.clip(wanted / now, 1 / MAX_CHANGE, MAX_CHANGE)).tolist())

    def _optimal(self) -> list[float]:
        """Return the weights that the history asks for."""
        correction = 1 - self.allocation.decay**self.updates
        # A signal below the fluctuation of its noise is unknown, and taken to be as large as could have hidden there.
        energy = np.maximum(self._signal, np.sqrt(self._variance)) / correction
        if not (np.isfinite(energy).all() and energy.max() > 0):
            return self._by_group
        norms = np.sqrt(np.maximum(energy, 1e-12 * energy.max()))
        importance = None if self.allocation.importance == "none" else self._importance(norms)
        return optimal_weights(self._sizes.tolist(), norms.tolist(), importance, self.allocation.clamp)

    def _importance(self, norms: np.ndarray[Any, Any]) -> list[float]:
        """Return ``|theta_g| |g_hat_g|``, both public, over the largest."""
        squares = np.zeros(len(self.groups))
        for parameter in self._parameters:
            norm = float(torch.linalg.vector_norm(parameter.detach(), dtype=torch.float64))
            squares[self._member[id(parameter)]] += norm**2
        found = np.sqrt(squares) * norms
        largest = found.max()
        if not (np.isfinite(largest) and largest > 0):
            return [1.0] * len(self.groups)
        return [float(i) for i in np.maximum(found / largest, SMALLEST_IMPORTANCE)]

    def configuration(self) -> dict[str, Any]:
        """Return the public settings, for ledger and checkpoint; plain values only."""
        a = self.allocation
        return {
            "mode": a.mode,
            "source": a.source,
            "groups": "callable" if callable(a.groups) else a.groups,
            "importance": a.importance,
            "decay": a.decay,
            "warmup": a.warmup_steps,
            "clamp": a.clamp,
            **({"statistic_weight": a.statistic_weight} if a.source == "paid" else {}),
        }

    def public_settings(self) -> dict[str, Any]:
        """Return the settings of the allocation."""
        return {"noise_allocation": self.configuration()}

    def state_dict(self) -> dict[str, Any]:
        """Return settings, weights and history; public numbers all."""
        return {
            "configuration": self.configuration(),
            "weights": self.by_group,
            "updates": self.updates,
            "signal": self._signal.tolist(),
            "variance": self._variance.tolist(),
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` when ``state`` is of other groups, settings or constants."""
        if state["configuration"] != self.configuration() or list(state["weights"]) != self.groups:
            raise ValueError(
                "the state was written with another noise_allocation (its groups or settings differ): call "
                "make_private with the same one"
            )
        if self.allocation.source not in FOLLOWING and state["weights"] != self.by_group:
            raise ValueError("the state was written with other weights of noise_allocation: give the same ones")
        int(state["updates"])
        if not len(state["signal"]) == len(state["variance"]) == len(self.groups):
            raise ValueError(
                "the state's history of noise_allocation is damaged: it does not have a value for each group"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; refuses one that does not fit before changing anything."""
        self.check_state(state)
        self.updates = int(state["updates"])
        self._signal, self._variance = np.asarray(state["signal"]), np.asarray(state["variance"])
        self._seen = np.zeros_like(self._seen)
        self._set(list(state["weights"].values()))
