"""From a budget to a noise multiplier, and back, for constant rates and for schedules of rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

from opacus_ac._validate import positive
from opacus_ac.accounting.divergence import rdp_pair
from opacus_ac.accounting.dominating_pairs import Component, Pair, PairRounding, dominating_pairs
from opacus_ac.accounting.events import Event, check_count, check_delta, check_noise_multiplier, check_sample_rate
from opacus_ac.accounting.pld import MAX_EXACT, PrivacyLosses
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, FloatArray, epsilon_from_rdp
from opacus_ac.accounting.rdp_table import MAX_OTHER, MAX_PLAIN

#: Where the search for a noise multiplier ends.
MIN_NOISE_MULTIPLIER = 1e-3
MAX_NOISE_MULTIPLIER = 1e6

_TOLERANCE = 1e-4
_METHODS = ("rdp", "pld")
# An accountant's grid, planned while the run grows, may be a little coarser than the plan's.
_GRID_MARGIN = 1e-3

Counts = dict[tuple[tuple[Component, ...], ...], int]  # components of each dominating pair -> steps


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float | Sequence[float],
    steps: int | None = None,
    tolerance: float = _TOLERANCE,
    sampling: str = "poisson",
    dataset_size: int | None = None,
    max_batch_size: int | None = None,
    method: str = "rdp",
) -> float:
    """Return the smallest noise multiplier with which the planned steps stay within a privacy budget.

    Args:
        target_epsilon: epsilon not to be exceeded.
        target_delta: its delta, in (0, 1).
        sample_rate: the rate of every step, or one rate per step. For shuffled passes give 1.0 and as many steps as
            passes.
        steps: number of steps; may be left out when ``sample_rate`` is a sequence, and must be its length otherwise.
        tolerance: relative precision of the result, from above.
        sampling: kind of every step (see ``Event``).
        dataset_size: number of records, for ``sampling="truncated_poisson"``.
        max_batch_size: largest batch, for ``sampling="truncated_poisson"``.
        method: ``"rdp"`` or ``"pld"`` (less noise; the epsilon of ``VariableRatePLDAccountant``).

    Returns:
        The noise multiplier; ``MIN_NOISE_MULTIPLIER`` if even that little noise is within the budget.

    Guarantees:
        ``VariableRateRDPAccountant`` reports at most ``target_epsilon`` for these steps, never more; with
        ``method="pld"``, ``pld_epsilon`` does, and ``VariableRatePLDAccountant``, for whose grid 0.1 % is kept.

    Raises:
        ValueError: If an argument is out of range, or no noise multiplier up to 1e6 suffices.

    >>> sigma = calibrate_noise_multiplier(target_epsilon=4.0, target_delta=1e-5, sample_rate=0.01, steps=1000)
    >>> round(sigma, 2)
    0.78
    """
    target = positive(target_epsilon=target_epsilon)
    delta = check_delta(target_delta)
    if not 0.0 < delta < 1.0:
        raise ValueError(f"target_delta={target_delta!r} must be in (0, 1), usually below 1 / number of records")
    precision = positive(tolerance=tolerance)
    plan = _Plan(sample_rate, steps, sampling, dataset_size, max_batch_size)
    check_method(method)
    limit = max(precision, 1e-12)
    if method == "rdp":
        return _smallest_noise(lambda noise: _excess(plan.epsilon(noise, delta), target), limit)
    target *= 1.0 - _GRID_MARGIN
    # Each answer is an upper end for the next, costlier plan: Rényi, few rates, all rates.
    start = _smallest_noise(lambda noise: _excess(plan.epsilon(noise, delta), target), 1e-2)
    if plan.many_rates:
        coarse = partial(plan.pld_epsilon, delta=delta, coarse=True)
        start = _smallest_noise(lambda noise: _excess(coarse(noise), target), 1e-3, start, 1.2)
    closeness = 1.02 if plan.many_rates else 1.2
    return _smallest_noise(lambda noise: _excess(plan.pld_epsilon(noise, delta), target), limit, start, closeness)


def plan_epsilon(
    noise_multiplier: float,
    sample_rate: float | Sequence[float],
    steps: int | None,
    delta: float,
    *,
    sampling: str = "poisson",
    dataset_size: int | None = None,
    max_batch_size: int | None = None,
    method: str = "rdp",
) -> float:
    """Return the epsilon that the accountant will report after the planned steps.

    Args:
        noise_multiplier: the noise multiplier of every step.
        sample_rate: the rate of every step, or one rate per step.
        steps: number of steps; may be None when ``sample_rate`` is a sequence.
        delta: target delta.
        sampling: kind of every step (see ``Event``).
        dataset_size: number of records, for ``sampling="truncated_poisson"``.
        max_batch_size: largest batch, for ``sampling="truncated_poisson"``.
        method: ``"rdp"`` for ``VariableRateRDPAccountant``, ``"pld"`` for ``VariableRatePLDAccountant``.

    Raises:
        ValueError: If an argument is out of range.

    >>> round(plan_epsilon(1.0, 0.01, 1000, delta=1e-5), 2)
    2.1
    """
    plan = _Plan(sample_rate, steps, sampling, dataset_size, max_batch_size)
    noise, delta = check_noise_multiplier(noise_multiplier), check_delta(delta)
    return plan.epsilon(noise, delta) if check_method(method) == "rdp" else plan.pld_epsilon(noise, delta)


def check_method(method: str) -> str:
    """Return the method after a check that there is one of this name.

    Raises:
        ValueError: If it is neither "rdp" nor "pld".
    """
    if method not in _METHODS:
        raise ValueError(f"method={method!r} is unknown; use one of {sorted(_METHODS)}")
    return method


class _Plan:
    """Planned steps, rounded once as the accountants would round them (which does not depend on the noise)."""

    def __init__(
        self,
        sample_rate: float | Sequence[float],
        steps: int | None,
        sampling: str,
        records: int | None,
        limit: int | None,
    ) -> None:
        events: dict[Event, int] = {}
        for rate, count in _runs(sample_rate, steps):
            event = Event(1.0, rate, sampling, records, limit)
            events[event] = events.get(event, 0) + count
        is_plain = all(event.is_plain for event in events)
        self.many_rates = len(events) > MAX_EXACT
        self._steps = sum(events.values())
        self._renyi = _rounded(events, PairRounding(MAX_PLAIN if is_plain else MAX_OTHER))
        self._losses = _rounded(events, PairRounding(MAX_EXACT))
        self._coarse = _rounded(events, PairRounding(0, rate_step=0.1)) if self.many_rates else self._losses

    @staticmethod
    def _rdp(counts: Counts, noise: float) -> FloatArray:
        rdp = np.zeros_like(DEFAULT_ORDERS)
        for choices, count in counts.items():
            if count:
                rdp += count * np.minimum.reduce([rdp_pair(Pair(noise, parts), DEFAULT_ORDERS) for parts in choices])
        return rdp

    def epsilon(self, noise: float, delta: float) -> float:
        return epsilon_from_rdp(self._rdp(self._renyi, noise), DEFAULT_ORDERS, delta)[0]

    def pld_epsilon(self, noise: float, delta: float, *, coarse: bool = False) -> float:
        rdp = self._rdp(self._coarse if coarse else self._renyi, noise)
        bound = epsilon_from_rdp(rdp, DEFAULT_ORDERS, delta)[0]
        if not 0.0 < bound < math.inf:
            return bound
        losses = PrivacyLosses()
        for choices, count in (self._coarse if coarse else self._losses).items():
            losses.add_pairs(tuple(Pair(noise, parts) for parts in choices), count)
        return min(bound, losses.epsilon(delta, rdp, DEFAULT_ORDERS))


def _rounded(events: dict[Event, int], rounding: PairRounding) -> Counts:
    counts: Counts = {}
    for event, count in events.items():
        key = tuple(rounding.resolve(pair).components for pair in dominating_pairs(event))
        counts[key] = counts.get(key, 0) + count
    return counts


def _runs(sample_rate: Any, steps: int | None) -> Iterable[tuple[float, int]]:
    if isinstance(sample_rate, Real):
        if steps is None:
            raise ValueError("steps is missing: give the number of steps, or one sample rate per step")
        return [(check_sample_rate(sample_rate), check_count(steps, "steps"))]
    try:
        rates = [check_sample_rate(rate) for rate in sample_rate]
    except TypeError:
        raise ValueError(f"sample_rate={sample_rate!r} must be a number or a sequence of numbers") from None
    if steps is not None and check_count(steps, "steps") != len(rates):
        raise ValueError(
            f"steps={steps!r} but sample_rate has {len(rates)} entries; leave steps out or make them agree"
        )
    return [(rate, 1) for rate in rates]


def _smallest_noise(cost: Callable[[float], float], tolerance: float, start: float = 1.0, factor: float = 2.0) -> float:
    """Return the upper end of a bracket of relative width ``tolerance`` around the root of a non-increasing ``cost``.

    A row costs up to a millisecond and a schedule needs hundreds, so false position (Illinois) in log noise, where the
    cost is nearly straight, saves most of the evaluations; every third trial bisects, whatever the shape of the cost.
    """
    low, high, at_low, at_high = _bracket(cost, start, factor)
    inside = 1.0 + 0.5 * tolerance
    for trial in itertools.count():
        if high <= low * (1.0 + tolerance):
            return high
        middle = math.sqrt(low * high)
        if trial % 3 != 2 and math.isfinite(at_low) and math.isfinite(at_high):
            root = low * (high / low) ** (at_low / (at_low - at_high))
            middle = min(max(root, low * inside), high / inside)
        value = cost(middle)
        if value <= 0.0:
            high, at_high, at_low = middle, value, 0.5 * at_low
        else:
            low, at_low, at_high = middle, value, 0.5 * at_high
    raise AssertionError("unreachable")


def _bracket(cost: Callable[[float], float], start: float, factor: float) -> tuple[float, float, float, float]:
    """Return ``(low, high, cost(low), cost(high))`` with cost(low) > 0 >= cost(high), or both at the least noise."""
    low = high = start
    at_low = at_high = cost(start)
    while at_high > 0.0:
        if high >= MAX_NOISE_MULTIPLIER:
            raise ValueError(
                f"the budget target_epsilon is too low: noise_multiplier={high:g} still costs {math.exp(at_high):.3g} "
                "times as much. Take fewer steps, a smaller sample rate or a larger budget"
            )
        low, at_low = high, at_high
        high = min(factor * high, MAX_NOISE_MULTIPLIER)
        at_high = cost(high)
    while at_low <= 0.0:
        high, at_high = low, at_low
        if low <= MIN_NOISE_MULTIPLIER:
            break
        low = max(low / factor, MIN_NOISE_MULTIPLIER)
        at_low = cost(low)
    return low, high, at_low, at_high


def _excess(epsilon: float, target: float) -> float:
    """Return the log of epsilon over its target; positive means too much."""
    return math.log(epsilon / target) if 0.0 < epsilon < math.inf else (-math.inf if epsilon == 0.0 else math.inf)
