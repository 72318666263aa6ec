"""The guard of a target budget, which refuses the step that would exceed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from opacus_ac.accounting import DEFAULT_ORDERS, Event, RenyiFilter, epsilon_from_rdp, roomiest_order
from opacus_ac.budget.accountants import AccountantAdapter
from opacus_ac.budget.charges import Limit
from opacus_ac.errors import PrivacyBudgetExceeded

_TOLERANCE = 1 + 1e-9


class BudgetGuard:
    """Refuses the step that would exceed a target (epsilon, delta).

    Args:
        accountant: the engine's accountant.
        epsilon: target epsilon.
        delta: target delta.
        planned: events of the planned run, and how often each; the run may depart from them.
        stated_after: returns an epsilon that would have to be stated, whatever the accountant says, after more of an
            event: what the report says of the run must stay within the target too.

    Guarantees:
        With the accountant "vrdp" the guard is a privacy filter at one Rényi order, preset from the plan: rates and
        noise of later steps, and the time of stopping, may depend on earlier releases. Other bounds are no filters, and
        with them the noise must stay what was planned.

    References:
        Feldman and Zrnic 2021 (arXiv 2008.11193), theorem 4.3.
    """

    def __init__(
        self,
        accountant: AccountantAdapter,
        epsilon: float,
        delta: float,
        planned: Mapping[Event, int],
        stated_after: Callable[[Event, int], float],
    ) -> None:
        self.accountant, self.epsilon, self.delta = accountant, epsilon, delta
        self._stated_after = stated_after
        self._noises = {event.noise_multiplier for event in planned}
        self._filter = _preset_filter(accountant, epsilon, delta, planned)

    def check(self, event: Event) -> None:
        """Raise when ``event`` does not fit any more; change nothing.

        Raises:
            PrivacyBudgetExceeded: If it would exceed the target.
            ValueError: If its noise is another than planned, and the accountant is no filter.
        """
        if self._fits(event, 1):
            return
        after = self._after(event)
        raise PrivacyBudgetExceeded(
            f"the next step would reach epsilon {after:.4f} and exceed the target {self.epsilon:g} at delta "
            f"{self.delta:g}; it was not taken and nothing of it was released"
        )

    def _after(self, event: Event) -> float:
        """Return epsilon after one more event, by the rules of this guard."""
        stated = self._stated_after(event, 1)
        if self._filter is not None:
            divergence = self.accountant.spent_rdp(self._filter.order) + self._filter.cost(event)
            return max(stated, epsilon_from_rdp([divergence], [self._filter.order], self.delta)[0])
        return max(stated, self.accountant.epsilon_after(event, self.delta, 1))

    @property
    def is_filter(self) -> bool:
        """Whether rates, noise and stopping may depend on releases."""
        return self._filter is not None

    @property
    def limit(self) -> Limit | None:
        """Order and budget of the filter; None where the guard is none."""
        return None if self._filter is None else Limit(self._filter.order, self._filter.budget)

    def use_order(self, order: float) -> None:
        """Set the filter to the order of earlier filters: orders must not be chosen from releases.

        Raises:
            PrivacyBudgetExceeded: If the target leaves no room at that order.
        """
        if self._filter is None or self._filter.order == order:
            return
        try:
            self._filter = RenyiFilter(order, self.epsilon, self.delta)
        except ValueError as error:
            raise PrivacyBudgetExceeded(
                f"earlier charges went through a privacy filter at Renyi order {order:g}, at which a target of "
                f"{self.epsilon:g} at delta {self.delta:g} leaves no room; the step was not taken and nothing of it "
                "was released"
            ) from error

    def _fits(self, event: Event, steps: int) -> bool:
        most = self.epsilon * _TOLERANCE
        if self._filter is not None:
            fits = self._filter.fits(self.accountant.spent_rdp(self._filter.order), event, steps)
            return fits and self._stated_after(event, steps) <= most
        if event.noise_multiplier not in self._noises:
            raise ValueError(
                f"noise_multiplier changed to {event.noise_multiplier:g} during a run with a target epsilon: the "
                f'accountant {self.accountant.name!r} is no privacy filter. Use PrivacyEngine(accountant="vrdp")'
            )
        return self._stated_after(event, steps) <= most and (
            self.accountant.epsilon_after(event, self.delta, steps) <= most
        )

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
    accountant: AccountantAdapter, epsilon: float, delta: float, planned: Mapping[Event, int]
) -> RenyiFilter | None:
    """Return the filter at the order that leaves the most room for the plan after what was spent; None without one."""
    if not accountant.is_filter:
        return None
    spent_before = [accountant.spent_rdp(order) for order in DEFAULT_ORDERS]
    return RenyiFilter(roomiest_order(planned, epsilon, delta, spent_before), epsilon, delta)
