"""From a budget to a noise multiplier, and back, for constant rates and for schedules of rates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

from opacus_ac.accounting.events import check_count, check_delta, check_noise_multiplier, check_sample_rate
from opacus_ac.accounting.rdp import epsilon_from_rdp
from opacus_ac.accounting.table import RDPTable

#: Where the search for a noise multiplier ends.
MIN_NOISE_MULTIPLIER = 1e-3
MAX_NOISE_MULTIPLIER = 1e6

_TOLERANCE = 1e-4


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sample_rate: float | Sequence[float],
    steps: int | None = None,
    tolerance: float = _TOLERANCE,
) -> float:
    """The smallest noise multiplier whose planned steps stay within a budget.

    Args:
        target_epsilon: epsilon not to be exceeded.
        target_delta: its delta, in (0, 1).
        sample_rate: the rate of every step, or one rate per step. For shuffled passes give 1.0 and as many steps as
            passes.
        steps: number of steps; may be left out when ``sample_rate`` is a sequence, and must be its length otherwise.
        tolerance: relative precision of the result, from above.

    Returns:
        The noise multiplier; ``MIN_NOISE_MULTIPLIER`` if even that little noise is within the budget.

    Guarantees:
        ``VariableRateRDPAccountant`` reports at most ``target_epsilon`` for these steps, never more.

    Raises:
        ValueError: If an argument is out of range, or no noise multiplier up to 1e6 suffices.

    >>> sigma = calibrate_noise_multiplier(target_epsilon=4.0, target_delta=1e-5, sample_rate=0.01, steps=1000)
    >>> round(sigma, 2)
    0.78
    """
    target = _positive(target_epsilon, "target_epsilon")
    delta = check_delta(target_delta)
    if not 0.0 < delta < 1.0:
        raise ValueError(f"target_delta={target_delta!r} must be in (0, 1), usually below 1 / number of records")
    precision = _positive(tolerance, "tolerance")
    plan = _Plan(sample_rate, steps)
    return _smallest_noise(lambda noise: _excess(plan.epsilon(noise, delta), target), max(precision, 1e-12))


def plan_epsilon(
    noise_multiplier: float, sample_rate: float | Sequence[float], steps: int | None, delta: float
) -> float:
    """Epsilon that ``VariableRateRDPAccountant`` will report after the planned steps.

    Args:
        noise_multiplier: the noise multiplier of every step.
        sample_rate: the rate of every step, or one rate per step.
        steps: number of steps; may be None when ``sample_rate`` is a sequence.
        delta: target delta.

    Raises:
        ValueError: If an argument is out of range.

    >>> round(plan_epsilon(1.0, 0.01, 1000, delta=1e-5), 2)
    2.1
    """
    return _Plan(sample_rate, steps).epsilon(check_noise_multiplier(noise_multiplier), check_delta(delta))


class _Plan:
    """The rates of planned steps, resolved once as the accountant would resolve them."""

    def __init__(self, sample_rate: float | Sequence[float], steps: int | None) -> None:
        self._counts: dict[float, int] = {}
        table = RDPTable()
        for rate, count in _runs(sample_rate, steps):
            used = table.resolve(1.0, rate)[1]  # with one noise multiplier, its value does not matter
            self._counts[used] = self._counts.get(used, 0) + count

    def epsilon(self, noise_multiplier: float, delta: float) -> float:
        table = RDPTable()
        rdp = table.total({(noise_multiplier, rate): count for rate, count in self._counts.items()})
        return epsilon_from_rdp(rdp, table.orders, delta)[0]


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


def _smallest_noise(cost: Callable[[float], float], tolerance: float) -> float:
    """The upper end of a bracket of relative width ``tolerance`` around the root of a non-increasing ``cost``.

    A row costs up to a millisecond and a schedule needs hundreds, so false position (Illinois) in log noise, where the
    cost is nearly straight, saves most of the evaluations; every third trial bisects, whatever the shape of the cost.
    """
    low, high, at_low, at_high = _bracket(cost)
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


def _bracket(cost: Callable[[float], float]) -> tuple[float, float, float, float]:
    """``(low, high, cost(low), cost(high))`` with cost(low) > 0 >= cost(high), or both at the least noise."""
    low = high = 1.0
    at_low = at_high = cost(1.0)
    while at_high > 0.0:
        if high >= MAX_NOISE_MULTIPLIER:
            raise ValueError(
                f"the budget target_epsilon is too low: noise_multiplier={high:g} still costs {math.exp(at_high):.3g} "
                "times as much. Take fewer steps, a smaller sample rate or a larger budget"
            )
        low, at_low = high, at_high
        high = min(2.0 * high, MAX_NOISE_MULTIPLIER)
        at_high = cost(high)
    while at_low <= 0.0:
        high, at_high = low, at_low
        if low <= MIN_NOISE_MULTIPLIER:
            break
        low = max(0.5 * low, MIN_NOISE_MULTIPLIER)
        at_low = cost(low)
    return low, high, at_low, at_high


def _excess(epsilon: float, target: float) -> float:
    """Log of epsilon over its target: positive means too much."""
    return math.log(epsilon / target) if 0.0 < epsilon < math.inf else (-math.inf if epsilon == 0.0 else math.inf)


def _positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 < float(value) < math.inf:
        raise ValueError(f"{name}={value!r} must be a positive finite number")
    return float(value)
