"""What to say of the settings of a run before it spends anything: a weak promise, or noise that drowns the data."""

from __future__ import annotations

import math

MOST_EPSILON = 20.0
"""Epsilon beyond which a promise is next to none: e^20 is 485 million."""
_LARGE_DELTA = 1e-2
MOST_NOISE = 0.2
"""Share of what the expected batch can add up to, beyond which the noise of a step leaves little to learn."""


def weak_promise(epsilon: float | None, delta: float, records: int | None) -> list[str]:
    """Return what is wrong with a promise of (epsilon, delta), each with a remedy.

    Args:
        epsilon: target epsilon; None if the run has none.
        delta: delta.
        records: N, the number of records; None where it is not known.

    >>> weak_promise(8.0, 1e-5, 1000)
    []
    >>> print(*weak_promise(8.0, 0.1, 160))
    delta 0.1 is not below 1/N = 0.00625: such a promise allows publishing whole records. Choose 0.0006 or less
    """
    found = []
    if records is None and delta > _LARGE_DELTA:
        found.append(f"delta {delta:g} is the share of cases in which nothing is promised: choose it well below 1/N")
    if records is not None and delta * records >= 1:
        found.append(
            f"delta {delta:g} is not below 1/N = {1 / records:.3g}: such a promise allows publishing whole records. "
            f"Choose {_rounded_down(0.1 / records):g} or less"
        )
    if epsilon is not None and epsilon > MOST_EPSILON:
        odds = f"{math.exp(epsilon):.1g}" if epsilon < 700 else f"e^{epsilon:g}"
        found.append(
            f"epsilon {epsilon:g} promises next to nothing: what is published may change the odds that a record was "
            f"used by a factor of {odds}. Usual values lie between 1 and 10"
        )
    return found


def drowned(noise_multiplier: float, expected_batch_size: float, records: int) -> list[str]:
    """Return what to say of a run whose noise is large beside its data, with remedies; nothing for other runs.

    Args:
        noise_multiplier: ratio of the noise of a step to what one record can add.
        expected_batch_size: expected number of records in a step.
        records: N, the number of records.

    >>> drowned(0.7, 64, 10_000)
    []
    >>> drowned(1.5, 2, 3)[0].split(":")[0]
    'the noise of a step is 75 % of what its 2 records can add up to, so the run will hardly learn'
    """
    share = noise_multiplier / expected_batch_size if expected_batch_size > 0 else math.inf
    if share <= MOST_NOISE:
        return []
    return [
        f"the noise of a step is {100 * share:.0f} % of what its {expected_batch_size:g} records can add up to, so the "
        f"run will hardly learn: use larger batches, more than {records} records, fewer steps or a larger epsilon"
    ]


def _rounded_down(value: float) -> float:
    """Return a positive value rounded down to one digit."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.floor(value / unit) * unit
