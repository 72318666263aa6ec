"""What leaves a step: the released values and their types."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class StepRelease:
    """What one logical step releases beside its noised gradient: noisy values and public constants only.

    Attributes:
        step: number of the step, from 1.
        max_grad_norm: C_t, the clipping norm of this step.
        noise_multiplier: ratio of the noise std to the joint L2 sensitivity of everything released; accounted.
        gradient_noise_multiplier: z_g, std of the noise on the gradient sum, in units of C_t.
        sample_rate: public sampling rate of the step.
        expected_batch_size: public denominator of every mean.
        clip_rate: noisy fraction of records whose gradient was clipped, in [0, 1]; None without a histogram.
        loss: noisy mean of the records' clipped losses; None when not released.
        lr_multiplier: factor on the learning rate that this step used.
        histogram: noisy histogram of gradient norms, or None.
        profile: noisy mean of the records' energy profiles over the groups of a paid noise allocation, or None.
    """

    step: int
    max_grad_norm: float
    noise_multiplier: float
    gradient_noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    clip_rate: float | None
    loss: float | None
    lr_multiplier: float
    histogram: NoisyHistogram | None
    profile: NoisyProfile | None = None

    @property
    def histogram_weights(self) -> FloatArray:
        """Weight of each entry of the histogram, which the release shows, because the noise was divided by it."""
        assert self.histogram is not None
        return np.asarray(self.gradient_noise_multiplier / np.sqrt(self.histogram.variances))


FloatArray = npt.NDArray[np.float64]


GRID_RATIO = 10.0**0.2
"""Ratio of neighbouring edges of the fixed, global grid of gradient norms: edge ``j`` is ``GRID_RATIO ** j``."""


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
        counts = np.where(np.isfinite(self.variances), self.counts, 0.0)
        above, below = np.cumsum(counts[::-1])[-2::-1] / size, np.cumsum(counts)[:-1] / size
        weight_above, weight_below = self._weights(rate)
        total = np.maximum(weight_above + weight_below, 1e-300)
        return (above * weight_above + (1 - below) * weight_below) / total, 1 / total

    def _weights(self, rate: float) -> tuple[FloatArray, FloatArray]:
        """Return the inverse variances of the readings from the top and from the bottom, each ``[bins + 1]``."""
        size = self.expected_batch_size

        def variances(of: FloatArray, share: float) -> FloatArray:
            return np.asarray(np.cumsum(of)[:-1] / size**2 + share / size)

        below, above = variances(self.variances, 1 - rate), variances(self.variances[::-1], rate)[::-1]
        weight_above = np.where(np.isfinite(above), 1 / above, 0.0)
        weight_below = np.where(np.isfinite(below), 1 / below, 0.0)
        return weight_above, weight_below

    def fraction_above(self, norm: float) -> float:
        """Return the noisy fraction of records with a norm above ``norm``, in [0, 1]."""
        tail, _ = self.tails()
        return float(np.clip(np.interp(self._position(norm), np.arange(tail.size), monotone(tail)), 0.0, 1.0))

    def fraction_std(self, norm: float) -> float:
        """Return the std of the noise in the fraction of records with a norm above ``norm``: a public number.

        It is that of the fraction before it is made monotone and brought into [0, 1]; infinite where the histogram sees
        neither side of ``norm``.
        """
        weight_above, weight_below = self._weights(0.5)
        total = np.maximum(weight_above + weight_below, 1e-300)
        above, below = weight_above / total, weight_below / total
        groups, edge = np.arange(self.counts.size), np.arange(above.size)[:, None]
        # How much of each count a fraction holds, edge by edge, and between the two edges beside ``norm``.
        shares = np.where(groups > edge, above[:, None], -below[:, None])
        position = float(np.clip(self._position(norm), 0, self.window.bins))
        low = min(math.floor(position), self.window.bins - 1)
        share = shares[low] + (position - low) * (shares[low + 1] - shares[low])
        if not total[low : low + 1 + int(position > low)].min() > 1e-300:
            return math.inf
        seen = np.isfinite(self.variances)
        return math.sqrt(float(share[seen] ** 2 @ self.variances[seen])) / self.expected_batch_size

    def _position(self, norm: float) -> float:
        """Return where a norm lies on the edges of the window, counted from 0."""
        return math.log(norm) / math.log(GRID_RATIO) - self.window.first


def monotone(tail: FloatArray) -> FloatArray:
    """Return ``tail`` made non-increasing: the mean of its running maximum from the right and minimum from the left."""
    return (np.maximum.accumulate(tail[::-1])[::-1] + np.minimum.accumulate(tail)) / 2


@dataclass(frozen=True)
class NoisyProfile:
    """Released mean of the records' energy profiles: unbiased values ``[G]``, each with noise of std ``std``.

    The profile of a record is the vector of its squared gradient norms by group, divided by its own length.
    """

    energies: FloatArray
    std: float


class Decoded(NamedTuple):
    """What the noised statistics of a step say, as fields of :class:`StepRelease`; None for what was not released."""

    histogram: NoisyHistogram | None
    loss: float | None
    profile: NoisyProfile | None
