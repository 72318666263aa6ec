"""What each record adds to the release beside its gradient: one count in a norm histogram, and its clipped loss.

A record with clipped gradient of norm at most ``u C`` leaves room ``1 - u^2`` in the unit ball, so it may report
its norm bin with weight ``w = sqrt(1 + a^2 - u^2)`` (slack encoding): small gradients are seen nearly for free and
``a^2`` pays for seeing the clipped ones. The joint vector (gradient / C, histogram, loss) of one record has L2 norm
at most ``sqrt(1 + a^2 + b^2)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

GRID_RATIO = 10.0**0.2
"""Ratio of neighbouring edges of the fixed, global grid of gradient norms: edge ``j`` is ``GRID_RATIO ** j``."""


DEFAULT_WEIGHT = math.sqrt(0.0412)
"""Weight of a statistic that leaves 98 % of the noise multiplier to the gradient."""


@dataclass(frozen=True)
class NormWindow:
    """A stretch of the global norm grid: ``bins`` bins from edge ``first`` on, and the two tails outside.

    Groups are numbered 0 (below the window), 1 to ``bins``, ``bins + 1`` (above, and non-finite norms).
    """

    first: int
    bins: int

    @classmethod
    def around(cls, bound: float, bins: int) -> NormWindow:
        """Return the window of ``bins`` bins whose middle holds ``bound``."""
        return cls(math.floor(math.log(bound) / math.log(GRID_RATIO)) - bins // 2, bins)

    @property
    def edges(self) -> FloatArray:
        """Edges of the window, ``[bins + 1]``, in units of the gradient norm."""
        return np.asarray(GRID_RATIO ** np.arange(self.first, self.first + self.bins + 1, dtype=np.float64))

    def groups(self, norms: FloatArray) -> npt.NDArray[np.int64]:
        """Return the group of each norm, ``[B]``; a norm that is not finite is in the top tail."""
        safe = np.where(np.isfinite(norms), norms, np.inf)
        return np.searchsorted(self.edges, safe, side="right").astype(np.int64)


@dataclass(frozen=True)
class NoisyHistogram:
    """Released histogram of gradient norms: unbiased counts per group with their noise variances.

    ``counts[k]`` estimates how many records of the batch had a norm in group ``k``; ``variances[k]`` is the noise
    variance of that estimate (infinite where the encoding cannot see the group). Counts are not clamped.
    """

    window: NormWindow
    counts: FloatArray
    variances: FloatArray
    expected_batch_size: float

    def tails(self, rate: float = 0.5) -> tuple[FloatArray, FloatArray]:
        """Return (fraction of records above each edge, variance of it), both ``[bins + 1]``.

        Each fraction is read from the top and, through the public batch size, from the bottom; the two are combined
        by inverse variance: that of the noise, and that of Poisson sampling where the fraction is ``rate``.
        """
        size = self.expected_batch_size
        seen = np.isfinite(self.variances)
        counts = np.where(seen, self.counts, 0.0)

        def read(counts: FloatArray, variances: FloatArray, share: float) -> tuple[FloatArray, FloatArray]:
            return np.cumsum(counts)[:-1] / size, np.cumsum(variances)[:-1] / size**2 + share / size

        below, below_variance = read(counts, self.variances, 1 - rate)
        above, above_variance = (x[::-1] for x in read(counts[::-1], self.variances[::-1], rate))
        weight_above = np.where(np.isfinite(above_variance), 1 / above_variance, 0.0)
        weight_below = np.where(np.isfinite(below_variance), 1 / below_variance, 0.0)
        total = np.maximum(weight_above + weight_below, 1e-300)
        return (above * weight_above + (1 - below) * weight_below) / total, 1 / total

    def fraction_above(self, norm: float) -> float:
        """Return the noisy fraction of records with a norm above ``norm``, in [0, 1]."""
        tail, _ = self.tails()
        position = math.log(norm) / math.log(GRID_RATIO) - self.window.first
        return float(np.clip(np.interp(position, np.arange(tail.size), monotone(tail)), 0.0, 1.0))


def monotone(tail: FloatArray) -> FloatArray:
    """Return ``tail`` made non-increasing: the mean of its running maximum from the right and minimum from the left."""
    return (np.maximum.accumulate(tail[::-1])[::-1] + np.minimum.accumulate(tail)) / 2


class StepStatistics:
    """Sums over the records of one logical batch of what is released beside the gradient.

    Args:
        histogram: whether the norm histogram is released.
        histogram_weight: ``a``; 0 shows unclipped records only, at no cost.
        loss_bound: ``L``, the public bound to which each record's loss is clipped, or None for no loss.
        loss_weight: ``b``; ignored without ``loss_bound``.
        bins: number ``K`` of histogram bins between the tails.

    Guarantees:
        The vector (sum of clipped gradients / C, ``vector()``) moves by at most ``sensitivity`` in L2 norm when one
        record is added or removed, whatever its gradient and loss, non-finite ones included.
    """

    def __init__(
        self,
        *,
        histogram: bool = True,
        histogram_weight: float = DEFAULT_WEIGHT,
        loss_bound: float | None = None,
        loss_weight: float = DEFAULT_WEIGHT,
        bins: int = 20,
    ) -> None:
        for name, value in (("histogram_weight", histogram_weight), ("loss_weight", loss_weight)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if loss_bound is not None and not (math.isfinite(loss_bound) and loss_bound > 0 and loss_weight > 0):
            raise ValueError(f"loss_bound must be a finite number > 0 with loss_weight > 0, got {loss_bound!r}")
        if bins < 2:
            raise ValueError(f"bins must be at least 2, got {bins!r}")
        self.histogram = histogram
        self.histogram_weight = histogram_weight if histogram else 0.0
        self.loss_bound = loss_bound
        self.loss_weight = loss_weight if loss_bound is not None else 0.0
        self.bins = bins
        self._window: NormWindow | None = None

    @property
    def sensitivity(self) -> float:
        """Joint L2 sensitivity ``sqrt(1 + a^2 + b^2)`` in units of C, gradient included."""
        return math.sqrt(1 + self.histogram_weight**2 + self.loss_weight**2)

    def begin(self, bound: float, gradient_share: Callable[[FloatArray], FloatArray]) -> None:
        """Start a logical batch at clipping norm ``bound``.

        Args:
            bound: C of this step.
            gradient_share: maps norm / C (the upper edge of a bin) to the largest norm / C that a gradient of that
                bin has after clipping.
        """
        self._window = NormWindow.around(bound, self.bins)
        upper = np.append(self._window.edges / bound, np.inf)
        share = np.clip(gradient_share(upper), 0.0, 1.0)
        self._weights = np.sqrt(np.maximum(1 + self.histogram_weight**2 - share**2, 0.0))
        self._counts = np.zeros(self.bins + 2, dtype=np.int64)
        self._loss_sum = 0.0

    @property
    def started(self) -> bool:
        """Whether a logical batch is open."""
        return self._window is not None

    def observe(self, norms: FloatArray, losses: FloatArray | None) -> None:
        """Add a physical batch: ``norms`` ``[B]`` and, when the loss is released, ``losses`` ``[B]``."""
        assert self._window is not None
        if self.histogram:
            self._counts += np.bincount(self._window.groups(norms), minlength=self.bins + 2)
        if self.loss_bound is not None:
            if losses is None or losses.shape != norms.shape:
                got = "none" if losses is None else f"{losses.shape[0]}"
                raise ValueError(
                    f"the noisy loss needs one loss per record ({norms.shape[0]}), got {got}: "
                    "call optimizer.record_losses(per_record_losses) before step(), or pass loss_bound=None"
                )
            clipped = np.clip(np.nan_to_num(losses, nan=self.loss_bound, posinf=self.loss_bound), 0.0, self.loss_bound)
            self._loss_sum += float(clipped.sum()) / self.loss_bound

    def tally(self) -> npt.NDArray[np.int64]:
        """Return the sums of this process as integers ``[bins + 3]``: counts, and the bits of the loss sum. Private."""
        return np.append(self._counts, np.float64(self._loss_sum).view(np.int64))

    def merge(self, tallies: npt.NDArray[np.int64]) -> None:
        """Take the sums of several processes ``[world, bins + 3]`` for one's own: counts exactly, losses in their order."""
        self._counts = tallies[:, :-1].sum(0)
        self._loss_sum = float(sum(tallies[:, -1].view(np.float64).tolist()))

    def vector(self) -> FloatArray:
        """Return the un-noised statistics ``[bins + 2]`` (+ 1 with a loss), in units of the release. Private."""
        parts = [self._weights * self._counts] if self.histogram else []
        if self.loss_bound is not None:
            parts.append(np.array([self.loss_weight * self._loss_sum]))
        return np.concatenate(parts) if parts else np.zeros(0)

    def decode(
        self, noisy: FloatArray, std: float, expected_batch_size: float
    ) -> tuple[NoisyHistogram | None, float | None]:
        """Turn the noised vector (noise std ``std`` per entry) into (histogram, mean loss)."""
        assert self._window is not None
        histogram = loss = None
        if self.histogram:
            seen = self._weights > 1e-6
            weights = np.where(seen, self._weights, 1.0)
            variances = np.where(seen, (std / weights) ** 2, np.inf)
            counts = np.where(seen, noisy[: self.bins + 2] / weights, 0.0)
            histogram = NoisyHistogram(self._window, counts, variances, expected_batch_size)
        if self.loss_bound is not None:
            loss = float(noisy[-1]) / self.loss_weight * self.loss_bound / expected_batch_size
        return histogram, loss

    def finish(self) -> None:
        """Forget the sums of the logical batch."""
        self._window = None

    def configuration(self) -> dict[str, Any]:
        """Return the public settings, for reports and checkpoints."""
        return {
            "histogram": self.histogram,
            "histogram_weight": self.histogram_weight,
            "loss_bound": self.loss_bound,
            "loss_weight": self.loss_weight,
            "bins": self.bins,
        }
