"""The clipping norm at a percentile of the gradient norms, from the noisy histogram of each release."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np

from opacus_ac._validate import fraction, positive
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.release.values import GRID_RATIO, FloatArray, NoisyHistogram, NormWindow, StepRelease, monotone

MAX_CHANGE = 3.0
"""Largest factor by which the percentile policy moves C in one step."""


SEARCH_STEPS = 3
"""Number of first steps in which the percentile policy may go down as far as its histogram reaches.

Norms below C are seen almost without noise (slack encoding). A C that is far too large drowns the gradient in noise; a
C that is too small only normalises the gradients.
"""


OVERSHOT = 0.7
"""Share of C below which the released percentile says that C was far too large."""


SEARCH_ERROR = 0.15
"""Largest standard error of the released fraction at which the search trusts a single histogram."""


DRIFT = 0.015
"""Change per step of the fraction above a norm, as it is seen in fine-tuning, where norms fall by 2 to 5 % a step.

The variance of a histogram of age k grows by the square of this number times k: older histograms count less. So
precise histograms (large batches) are forgotten soon, and noisy ones are averaged for longer.
"""


class PercentilePolicy(ClipPolicy):
    """C is the (1 - target clip rate) percentile of the norms in a window of noisy histograms.

    This is the history rule of DP-Adam-AC made private: it reads released histograms, never norms. Past histograms
    line up by the index of the global grid, so a C0 that is wrong by any factor is found.

    Args:
        max_grad_norm: C0.
        target_clip_rate: fraction of records that should be clipped.
        window: number of steps remembered.
        search: whether the first steps may leave a C0 that is far too large at once. The inner optimizer then starts
            with the first gradient at a fitting C: Adam's bias correction gives its first gradient nearly three
            times the weight of a later one, and that of a C0 100 times too large is all noise.
        min_norm: smallest C.
        max_norm: largest C.

    References:
        arXiv 2510.05288, section 3 (history-based adaptive clipping).
    """

    name = "percentile"
    needs_histogram = True

    def __init__(
        self,
        max_grad_norm: float,
        *,
        target_clip_rate: float = 0.9,
        window: int = 10,
        search: bool = True,
        **limits: float,
    ) -> None:
        super().__init__(max_grad_norm, **limits)
        self.target_clip_rate = fraction(target_clip_rate=target_clip_rate)
        self.window = int(positive(window=window))
        self.search = search
        self._history: deque[NoisyHistogram] = deque(maxlen=self.window)
        self._updates = 0
        self._searching = False

    @property
    def searching(self) -> bool:
        """Whether the last release showed, in the first steps, that its C was far too large."""
        return self._searching

    def update(self, release: StepRelease) -> None:
        """Add the released histogram to the window and choose the next C."""
        assert release.histogram is not None
        self._history.append(release.histogram)
        wanted, error = self._percentile()
        lowest = self._bound / MAX_CHANGE
        early = self.search and self._updates < SEARCH_STEPS and error <= SEARCH_ERROR
        self._searching = early and wanted < OVERSHOT * self._bound
        if self._searching:
            lowest = min(lowest, float(release.histogram.window.edges[0]))
        self._updates += 1
        limited = np.clip(wanted, lowest, self._bound * MAX_CHANGE)
        self._bound = float(np.clip(limited, self.min_norm, self.max_norm))

    def _percentile(self) -> tuple[float, float]:
        """Return the norm that a fraction ``target_clip_rate`` of the records exceeds, and the error of the fraction.

        The norm is 0 or infinite when it lies beyond the window.
        """
        first = min(h.window.first for h in self._history)
        last = max(h.window.first + h.window.bins for h in self._history)
        weighted, weight = np.zeros(last - first + 1), np.zeros(last - first + 1)
        for age, histogram in enumerate(reversed(self._history)):
            tail, variance = histogram.tails(self.target_clip_rate)
            variance = variance + (DRIFT * age) ** 2
            here = slice(histogram.window.first - first, histogram.window.first - first + tail.size)
            weighted[here] += tail / variance
            weight[here] += 1 / variance
        known = np.flatnonzero(weight)
        tail = monotone(weighted[known] / weight[known])
        nearest = int(np.argmin(np.abs(tail - self.target_clip_rate)))
        error = 1 / math.sqrt(weight[known[nearest]])
        return _crossing(tail, known + first, self.target_clip_rate), error

    def state_dict(self) -> dict[str, Any]:
        """Return bound and window of histograms."""
        window = [
            {
                "first": h.window.first,
                "bins": h.window.bins,
                "counts": h.counts.tolist(),
                "variances": h.variances.tolist(),
                "expected_batch_size": h.expected_batch_size,
            }
            for h in self._history
        ]
        return {**super().state_dict(), "window": window, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        super().load_state_dict(state)
        self._updates = int(state["updates"])
        self._history = deque(
            (
                NoisyHistogram(
                    NormWindow(h["first"], h["bins"]),
                    np.asarray(h["counts"]),
                    np.asarray(h["variances"]),
                    h["expected_batch_size"],
                )
                for h in state["window"]
            ),
            maxlen=self.window,
        )


def _crossing(tail: FloatArray, index: np.ndarray, target: float) -> float:
    """Return the norm where the non-increasing ``tail`` at grid edges ``index`` crosses ``target``, log-linearly."""
    if tail[0] < target:
        return 0.0
    if tail[-1] > target:
        return math.inf
    left = int(np.flatnonzero(tail >= target)[-1])
    right = min(left + 1, tail.size - 1)
    drop = tail[left] - tail[right]
    share = (tail[left] - target) / drop if drop > 0 else 0.0
    return float(GRID_RATIO ** (index[left] + share * (index[right] - index[left])))
