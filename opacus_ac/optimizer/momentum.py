"""How much momentum a private run of a known number of steps should have."""

from __future__ import annotations

LEAST, MOST = 0.5, 0.9
"""Smallest and largest beta1 of the rule."""


def run_worth(beta1: float, steps: int) -> float:
    """Return the share of its steps that a run with momentum is worth, when every gradient has the same noise.

    With Adam's first moment and unchanged denominators, the gradient of step t has in a run of T steps the weight
    ``w_t = sum_{s=t..T} (1 - beta1) beta1^(s-t) / (1 - beta1^s)``. What a run knows grows with ``sum w``, its noise
    with the root of ``sum w^2``, so it is worth ``(sum w)^2 / sum w^2`` even steps.

    Args:
        beta1: decay of the first moment.
        steps: T.
    """
    weight, total, squares = 0.0, 0.0, 0.0
    for step in range(steps, 0, -1):
        weight = (1 - beta1) / (1 - beta1**step) + beta1 * weight
        total += weight
        squares += weight * weight
    return total**2 / squares / steps


def planned_beta1(steps: int, worth: float = 0.97) -> float:
    """Return the largest beta1 between 0.5 and 0.9 with which a run is worth its steps.

    Less momentum than 0.5 lost in experiments, although the first moment would then be worth a little more.

    Args:
        steps: planned number of steps of the run, a public number.
        worth: least share of its steps that the run has to be worth (:func:`run_worth`).

    Raises:
        ValueError: If ``steps`` is below 1.

    >>> [planned_beta1(steps) for steps in (10, 30, 60, 120, 300, 1000)]
    [0.5, 0.53, 0.65, 0.76, 0.87, 0.9]
    """
    if steps < 1:
        raise ValueError(f"a run has at least one step, got steps={steps!r}")
    for hundredths in range(round(100 * MOST), round(100 * LEAST), -1):
        if run_worth(hundredths / 100, steps) >= worth:
            return hundredths / 100
    return LEAST
