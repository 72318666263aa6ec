"""The noise of an audited run, ``[T, D]`` for each tensor: its spread, and its independence of other noise."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy import special, stats

from opacus_ac.audit.bounds import std_interval
from opacus_ac.audit.result import Finding
from opacus_ac.release.values import FloatArray

LAGS = 32
"""Steps back to which noise is compared tensor by tensor; single pairs of steps are compared at any distance."""


def normal_p_value(z: float) -> float:
    """Return the two-sided p-value of a standard normal ``z``.

    >>> round(normal_p_value(-1.96), 3)
    0.05
    """
    return float(2 * special.ndtr(-abs(z)))


def lagged(noise: FloatArray, lag: int) -> float:
    """Return the correlation of noise ``[T, D]`` with that of ``lag`` steps before, in units of its own std.

    Entries that were not seen are NaN. For independent entries this is nearly N(0, 1): a sum of uncorrelated products.
    """
    return _in_stds(noise[lag:] * noise[:-lag])


def shifted(noise: FloatArray, shift: int) -> float:
    """Return the autocorrelation of noise ``[T, D]`` at a lag of ``shift`` entries within a step.

    It is in units of its own std.
    """
    return _in_stds(noise[:, shift:] * noise[:, :-shift])


def _in_stds(products: FloatArray) -> float:
    seen = products[np.isfinite(products)]
    return float(seen.sum()) / math.sqrt(max(seen.size, 1))


def closest_steps(noise: FloatArray) -> tuple[float, int, int]:
    """Return (p-value, step, other step) of the two steps of ``[T, D]`` whose noise is most alike, or most opposite.

    The squared cosine of two independent Gaussian vectors is Beta(1/2, (D - 1)/2), whatever their length. The p-value
    is that of the largest of all T (T - 1) / 2 squared cosines.
    """
    values = noise[:, np.isfinite(noise).all(0)]
    steps, width = values.shape
    if steps < 2 or width < 2:
        return 1.0, 0, 0
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    cosines = np.abs(np.triu((values @ values.T) / np.maximum(lengths * lengths.T, 1e-300), 1))
    first, second = np.unravel_index(int(cosines.argmax()), cosines.shape)
    largest = min(float(cosines[first, second]), 1.0)
    p_value = float(stats.beta.sf(largest**2, 0.5, (width - 1) / 2)) * steps * (steps - 1) / 2
    return min(1.0, p_value), int(first), int(second)


def independence_findings(noise: dict[str, FloatArray], alpha: float) -> tuple[Finding, ...]:
    """Return the findings about the noise of each tensor, ``{name: [T, D]}`` in units of its claimed std.

    Each finding may be wrong with probability ``alpha``. Within a finding, the p-value is the smallest one times the
    number of tests (Bonferroni).
    """
    steps = len(next(iter(noise.values())))
    whole = np.concatenate(list(noise.values()), axis=1)
    lags = range(1, min(LAGS, steps - 1) + 1)
    over_steps = {
        f"{name} and itself {lag} before": lagged(values, lag)
        for name, values in ({**noise, "all tensors": whole}).items()
        for lag in lags
    }
    within = {f"entries {shift} apart": shifted(whole, shift) for shift in range(1, whole.shape[1])}
    pairs = {name: closest_steps(values) for name, values in noise.items()}
    nearest = min(pairs, key=lambda name: pairs[name][0])
    p_value, first, second = pairs[nearest]
    p_value = min(1.0, p_value * len(pairs))
    return (
        _extreme("noise at lags", f"no correlation over 1 to {len(lags)} steps", over_steps, alpha),
        Finding(
            "noise of any two steps",
            "no two alike, or opposite",
            f"p = {p_value:.2g} for steps {first + 1} and {second + 1} of {nearest}",
            p_value < alpha,
            p_value=p_value,
        ),
        _extreme("noise within a step", "no correlation of its entries", within, alpha),
    )


def _extreme(check: str, claim: str, found: dict[str, float], alpha: float) -> Finding:
    """Return the finding of the largest of many standard normal statistics."""
    worst = max(found, key=lambda name: abs(found[name]))
    p_value = min(1.0, normal_p_value(found[worst]) * len(found))
    shown = f"{found[worst]:+.2f} std, the worst of {len(found)}, for {worst} (p = {p_value:.2g})"
    return Finding(check, claim, shown, p_value < alpha, statistic=found[worst], p_value=p_value)


def spread_finding(noise: dict[str, FloatArray], alpha: float) -> Finding:
    """Return whether every tensor got the noise that the step says, no less and nothing beside it."""
    return std_finding(
        {name: (float(np.nansum(values**2)), int(np.isfinite(values).sum())) for name, values in noise.items()}, alpha
    )


def std_finding(squares: Mapping[str, tuple[float, int]], alpha: float) -> Finding:
    """Return whether the noise of every tensor has the claimed std.

    Args:
        squares: the sum of the squares of each tensor's noise, in units of its claimed std, and how many were added up.
        alpha: probability that correct noise is refuted.
    """
    intervals = {name: std_interval(total, entries, alpha / len(squares)) for name, (total, entries) in squares.items()}

    def distance(name: str) -> float:
        low, high = intervals[name]
        return max(math.log(low), -math.log(high)) if low > 0 and math.isfinite(high) else math.inf

    worst = max(intervals, key=distance)
    low, high = intervals[worst]
    return Finding(
        "noise of every tensor",
        "std 1 (in units of z_g C), the sum being exact",
        f"std in [{low:.3f}, {high:.3f}] for {worst}, the worst of {len(intervals)}",
        not low <= 1 <= high,
    )
