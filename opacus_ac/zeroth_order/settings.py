"""What a zeroth-order run is made of: directions, stages, pruning, mechanism; and the papers' choices by name."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from opacus_ac._validate import at_most, count, one_of, positive

DIRECTIONS = ("gaussian", "sphere", "rademacher")
MECHANISMS = ("gaussian", "laplace")
SCORES = ("magnitude", "synflow", "random")
PRECISIONS = (None, "float64", "native")
STRATEGIES = ("static", "dynamic", "incremental")


@dataclass(frozen=True)
class Stages:
    """Stages of DP-ZOSO: each is longer than the one before, with smaller steps, and is pulled to where it began.

    Stage ``s`` (from 0) takes ``first * growth^s`` steps with the learning rate times ``lr_decay^s``. The last one has
    no end. The schedule consists of public constants, so it costs no privacy.

    Args:
        first: steps of the first stage.
        count: number of stages.
        growth: ratio of the lengths of neighbouring stages.
        lr_decay: ratio of their learning rates.
        smoothing_end: smoothing of the last stage, reached geometrically; None keeps it constant.
        proximal: ``gamma`` of the pull ``gamma (theta - anchor)`` to the weights at the start of the stage.

    References:
        arXiv 2402.07818 (DP-ZOSO).
    """

    first: int = 1000
    count: int = 3
    growth: float = 2.0
    lr_decay: float = 0.5
    smoothing_end: float | None = None
    proximal: float = 5e-4

    def __post_init__(self) -> None:
        count(**{"stages.first": self.first})
        count(**{"stages.count": self.count})
        positive(**{"stages.growth": self.growth})
        positive(**{"stages.lr_decay": self.lr_decay})
        at_most(math.inf, 0.0, True, **{"stages.proximal": self.proximal})
        if self.smoothing_end is not None:
            positive(**{"stages.smoothing_end": self.smoothing_end})

    def stage(self, step: int) -> int:
        """Return the stage of ``step`` (both from 0)."""
        end = 0.0
        for stage in range(self.count - 1):
            end += max(1, round(self.first * self.growth**stage))
            if step < end:
                return stage
        return self.count - 1

    def lr_factor(self, stage: int) -> float:
        """Return the factor on the learning rate in ``stage``."""
        return float(self.lr_decay**stage)

    def smoothing(self, stage: int, start: float) -> float:
        """Return the smoothing of ``stage`` when that of the first one is ``start``."""
        if self.smoothing_end is None or self.count == 1:
            return start
        return float(start * (self.smoothing_end / start) ** (stage / (self.count - 1)))


@dataclass(frozen=True)
class Pruning:
    """Which coordinates are trained at all (DP-ZOPO); the others stay as they are, bit by bit.

    The choice reads weights, which are public by then, and a constant input: it costs no privacy.

    Args:
        ratio: trained share of the coordinates, or for "incremental" one share per stage, never smaller than before.
        score: "magnitude" ``|theta|``; "synflow" ``theta dR/dtheta`` of all-positive weights, which takes one backward
            pass of one constant input per round, and the memory of two copies of the model while it lasts; "random".
        keep: whether the "high" or the "low" scores are trained. The public code of DP-ZOPO keeps the low ones, pruning
            in general the high ones.
        strategy: "static": chosen once; "dynamic": anew at each stage; "incremental": at each stage some are added.
        rounds: rounds in which SynFlow arrives at its ratio.
        public_input: constant input for SynFlow: a tensor, a tuple of arguments or a dict of keyword arguments. Never
            private data. None gives a transformers language model one constant token.

    References:
        arXiv 2402.07818 (DP-ZOPO), 2006.05467 (SynFlow).
    """

    ratio: float | tuple[float, ...] = 0.01
    score: str = "synflow"
    keep: str = "high"
    strategy: str = "dynamic"
    rounds: int = 1
    public_input: Any = None

    def __post_init__(self) -> None:
        one_of(SCORES, **{"pruning.score": self.score})
        one_of(("high", "low"), **{"pruning.keep": self.keep})
        one_of(STRATEGIES, **{"pruning.strategy": self.strategy})
        count(**{"pruning.rounds": self.rounds})
        ratios = self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)
        for ratio in ratios:
            at_most(1.0, **{"pruning.ratio": ratio})
        if isinstance(self.ratio, tuple) != (self.strategy == "incremental"):
            raise ValueError(
                'pruning.ratio must be a tuple, one per stage, for strategy="incremental", else one number'
            )
        if list(ratios) != sorted(ratios):
            raise ValueError(f"pruning.ratio={ratios} must not fall: incremental pruning only adds coordinates")
        if self.rounds > 1 and (self.score, self.keep) != ("synflow", "high"):
            raise ValueError('pruning.rounds > 1 belongs to score="synflow" with keep="high": use rounds=1')

    def ratio_of(self, stage: int) -> float:
        """Return the trained share in ``stage``."""
        if isinstance(self.ratio, tuple):
            return self.ratio[min(stage, len(self.ratio) - 1)]
        return self.ratio


@dataclass(frozen=True)
class ZerothOrderSettings:
    """How a zeroth-order step measures and what it releases; DP-AggZO by default.

    Args:
        num_directions: K. A step calls its closure 2K times; its release is one vector of K numbers.
        smoothing: lambda, how far the weights are moved along a direction, in units of a weight.
        direction: law of the directions: "gaussian" N(0, I), "sphere" uniform with norm sqrt(d), or "rademacher"
            (signs), the cheapest to draw. All have ``E[z z^T] = I``.
        mechanism: "gaussian", or "laplace" for pure epsilon with ``accountant="pure"``.
        stages: schedule of DP-ZOSO; None for one stage without end.
        pruning: choice of the trained coordinates; None for all.
        direction_seed: public 63-bit seed of the directions; None draws one. It has nothing to do with the noise.
        ema_decay: decay of a weight average; None for none, which saves a copy of the trained weights.
        precision: how losses are computed, so that rounding does not carry a record over into those of others
            (:mod:`opacus_ac.zeroth_order.rounding`): "float64", whatever the types of weights and inputs; "native", in
            the types of the closure, which needs a large C; None for "native" where physical batches are single
            records, else "float64".
        largest_loss: public size up to which losses count in full whatever C is; it sets the smallest C.

    Raises:
        ValueError: If a value is out of range. The message names it.

    >>> ZerothOrderSettings().num_directions, preset("dpzero").num_directions
    (64, 1)
    """

    num_directions: int = 64
    smoothing: float = 1e-3
    direction: str = "gaussian"
    mechanism: str = "gaussian"
    stages: Stages | None = None
    pruning: Pruning | None = None
    direction_seed: int | None = None
    ema_decay: float | None = None
    precision: str | None = None
    largest_loss: float = 16.0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} is not available: choose 'float64', 'native' or None")
        positive(largest_loss=self.largest_loss)
        count(num_directions=self.num_directions)
        positive(smoothing=self.smoothing)
        one_of(DIRECTIONS, direction=self.direction)
        one_of(MECHANISMS, mechanism=self.mechanism)
        if self.direction_seed is not None and not 0 <= self.direction_seed < 2**63:
            raise ValueError(f"direction_seed={self.direction_seed!r} must be a whole number in [0, 2^63)")
        if self.pruning is not None and self.pruning.strategy != "static" and self.stages is None:
            raise ValueError(
                f"pruning.strategy={self.pruning.strategy!r} chooses anew at each stage, but there are no stages: give "
                'stages=Stages(...), or strategy="static"'
            )

    @property
    def least_smoothing(self) -> float:
        """Smallest smoothing of a run."""
        end = None if self.stages is None else self.stages.smoothing_end
        return self.smoothing if end is None else min(self.smoothing, end)

    @property
    def resolution(self) -> float:
        """Norm of the differences that rounding float32 weights makes of losses around 1.

        A smaller C would train on rounding errors. Without this limit, a percentile policy chooses one when the records
        have nothing left to teach.
        """
        each = torch.finfo(torch.float32).eps / (2 * self.smoothing)
        return float(each * math.sqrt(self.num_directions))

    def configuration(self) -> dict[str, Any]:
        """Return the public settings on which a run depends, without seed and constant input, as plain values."""
        values = dataclasses.asdict(
            self if self.pruning is None else dataclasses.replace(self, pruning=self._plain_pruning())
        )
        del values["direction_seed"]
        if values["pruning"] is not None:
            del values["pruning"]["public_input"]
            if isinstance(values["pruning"]["ratio"], tuple):
                values["pruning"]["ratio"] = list(values["pruning"]["ratio"])
        return values

    def _plain_pruning(self) -> Pruning:
        assert self.pruning is not None
        return dataclasses.replace(self.pruning, public_input=None)  # asdict would copy it


ADDED_SETTINGS = {"precision": None, "largest_loss": 16.0}
"""What states that were written before there were these settings mean by them."""

PRESETS: dict[str, ZerothOrderSettings] = {
    "aggzo": ZerothOrderSettings(),
    "dp-zo": ZerothOrderSettings(num_directions=1),
    "dpzero": ZerothOrderSettings(num_directions=1),
    "dp-zoso": ZerothOrderSettings(num_directions=1, stages=Stages()),
    "dp-zopo": ZerothOrderSettings(num_directions=1, stages=Stages(), pruning=Pruning()),
}
"""The papers' settings. Learning rate, C and batch size are the caller's."""


def preset(name: str, **changes: Any) -> ZerothOrderSettings:
    """Return the settings of a paper, with ``changes``.

    Args:
        name: "aggzo" (recommended), "dpzero", "dp-zo", "dp-zoso" or "dp-zopo".
        **changes: fields of :class:`ZerothOrderSettings` to be other than in the paper.

    Raises:
        ValueError: If the name is unknown, or a value is out of range.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown zeroth_order preset {name!r}: choose one of {', '.join(map(repr, sorted(PRESETS)))}")
    return dataclasses.replace(PRESETS[name], **changes)


def zeroth_order_settings(zeroth_order: str | ZerothOrderSettings | None) -> ZerothOrderSettings | None:
    """Return the settings that ``zeroth_order=`` of ``make_private`` describes; None for training with gradients.

    Raises:
        ValueError: If there is no such preset, or the value is of another type.
    """
    if zeroth_order is None or isinstance(zeroth_order, ZerothOrderSettings):
        return zeroth_order
    if not isinstance(zeroth_order, str):
        raise ValueError(
            f"zeroth_order={zeroth_order!r} is neither ZerothOrderSettings nor the name of a paper: "
            "from opacus_ac.zeroth_order import ZerothOrderSettings"
        )
    return preset(zeroth_order)
