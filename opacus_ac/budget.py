"""The privacy budget: how much noise a target needs, and the guard that stops before it is exceeded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from opacus.accountants import IAccountant

from opacus_ac.accounting import (
    DEFAULT_ORDERS,
    Event,
    PureDPAccountant,
    RenyiFilter,
    VariableRateRDPAccountant,
    calibrate_noise_multiplier,
    epsilon_from_rdp,
    roomiest_order,
)
from opacus_ac.accounting.events import check_count, check_delta
from opacus_ac.accounting.opacus_accountants import CheckedGDPAccountant
from opacus_ac.charges import Limit
from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.sampling import SamplingPlan

_TOLERANCE = 1 + 1e-9
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6


def spent(accountant: IAccountant, delta: float) -> float:
    """Return the epsilon spent so far, by the accountant's own rule; infinity when no bound holds (noise multiplier 0).

    Raises:
        ValueError: ``delta`` is negative.
    """
    delta = check_delta(delta)
    if delta < 1 and any(sigma == 0 and rate > 0 for sigma, rate, _ in accountant.history):
        return math.inf
    epsilon = float(accountant.get_epsilon(delta)) if len(accountant) else 0.0
    return math.inf if math.isnan(epsilon) else max(epsilon, 0.0)


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
        after = self._after(event)
        raise PrivacyBudgetExceeded(
            f"the next step would reach epsilon {after:.4f} and exceed the target {self.epsilon:g} at delta {self.delta:g}; "
            "it was not taken and nothing of it was released"
        )

    def _after(self, event: Event) -> float:
        """Return the epsilon that the guard would have seen after one more event, by its own rule."""
        if isinstance(self.accountant, VariableRateRDPAccountant) and self._filter is not None:
            divergence = self.accountant.spent_rdp(self._filter.order) + self._filter.cost(event)
            return epsilon_from_rdp([divergence], [self._filter.order], self.delta)[0]
        return epsilon_after(self.accountant, event, self.delta, 1)

    @property
    def is_filter(self) -> bool:
        """Whether rates, noise and stopping may depend on releases."""
        return self._filter is not None

    @property
    def limit(self) -> Limit | None:
        """Order and budget of the filter; None where the guard is none."""
        return None if self._filter is None else Limit(self._filter.order, self._filter.budget)

    def use_order(self, order: float) -> None:
        """Go on at the order of the filters that earlier charges went through: orders must not be chosen from releases.

        Raises:
            PrivacyBudgetExceeded: at that order the target leaves no room.
        """
        if self._filter is None or self._filter.order == order:
            return
        try:
            self._filter = RenyiFilter(order, self.epsilon, self.delta)
        except ValueError as error:
            raise PrivacyBudgetExceeded(
                f"earlier charges went through a privacy filter at Renyi order {order:g}, at which a target of {self.epsilon:g} at "
                f"delta {self.delta:g} leaves no room; the step was not taken and nothing of it was released"
            ) from error

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
    steps = check_count(steps, "number of steps (epochs times batches in a pass)", minimum=1)
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
        ValueError: a schedule with an accountant that cannot follow it; an impossible budget; no steps; an accountant that
            is an approximation.
    """
    if isinstance(accountant, CheckedGDPAccountant):
        raise ValueError(
            'accountant="gdp" is an approximation by the central limit theorem, which can lie far below the truth: no target '
            'can be kept by it. Use accountant="vrdp", or "prv" for a tight bound'
        )
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
    guess = 1.0
    if not isinstance(accountant, PureDPAccountant):
        guess = calibrate_noise_multiplier(
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            sample_rate=rates[0],
            steps=len(rates),
            method="pld",
        )
    return _least_noise(accountant, [(rates[0], len(rates))], target_epsilon, target_delta, guess)


def _least_noise(
    accountant: IAccountant, plan: list[tuple[float, int]], epsilon: float, delta: float, guess: float
) -> float:
    """Return the smallest noise multiplier, up to 0.2 %, with which a plan costs at most ``epsilon`` by the accountant's rule.

    Args:
        accountant: its kind counts, not its history.
        plan: rates, and how many steps at each.
        epsilon: target epsilon.
        delta: target delta.
        guess: where to look first, usually a little too small.

    Raises:
        ValueError: there is none up to a million.
    """

    def fits(noise: float) -> bool:
        probe = type(accountant)()
        probe.history = [(noise, rate, steps) for rate, steps in plan]
        return spent(probe, delta) <= epsilon

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
