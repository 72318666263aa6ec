"""Noise allocation: the same noise energy in a scaled space, so that less of it falls where it hurts more.

Every group g of parameters has a public weight ``w_g > 0``. A record's gradient is clipped by its scaled norm,
``sum_g w_g^2 |g_g|^2 <= C^2``, the sum of the scaled gradients gets the one isotropic noise of the step, and the release
is divided by ``w`` again: parameter p has noise of std ``std / w_p``. In the scaled space this is the Gaussian mechanism
that is accounted anyway, with the same sensitivity and multiplier, whatever the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opacus_ac.testing.records import LossFn, _batch_size, per_sample_gradients, select_records

SOURCES = ("constant", "dimension", "history")
IMPORTANCE = ("none", "weights")

MAX_CHANGE = 1.25
"""Largest factor by which a history moves a weight in one step: C follows the scaled norms through a window of steps."""

SMALLEST_IMPORTANCE = 1e-3
"""Least importance of a group, as a share of the largest: the second factor of LoRA starts at zero."""

_LIMIT = 1e6
_REFUSED = {
    "per_parameter_noise": (
        "noise of another std per parameter under one flat clipping norm has the epsilon of its smallest sigma, because one "
        "record may move the parameter with the least noise by all of C; the average says nothing. At q = 0.01 "
        "and 2000 steps, a smallest sigma of half the nominal one turns epsilon 8 into 78"
    ),
    "gradients": (
        "weights computed from raw gradients are a release of their own without noise: they show in the noise of every step"
    ),
}
_REMEDY = 'use mode="scaled_clipping" with source "constant", "dimension" or "history"'


def _group_of(groups: str | Callable[[str], str], name: str) -> str:
    if callable(groups):
        return str(groups(name))
    return name if groups == "parameter" else name.rpartition(".")[0]


def optimal_weights(
    sizes: Sequence[float], norms: Sequence[float], importance: Sequence[float] | None = None, clamp: float = 4.0
) -> list[float]:
    """Return ``w_g`` proportional to ``(I_g d_g)^(1/4) / G_g^(1/2)``, with geometric mean 1 and inside ``[1/clamp, clamp]``.

    They minimise the noise energy ``sum_g I_g d_g (sigma C / w_g)^2`` where C is in proportion to the root mean square of
    the records' scaled norms.

    Args:
        sizes: ``d_g``, numbers of coordinates.
        norms: ``G_g``, root mean squares of the records' gradient norms, > 0.
        importance: ``I_g`` > 0; None for 1.
        clamp: largest factor away from 1.

    References:
        The rule of AdaClip (arXiv 1908.07643) at the level of groups.

    >>> optimal_weights([900, 100], [0.1, 1.0])[0] / optimal_weights([900, 100], [0.1, 1.0])[1]
    5.477...
    """
    ones = [1.0] * len(sizes) if importance is None else importance
    raw = [math.log(i * d) / 4 - math.log(g) / 2 for i, d, g in zip(ones, sizes, norms, strict=True)]
    logs, limit = np.asarray(raw), math.log(clamp)
    centre = logs.mean()
    for _ in range(60):  # the mean of the clipped logarithms falls with their centre, at most as fast as it
        centre += np.clip(logs - centre, -limit, limit).mean()
    return [float(w) for w in np.exp(np.clip(logs - centre, -limit, limit))]


@dataclass(frozen=True)
class NoiseAllocation:
    """How the noise of a step is spread over groups of parameters; for ``make_private(noise_allocation=...)``.

    Args:
        source: where the weights come from. "constant": ``weights``. "dimension": ``d_g^(1/4)``, the best that is known of
            a group without data. "history": from past releases, ``|g_hat_g|^2`` less the known energy of its noise.
        groups: "parameter", "layer" (the module that holds it), or a function from a parameter's name to its group's.
        weights: for "constant": group name or pattern (``*lora_A*``) to weight; the first that fits counts, and every
            group must have one.
        importance: "none", or "weights" for ``I_g = |theta_g| |g_hat_g|`` of the history (ANADP at the level of groups).
        decay: of the average over past releases.
        warmup: steps of equal weights at the start of a history.
        clamp: weights of "dimension" and "history" stay in ``[1/clamp, clamp]``, with geometric mean 1.
        mode: "scaled_clipping"; other schemes are refused by name.

    Guarantees:
        Weights are constants or functions of past releases, public data and public settings, and change after a step only.
        Given them, a step is the Gaussian mechanism of the same noise multiplier; its event does not depend on them.

    Raises:
        ValueError: an unknown or dishonest scheme, or a value out of range.

    References:
        arXiv 1908.07643 (AdaClip: scaled clipping); arXiv 2410.02912 (ANADP: importance; its noise is not reproduced).
    """

    source: str = "history"
    groups: str | Callable[[str], str] = "parameter"
    weights: Mapping[str, float] | None = None
    importance: str = "none"
    decay: float = 0.95
    warmup: int = 50
    clamp: float = 4.0
    mode: str = "scaled_clipping"

    def __post_init__(self) -> None:
        for name in (self.mode, self.source, self.importance):
            if name in _REFUSED:
                raise ValueError(f"noise allocation by {name!r} is refused: {_REFUSED[name]}. Instead {_REMEDY}")
        _one_of("mode", self.mode, ("scaled_clipping",))
        _one_of("source", self.source, SOURCES)
        _one_of("importance", self.importance, IMPORTANCE)
        if not callable(self.groups):
            _one_of("groups", self.groups, ("parameter", "layer"))
        if (self.source == "constant") != (self.weights is not None):
            raise ValueError(f"source={self.source!r} with weights={self.weights!r}: weights go with source='constant'")
        if self.importance != "none" and self.source != "history":
            raise ValueError(f"importance={self.importance!r} reads past releases: use it with source='history'")
        if not 0 <= self.decay < 1 or not self.warmup >= 0 or not 1 <= self.clamp <= _LIMIT:
            raise ValueError(
                "noise allocation needs 0 <= decay < 1, warmup >= 0 and 1 <= clamp <= 1e6, got "
                f"{self.decay!r}, {self.warmup!r} and {self.clamp!r}"
            )
        for name, weight in (self.weights or {}).items():
            if not (isinstance(weight, int | float) and 1 / _LIMIT <= weight <= _LIMIT):
                raise ValueError(f"the weight of {name!r} must be a number in [1e-6, 1e6], got {weight!r}")

    @classmethod
    def from_public(
        cls,
        model: nn.Module,
        batch: Any,
        loss_fn: LossFn,
        *,
        groups: str | Callable[[str], str] = "parameter",
        clamp: float = 4.0,
    ) -> NoiseAllocation:
        """Return constant weights that are optimal for the per-record gradients of a PUBLIC batch.

        Args:
            model: the model before ``make_private``; it is left as it was.
            batch: public records, as for :func:`opacus_ac.testing.per_sample_gradients`; one at a time is run.
            loss_fn: ``loss_fn(model, batch_of_one)`` gives the record's loss.
            groups: as for the class.
            clamp: as for the class.

        Guarantees:
            None for ``batch``: its norms show in the weights. It must not hold private records.
        """
        records = _batch_size(batch)
        sizes: dict[str, int] = {}
        energies: dict[str, float] = {}
        for record in range(records):
            rows = per_sample_gradients(model, select_records(batch, torch.tensor([record])), loss_fn)
            for name, row in rows.items():
                group = _group_of(groups, name)
                sizes[group] = sizes.get(group, 0) + (row.numel() if record == 0 else 0)
                energies[group] = energies.get(group, 0.0) + float(row.double().square().sum()) / records
        largest = max(energies.values())
        if not (math.isfinite(largest) and largest > 0):
            raise ValueError(f"the gradients of the public batch have squared norm {largest!r}: they show no weights")
        norms = [math.sqrt(max(e, 1e-12 * largest)) for e in energies.values()]
        found = optimal_weights(list(sizes.values()), norms, clamp=clamp)
        return cls("constant", groups, dict(zip(sizes, found, strict=True)))

    def start(self, parameters: Sequence[nn.Parameter], names: Sequence[str]) -> GroupWeights:
        """Return the weights of these parameters as they change over a run."""
        return GroupWeights(self, parameters, names)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"noise allocation has no {name}={value!r}: choose one of {', '.join(map(repr, choices))}")


class GroupWeights:
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
        found = [_group_of(allocation.groups, name) for name in names]
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
        if self.allocation.source == "history":
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

    def update(self) -> None:
        """Move the weights by what was observed since the last call; nothing but released values enters."""
        if self.allocation.source != "history":
            return
        decay = self.allocation.decay
        self._signal = decay * self._signal + (1 - decay) * self._seen[0]
        self._variance = decay**2 * self._variance + (1 - decay) ** 2 * self._seen[1]
        self._seen = np.zeros_like(self._seen)
        self.updates += 1
        if self.updates <= self.allocation.warmup:
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
            "warmup": a.warmup,
            "clamp": a.clamp,
        }

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
                "the state was written with another noise_allocation (its groups or settings differ): call make_private "
                "with the same one"
            )
        if self.allocation.source != "history" and state["weights"] != self.by_group:
            raise ValueError("the state was written with other weights of noise_allocation: give the same ones")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; refuses one that does not fit before changing anything."""
        self.check_state(state)
        self.updates = int(state["updates"])
        self._signal, self._variance = np.asarray(state["signal"]), np.asarray(state["variance"])
        self._seen = np.zeros_like(self._seen)
        self._set(list(state["weights"].values()))
