"""Noise allocation: the same noise energy in a scaled space, so that less of it falls where it hurts more.

Every group g of parameters has a public weight ``w_g > 0``. A record's gradient is clipped by its scaled norm,
``sum_g w_g^2 |g_g|^2 <= C^2``. The sum of the scaled gradients gets the one isotropic noise of the step. The release is
divided by ``w`` again, so parameter p has noise of std ``std / w_p``. In the scaled space this is the Gaussian
mechanism that is accounted anyway, with the same sensitivity and multiplier, whatever the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from opacus_ac._validate import at_most, one_of, positive
from opacus_ac.allocation.public_data import public_weights
from opacus_ac.grad_sample.oracle import LossFn
from opacus_ac.release.statistics import DEFAULT_WEIGHT

SOURCES = ("constant", "dimension", "history", "paid")
FOLLOWING = ("history", "paid")
"""Sources whose weights follow releases."""

IMPORTANCE = ("none", "weights")


_LIMIT = 1e6
_REFUSED = {
    "per_parameter_noise": (
        "noise of another std per parameter under one flat clipping norm has the epsilon of its smallest sigma, "
        "because one record may move the parameter with the least noise by all of C; the average says nothing. "
        "At q = 0.01 and 2000 steps, a smallest sigma of half the nominal one turns epsilon 8 into 78"
    ),
    "gradients": (
        "weights computed from raw gradients are a release of their own without noise: they show in the noise of every "
        "step"
    ),
}
_REMEDY = 'use mode="scaled_clipping" with source "constant", "dimension", "history" or "paid"'


@dataclass(frozen=True)
class NoiseAllocation:
    """How the noise of a step is spread over groups of parameters; for ``make_private(noise_allocation=...)``.

    Args:
        source: where the weights come from. "constant": ``weights``. "dimension": ``d_g^(1/4)``, the best that is known
            of a group without data. "history": from past releases, ``|g_hat_g|^2`` less the known energy of its noise.
            "paid": from an entry of the release that is made for it, the mean of ``n / |n|`` over the records, where n
            holds a record's squared gradient norms by group.
        groups: "parameter", "layer" (the module that holds it), or a function from a parameter's name to its group's.
        weights: for "constant": group name or pattern (``*lora_A*``) to weight; the first that fits counts, and every
            group must have one.
        importance: "none", or "weights" for ``I_g = |theta_g| |g_hat_g|`` of the history (ANADP at the level of
            groups).
        decay: of the average over past releases.
        warmup: steps of equal weights at the start; by default 50 of a history, whose signal is weak, and 0 of "paid".
        statistic_weight: ``c`` of "paid". It multiplies the noise by about ``sqrt(1 + c^2)``: 2 % by default.
        clamp: weights other than yours stay in ``[1/clamp, clamp]``, with geometric mean 1.
        mode: "scaled_clipping"; other schemes are refused by name.

    Guarantees:
        Weights are constants, or functions of past releases, public data and public settings. They change after a step
        only. Given them, a step is the Gaussian mechanism of the same noise multiplier; its event does not depend on
        them. The entry of "paid" is part of the one joint release: one record moves it by ``c``, which is in the
        sensitivity.

    Raises:
        ValueError: If a scheme is unknown or dishonest, or a value is out of range.

    References:
        arXiv 1908.07643 (AdaClip: scaled clipping); arXiv 2410.02912 (ANADP: importance; its noise is not reproduced).
    """

    source: str = "history"
    groups: str | Callable[[str], str] = "parameter"
    weights: Mapping[str, float] | None = None
    importance: str = "none"
    decay: float = 0.95
    warmup: int | None = None
    clamp: float = 4.0
    mode: str = "scaled_clipping"
    statistic_weight: float = DEFAULT_WEIGHT

    def __post_init__(self) -> None:
        for name in (self.mode, self.source, self.importance):
            if name in _REFUSED:
                raise ValueError(f"noise allocation by {name!r} is refused: {_REFUSED[name]}. Instead {_REMEDY}")
        one_of(("scaled_clipping",), mode=self.mode)
        one_of(SOURCES, source=self.source)
        one_of(IMPORTANCE, importance=self.importance)
        if not callable(self.groups):
            one_of(("parameter", "layer"), groups=self.groups)
        if (self.source == "constant") != (self.weights is not None):
            raise ValueError(f"source={self.source!r} with weights={self.weights!r}: weights go with source='constant'")
        if self.importance != "none" and self.source != "history":
            raise ValueError(f"importance={self.importance!r} reads past releases: use it with source='history'")
        if not 0 <= self.decay < 1 or not self.warmup_steps >= 0 or not 1 <= self.clamp <= _LIMIT:
            raise ValueError(
                "noise allocation needs 0 <= decay < 1, warmup >= 0 and 1 <= clamp <= 1e6, got "
                f"{self.decay!r}, {self.warmup!r} and {self.clamp!r}"
            )
        self._check_statistic_weight()
        for name, weight in (self.weights or {}).items():
            at_most(_LIMIT, 1 / _LIMIT, True, **{f"the weight of {name!r}": weight})

    def _check_statistic_weight(self) -> None:
        if self.source != "paid" and self.statistic_weight != DEFAULT_WEIGHT:
            raise ValueError(f"statistic_weight={self.statistic_weight!r} goes with source='paid', not {self.source!r}")
        positive(statistic_weight=self.statistic_weight)

    @property
    def warmup_steps(self) -> int:
        """Steps of equal weights at the start."""
        if self.warmup is None:
            return 0 if self.source == "paid" else 50
        return self.warmup

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
        return cls("constant", groups, public_weights(model, batch, loss_fn, groups, clamp))
