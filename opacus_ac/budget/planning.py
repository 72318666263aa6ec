"""What a plan of steps costs, and the noise that a target epsilon needs."""

from __future__ import annotations

import math
from collections import Counter

from opacus_ac.accounting import Event, calibrate_noise_multiplier
from opacus_ac.accounting.events import check_count
from opacus_ac.budget.accountants import AccountantAdapter
from opacus_ac.sampling.plan import SamplingPlan

_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6


def _planned_rates(plan: SamplingPlan, steps: int) -> list[float]:
    """Return the sample rate of every charge of planned steps; a shuffled pass is charged once, at rate 1."""
    steps = check_count(steps, "number of steps (epochs times batches in a pass)", minimum=1)
    if plan.sampling == "shuffled":
        return [1.0] * math.ceil(steps / plan.steps_per_pass)
    return [plan.sizes.rate(step) for step in range(steps)]


def planned_events(plan: SamplingPlan, steps: int, noise_multiplier: float) -> dict[Event, int]:
    """Return what ``steps`` planned steps cost: events, and how often each."""
    return dict(Counter(plan.event(noise_multiplier, rate) for rate in _planned_rates(plan, steps)))


def noise_for_target(
    accountant: AccountantAdapter, plan: SamplingPlan, *, steps: int, target_epsilon: float, target_delta: float
) -> float:
    """Return the noise multiplier with which ``steps`` steps of ``plan`` spend at most the target.

    Raises:
        ValueError: If the accountant's figure is no bound, or it cannot follow the schedule, the budget is impossible,
            or there are no steps.
    """
    if accountant.approximation is not None:
        raise ValueError(
            f"{accountant.approximation}: no target can be kept by it. "
            'Use accountant="vrdp", or "prv" for a tight bound'
        )
    if plan.sizes.is_function and not accountant.is_filter:
        raise ValueError(
            "batch_size_schedule as a function may depend on past releases, and with a target epsilon only "
            "accountant='vrdp' is a privacy filter: use it, or give a sequence"
        )
    rates = _planned_rates(plan, steps)
    constant = min(rates) == max(rates)
    if accountant.calibration is not None:
        return calibrate_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=rates[0] if constant else rates,
            steps=len(rates),
            sampling="poisson" if plan.sampling == "shuffled" else plan.sampling,
            dataset_size=plan.sizes.dataset_size if plan.max_batch_size is not None else None,
            max_batch_size=plan.max_batch_size,
            method=accountant.calibration,
        )
    if not constant:
        raise ValueError("batch_size_schedule with a target epsilon needs accountant='vrdp' or 'vpld'")
    guess = 1.0
    if accountant.noise == "gaussian":
        guess = calibrate_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=rates[0],
            steps=len(rates),
            method="pld",
        )
    return _least_noise(accountant, rates[0], len(rates), target_epsilon, target_delta, guess)


def _least_noise(
    accountant: AccountantAdapter, rate: float, steps: int, epsilon: float, delta: float, guess: float
) -> float:
    """Return the smallest noise multiplier, up to 0.2 %, whose plan costs at most ``epsilon`` by the accountant's rule.

    Args:
        accountant: its kind counts, not its history.
        rate: sample rate of every step.
        steps: number of steps.
        epsilon: target epsilon.
        delta: target delta.
        guess: where to look first, usually a little too small.

    Raises:
        ValueError: If there is none up to a million.
    """

    def fits(noise: float) -> bool:
        return accountant.epsilon_of([(noise, rate, steps)], delta) <= epsilon

    low, high, step = guess / 1.002, guess, 1.005
    while not fits(high):
        if high > _MOST_NOISE:
            raise ValueError(f"no noise keeps epsilon within {epsilon!r} at delta {delta!r}: allow a larger budget")
        low, high, step = high, high * step, step * step
    while high == guess and low > _LEAST_NOISE and fits(low):
        guess, low, high, step = low, low / step, low, step * step
    while high > low * (1 + 2e-3):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
