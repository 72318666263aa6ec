"""The privacy budget: how much noise a target needs, and the guard that stops before it is exceeded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from opacus.accountants import IAccountant
from opacus.accountants.utils import get_noise_multiplier

from opacus_ac.accounting import (
    DEFAULT_ORDERS,
    Event,
    RenyiFilter,
    VariableRateRDPAccountant,
    calibrate_noise_multiplier,
    epsilon_from_rdp,
    roomiest_order,
)
from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.sampling import SamplingPlan

_TOLERANCE = 1 + 1e-9


def spent(accountant: IAccountant, delta: float) -> float:
    """Return the epsilon spent so far; infinity when a step was taken without a bound (noise multiplier 0)."""
    history = accountant.history
    if any(sigma == 0 and rate > 0 for sigma, rate, _ in history):
        return math.inf
    return float(accountant.get_epsilon(delta)) if len(accountant) else 0.0


def epsilon_after(accountant: IAccountant, event: Event, delta: float, steps: int) -> float:
    """Return epsilon after ``steps`` more of ``event``, without taking them."""
    if isinstance(accountant, VariableRateRDPAccountant):
        return accountant.epsilon_after(event, delta, steps=steps)
    probe = type(accountant)()
    probe.history = [*accountant.history, (event.noise_multiplier, event.sample_rate, steps)]
    return spent(probe, delta)


class BudgetGuard:
    """Refuses the step that would exceed a target (epsilon, delta).

    Args:
        accountant: the engine's accountant.
        epsilon: target epsilon.
        delta: target delta.
        planned: events of the planned run, and how often each; the run may depart from them.

    Guarantees:
        With the accountant "vrdp" the guard is a privacy filter at one Renyi order, preset from the plan: rates and noise of
        later steps, and the time of stopping, may depend on earlier releases. Other bounds are no filters; there the noise
        must stay what was planned.

    References:
        Feldman and Zrnic 2021 (arXiv 2008.11193), theorem 4.3.
    """

    def __init__(self, accountant: IAccountant, epsilon: float, delta: float, planned: Mapping[Event, int]) -> None:
        self.accountant, self.epsilon, self.delta = accountant, epsilon, delta
        self._noises = {event.noise_multiplier for event in planned}
        self._filter = _preset_filter(accountant, epsilon, delta, planned)

    def check(self, event: Event) -> None:
        """Raise when ``event`` does not fit any more; change nothing.

        Raises:
            PrivacyBudgetExceeded: it would exceed the target.
            ValueError: its noise is another than planned, and the accountant is no filter.
        """
        if self._fits(event, 1):
            return
        after = epsilon_after(self.accountant, event, self.delta, 1)
        raise PrivacyBudgetExceeded(
            f"the next step would reach epsilon {after:.4f} and exceed the target {self.epsilon:g} at delta {self.delta:g}; "
            "it was not taken and nothing of it was released"
        )

    @property
    def is_filter(self) -> bool:
        """Whether rates, noise and stopping may depend on releases."""
        return self._filter is not None

    def bound(self, delta: float) -> float:
        """Return the epsilon that the whole budget of the filter stands for at ``delta``; the target at its own delta."""
        assert self._filter is not None
        return epsilon_from_rdp([self._filter.budget], [self._filter.order], delta)[0]

    def _fits(self, event: Event, steps: int) -> bool:
        if isinstance(self.accountant, VariableRateRDPAccountant) and self._filter is not None:
            return self._filter.fits(self.accountant.spent_rdp(self._filter.order), event, steps)
        if event.noise_multiplier not in self._noises:
            raise ValueError(
                f"noise_multiplier changed to {event.noise_multiplier:g} during a run with a target epsilon: the accountant "
                f'{self.accountant.mechanism()!r} is no privacy filter. Use PrivacyEngine(accountant="vrdp")'
            )
        return epsilon_after(self.accountant, event, self.delta, steps) <= self.epsilon * _TOLERANCE

    def remaining(self, event: Event) -> int:
        """Return how many more of ``event`` fit."""
        high = 1
        while self._fits(event, high) and high < 1 << 40:
            high *= 2
        low = high // 2  # fits, or is 0
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(event, middle) else (low, middle)
        return low


def _preset_filter(
    accountant: IAccountant, epsilon: float, delta: float, planned: Mapping[Event, int]
) -> RenyiFilter | None:
    """Return the filter at the order that leaves the most room for the plan after what was spent; None without one."""
    if type(accountant) is not VariableRateRDPAccountant:
        return None
    spent_before = [accountant.spent_rdp(order) for order in DEFAULT_ORDERS]
    return RenyiFilter(roomiest_order(planned, epsilon, delta, spent_before), epsilon, delta)


def _planned_rates(plan: SamplingPlan, steps: int) -> list[float]:
    """Return the sample rate of every charge of ``steps`` planned steps; shuffled passes are charged once, at rate 1."""
    if plan.sampling == "shuffled":
        return [1.0] * math.ceil(steps / plan.steps_per_pass)
    return [plan.sizes.rate(step) for step in range(steps)]


def planned_events(plan: SamplingPlan, steps: int, noise_multiplier: float) -> dict[Event, int]:
    """Return what ``steps`` planned steps cost: events, and how often each."""
    return dict(Counter(plan.event(noise_multiplier, rate) for rate in _planned_rates(plan, steps)))


def noise_for_target(
    accountant: IAccountant, plan: SamplingPlan, *, steps: int, target_epsilon: float, target_delta: float
) -> float:
    """Return the noise multiplier with which ``steps`` steps of ``plan`` spend at most the target.

    Raises:
        ValueError: a schedule with an accountant that cannot follow it; an impossible budget.
    """
    filters = type(accountant) is VariableRateRDPAccountant
    if plan.sizes.is_function and not filters:
        raise ValueError(
            "batch_size_schedule as a function may depend on past releases, and with a target epsilon only accountant='vrdp' "
            "is a privacy filter: use it, or give a sequence"
        )
    rates = _planned_rates(plan, steps)
    constant = min(rates) == max(rates)
    if isinstance(accountant, VariableRateRDPAccountant):
        return calibrate_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=rates[0] if constant else rates,
            steps=len(rates),
            sampling="poisson" if plan.sampling == "shuffled" else plan.sampling,
            dataset_size=plan.sizes.dataset_size if plan.max_batch_size is not None else None,
            max_batch_size=plan.max_batch_size,
            method="rdp" if filters else "pld",
        )
    if not constant:
        raise ValueError("batch_size_schedule with a target epsilon needs accountant='vrdp' or 'vpld'")
    return float(
        get_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=rates[0],
            steps=len(rates),
            accountant=accountant.mechanism(),
        )
    )
