"""Clip policies: each owns the clipping norm C, turns norms into factors, and learns from releases.

A new rule is a subclass of :class:`ClipPolicy` and a row in :data:`POLICIES`; it then gets the whole test battery.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any, ClassVar

import numpy as np
import torch

from opacus_ac.mechanism import StepRelease
from opacus_ac.statistics import GRID_RATIO, FloatArray, NoisyHistogram, NormWindow, monotone

MAX_CHANGE = 3.0
"""Largest factor by which the percentile policy moves C in one step."""

SEARCH_STEPS = 3
"""Number of first steps in which the percentile policy may go down as far as its histogram reaches.

Norms below C are seen almost without noise (slack encoding), and a C that is far too large drowns the gradient in noise;
a C that is too small only normalises the gradients.
"""

OVERSHOT = 0.7
"""Share of C below which the released percentile says that C was far too large."""

SEARCH_ERROR = 0.15
"""Largest standard error of the released fraction at which the search trusts a single histogram."""


def _positive(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
    return float(value)


def _fraction(name: str, value: float) -> float:
    if not (isinstance(value, int | float) and 0 < value < 1):
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}")
    return float(value)


DRIFT = 0.015
"""Change per step of the fraction above a norm, as it is seen in fine-tuning, where norms fall by 2 to 5 % a step.

