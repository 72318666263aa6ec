"""The privacy budget: how much noise a target needs, and the guard that stops before it is exceeded."""

from __future__ import annotations

import math

from opacus.accountants import IAccountant
from opacus.accountants.utils import get_noise_multiplier

from opacus_ac.accounting import Event, VariableRateRDPAccountant, calibrate_noise_multiplier
from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.sampling import SamplingPlan

_TOLERANCE = 1 + 1e-9


def spent(accountant: IAccountant, delta: float) -> float:
    """Return the epsilon spent so far; infinity when a step was taken without a bound (noise multiplier 0)."""
    history = accountant.history
    if any(sigma == 0 and rate > 0 for sigma, rate, _ in history):
        return math.inf
    return float(accountant.get_epsilon(delta)) if history else 0.0


def epsilon_after(accountant: IAccountant, event: Event, delta: float, steps: int) -> float:
    """Return epsilon after ``steps`` more of ``event``, without taking them."""
    if isinstance(accountant, VariableRateRDPAccountant):
        return accountant.epsilon_after(event, delta, steps=steps)
    probe = type(accountant)()
    probe.history = [*accountant.history, (event.noise_multiplier, event.sample_rate, steps)]
    return spent(probe, delta)


class BudgetGuard:
    """Refuses the step that would exceed a target (epsilon, delta).

    Guarantees:
        The choice of rates and noise of later steps may depend on earlier releases: stopping at a preset sum of
        Renyi divergences is a valid privacy filter (Feldman and Zrnic 2021, arXiv 2008.11193).
    """

    def __init__(self, accountant: IAccountant, epsilon: float, delta: float) -> None:
        self.accountant, self.epsilon, self.delta = accountant, epsilon, delta

    def check(self, event: Event) -> None:
        """Raise ``PrivacyBudgetExceeded`` when ``event`` does not fit any more; change nothing."""
        after = epsilon_after(self.accountant, event, self.delta, 1)
        if after > self.epsilon * _TOLERANCE:
            raise PrivacyBudgetExceeded(
                f"the next step would reach epsilon {after:.4f} > {self.epsilon:g} at delta {self.delta:g}; it was "
                "not taken and nothing of it was released"
            )

    def remaining(self, event: Event) -> int:
        """Return how many more of ``event`` fit."""

        def fits(count: int) -> bool:
            return epsilon_after(self.accountant, event, self.delta, count) <= self.epsilon * _TOLERANCE

        high = 1
        while fits(high) and high < 1 << 40:
            high *= 2
        low = high // 2  # fits, or is 0
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


def noise_for_target(
    accountant: IAccountant, plan: SamplingPlan, *, steps: int, target_epsilon: float, target_delta: float
) -> float:
    """Return the noise multiplier with which ``steps`` steps of ``plan`` spend at most the target.

    Raises:
        ValueError: a schedule with an accountant that calibrates constant rates only; an impossible budget.
    """
    rate: float | list[float] = plan.sizes.rate(0)
    if plan.sampling == "shuffled":
        # Each pass over the data is one release per record, without amplification.
        rate, steps = 1.0, math.ceil(steps / plan.steps_per_pass)
    elif plan.sizes.varies:
        rate = [plan.sizes.rate(step) for step in range(steps)]
    if isinstance(accountant, VariableRateRDPAccountant):
        return calibrate_noise_multiplier(
            target_epsilon=target_epsilon, target_delta=target_delta, sample_rate=rate, steps=steps
        )
    if isinstance(rate, list):
        raise ValueError("batch_size_schedule with a target epsilon needs accountant='vrdp'")
    return float(
        get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=rate,
            steps=steps,
            accountant=accountant.mechanism(),
        )
    )