A histogram of age k is trusted as if it had this much times k as an additional error: precise histograms (large batches)
are forgotten soon, noisy ones are averaged for longer.
"""


class ClipPolicy:
    """Keeps the clipping norm fixed; base of the adaptive policies.

    Args:
        max_grad_norm: C0, the clipping norm of the first step.
        min_norm: smallest C that the policy may choose.
        max_norm: largest C that the policy may choose.

    Guarantees:
        ``norm * factor <= C`` for every record; records with a non-finite norm get the factor 0.
    """

    name: ClassVar[str] = "fixed"
    needs_histogram: ClassVar[bool] = False
    is_private: ClassVar[bool] = True

    def __init__(self, max_grad_norm: float, *, min_norm: float = 1e-10, max_norm: float = 1e10) -> None:
        self.initial_bound = _positive("max_grad_norm", max_grad_norm)
        self.min_norm, self.max_norm = _positive("min_norm", min_norm), _positive("max_norm", max_norm)
        if min_norm > max_norm:
            raise ValueError(f"min_norm {min_norm!r} must not exceed max_norm {max_norm!r}")
        self._bound = float(np.clip(self.initial_bound, self.min_norm, self.max_norm))

    @property
    def bound(self) -> float:
        """C, the clipping norm of the step that comes next."""
        return self._bound

    @bound.setter
    def bound(self, value: float) -> None:
        self._bound = _positive("max_grad_norm", value)

    @property
    def searching(self) -> bool:
        """Whether the last release served to find C only: its gradient was mostly noise, and no weights should move."""
        return False

    def factors(self, norms: torch.Tensor) -> torch.Tensor:
        """Return the clip factor of each record, ``[B]`` in, ``[B]`` out."""
        factors = self._factors(norms)
        return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))

    def _factors(self, norms: torch.Tensor) -> torch.Tensor:
        return (self._bound / norms).clamp(max=1.0)

    def gradient_share(self, ratio: FloatArray) -> FloatArray:
        """Return the largest clipped norm over C of records with norm / C up to ``ratio``."""
        return np.minimum(1.0, ratio)

    def true_share(self, ratio: FloatArray) -> FloatArray:
        """Return the larger of :meth:`gradient_share` and what the factors leave of norms on a fine grid up to ``ratio``.

        A rule of somebody's own may enlarge small gradients and inherit a share that says otherwise. Each step holds its factors to
        what is returned here.

        Args:
            ratio: increasing norms over C; the last may be infinite.
        """
        declared = np.asarray(self.gradient_share(ratio))
        edges = ratio[np.isfinite(ratio)]
        pieces = [
            np.geomspace(low, high, 17) for low, high in zip(np.append(edges[0] * 1e-12, edges), edges, strict=False)
        ]
        grid = np.concatenate(pieces)
        left = np.maximum.accumulate(self.factors(torch.from_numpy(grid * self._bound)).numpy() * grid)
        found = left[np.searchsorted(grid, edges, side="right") - 1]
        return np.asarray(np.maximum(declared, np.append(found, declared[edges.size :])))

    def update(self, release: StepRelease) -> None:
        """Choose the next C from the released values."""

    def clip_rate(self, release: StepRelease) -> float | None:
        """Return the clip rate that steers the learning rate: the released one."""
        return release.clip_rate

    def observe_private(self, norms: torch.Tensor) -> None:
        """Read un-noised norms; only a policy with ``is_private = False`` may."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the policy (plain numbers and lists)."""
        return {"name": self.name, "bound": self._bound, "initial_bound": self.initial_bound}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            ValueError: the state belongs to another policy.
        """
        if state["name"] != self.name:
            raise ValueError(
                f"the checkpoint was written with clip_policy={state['name']!r}, this optimizer has {self.name!r}: "
                "build it with the same clip_policy"
            )
        self._bound, self.initial_bound = float(state["bound"]), float(state["initial_bound"])


class AutomaticPolicy(ClipPolicy):
    """AUTO-S: every gradient is scaled to C norm / (norm + gamma).

    References:
        Bu et al. 2023 (arXiv 2206.07136), equation 4.2.
    """

    name = "automatic"

    def __init__(self, max_grad_norm: float, *, gamma: float = 0.01, **limits: float) -> None:
        super().__init__(max_grad_norm, **limits)
        self.gamma = _positive("gamma", gamma)

    def _factors(self, norms: torch.Tensor) -> torch.Tensor:
        return self._bound / (norms + self.gamma)

    def gradient_share(self, ratio: FloatArray) -> FloatArray:
        """Return 1: small gradients are enlarged, so no bin leaves room."""
        return np.ones_like(ratio)


class GeometricPolicy(ClipPolicy):
    """C follows a quantile geometrically: ``C *= exp(rate * (clip_rate - target_clip_rate))``.

    References:
        Andrew et al. 2021 (arXiv 1905.03871), equation 1, with the clip rate read from the noisy histogram.
    """

    name = "geometric"
    needs_histogram = True

    def __init__(
        self, max_grad_norm: float, *, target_clip_rate: float = 0.9, rate: float = 0.5, **limits: float
    ) -> None:
        super().__init__(max_grad_norm, **limits)
        self.target_clip_rate = _fraction("target_clip_rate", target_clip_rate)
        self.rate = _positive("rate", rate)

    def update(self, release: StepRelease) -> None:
        """Move C towards the target by the released clip rate."""
        assert release.clip_rate is not None
        moved = self._bound * math.exp(self.rate * (release.clip_rate - self.target_clip_rate))
        self._bound = float(np.clip(moved, self.min_norm, self.max_norm))


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
        self.target_clip_rate = _fraction("target_clip_rate", target_clip_rate)
        self.window = int(_positive("window", window))
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


class RawPercentilePolicy(ClipPolicy):
    """The published rule exactly as printed: the percentile of un-noised norms. NOT private.

    Kept for comparison. C depends on the data without noise, so no finite epsilon holds and none is reported.

    References:
        arXiv 2510.05288, section 3.
    """

    name = "raw_percentile"
    is_private = False

    def __init__(
        self, max_grad_norm: float, *, target_clip_rate: float = 0.2, history: int = 1000, **limits: float
    ) -> None:
        super().__init__(max_grad_norm, **limits)
        self.target_clip_rate = _fraction("target_clip_rate", target_clip_rate)
        self._norms: deque[float] = deque(maxlen=int(_positive("history", history)))
        self._seen = self._clipped = 0
        self._last_rate: float | None = None

    def observe_private(self, norms: torch.Tensor) -> None:
        """Remember un-noised norms."""
        known = norms[torch.isfinite(norms)]
        self._norms.extend(known.tolist())
        self._seen += known.numel()
        self._clipped += int((known > self._bound).sum())

    def clip_rate(self, release: StepRelease) -> float | None:
        """Return the un-noised clip rate of the last logical batch, as the published algorithm does."""
        return self._last_rate

    def update(self, release: StepRelease) -> None:
        """Set C to the percentile of the remembered norms."""
        self._last_rate = self._clipped / self._seen if self._seen else None
        self._seen = self._clipped = 0
        if self._norms:
            wanted = np.quantile(np.asarray(self._norms), 1 - self.target_clip_rate)
            self._bound = float(np.clip(wanted, self.min_norm, self.max_norm))

    def state_dict(self) -> dict[str, Any]:
        """Return bound and un-noised norms; private, as everything of this policy."""
        return {**super().state_dict(), "private_norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        super().load_state_dict(state)
        self._norms = deque(state["private_norms"], maxlen=self._norms.maxlen)


POLICIES: dict[str, type[ClipPolicy]] = {
    policy.name: policy
    for policy in (ClipPolicy, AutomaticPolicy, GeometricPolicy, PercentilePolicy, RawPercentilePolicy)
}
"""Name -> class of every policy that ``clip_policy=`` takes by name."""


def build_policy(
    policy: str | ClipPolicy, max_grad_norm: float, target_clip_rate: float, expected_batch_size: float | None
) -> ClipPolicy:
    """Return the policy named ``policy``, or ``policy`` itself when it is an object.

    A percentile policy remembers 10 steps, or 20 where batches are so small that 10 are too noisy.

    Raises:
        ValueError: unknown name, or a bound or target out of range.
    """
    if isinstance(policy, ClipPolicy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"unknown clip_policy {policy!r}: choose one of {', '.join(sorted(POLICIES))}")
    if policy == "percentile":
        window = 20 if expected_batch_size is not None and expected_batch_size < 128 else 10
        return PercentilePolicy(max_grad_norm, target_clip_rate=target_clip_rate, window=window)
    if policy == "geometric":
        return GeometricPolicy(max_grad_norm, target_clip_rate=target_clip_rate)
    if policy == "raw_percentile":
        return RawPercentilePolicy(max_grad_norm, target_clip_rate=target_clip_rate)
    return POLICIES[policy](max_grad_norm)


def paper_policy(name: str, max_grad_norm: float, expected_batch_size: float) -> ClipPolicy:
    """Return the percentile rule with the published constants, private ("percentile") or as printed.

    References:
        arXiv 2510.05288: target clip rate 0.20, history of 1000 norms, C in [0.1, 10].
    """
    limits = {"target_clip_rate": 0.20, "min_norm": 0.1, "max_norm": 10.0}
    if name == "raw_percentile":
        return RawPercentilePolicy(max_grad_norm, history=1000, **limits)
    if name == "percentile":
        window = max(1, math.ceil(1000 / expected_batch_size))
        return PercentilePolicy(max_grad_norm, window=window, search=False, **limits)
    raise ValueError(f'preset="paper" goes with clip_policy "percentile" or "raw_percentile", not {name!r}')
