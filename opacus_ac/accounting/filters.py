"""A privacy filter: which further event fits a budget, when events may be chosen from past releases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from opacus_ac._validate import positive
from opacus_ac.accounting.divergence import rdp_event
from opacus_ac.accounting.events import Event, check_count, check_delta
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, FloatArray, epsilon_from_rdp
from opacus_ac.accounting.rdp_table import RDPTable

_SLACK = 1e-12  # relative; a plan that uses its budget up to rounding fits


class RenyiFilter:
    """Says whether an event fits a Rényi budget at one preset order.

    Args:
        order: Rényi order, above 1, chosen before the run (see ``best_order``).
        epsilon: total epsilon, positive.
        delta: total delta, in (0, 1).

    Guarantees:
        If every event was accepted by ``fits`` before its release, the run is (epsilon, delta)-differentially private,
        even if each event (rate, noise multiplier, kind) and the time of stopping were chosen from earlier releases.
        This needs the single preset order: the smallest epsilon over several orders, chosen afterwards, is no filter.

    Raises:
        ValueError: If an argument is out of range, or the conversion alone costs more than epsilon.

    References:
        arXiv 2008.11193 (theorem 4.3), 2103.01379 (filters); 1905.09982 theorem 21 (conversion).

    >>> limit = RenyiFilter(order=7.8, epsilon=2.2, delta=1e-5)
    >>> limit.remaining(0.0, Event(1.0, 0.01))
    1116
    """

    def __init__(self, order: float, epsilon: float, delta: float) -> None:
        self.order, self.epsilon, self.delta = float(order), float(epsilon), check_delta(delta)
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"delta={delta!r} must be in (0, 1), usually below 1 / number of records")
        positive(epsilon=self.epsilon)
        rdp_event(Event(1.0, 0.0), [self.order])  # checks the order
        #: Rényi divergence that may be spent, in nats.
        self.budget = self.epsilon - _conversion(self.order, self.delta)
        self._costs: dict[Event, float] = {}
        if self.budget <= 0.0:
            raise ValueError(
                f"order={order!r} spends all of epsilon={epsilon!r} at delta={delta!r} on the conversion; preset a "
                "larger order (see best_order) or allow a larger epsilon"
            )

    def cost(self, event: Event) -> float:
        """Return the Rényi divergence of one event at the preset order, in nats."""
        cost = self._costs.get(event)
        if cost is None:
            if len(self._costs) >= 4096:
                self._costs.clear()
            cost = self._costs[event] = float(rdp_event(event, [self.order])[0])
        return cost

    def fits(self, spent: float, event: Event, steps: int = 1) -> bool:
        """Return whether the budget allows more events after ``spent``.

        Args:
            spent: divergence at the preset order so far, ``accountant.spent_rdp(filter.order)``.
            event: the event to come.
            steps: how many such events.

        Raises:
            ValueError: If ``spent`` is negative or NaN, or ``steps`` is no count.
        """
        count = check_count(steps, "steps")
        if not spent >= 0.0:
            raise ValueError(f"spent={spent!r} must be >= 0: a Rényi divergence, accountant.spent_rdp(order)")
        return spent + (count * self.cost(event) if count else 0.0) <= self.budget * (1.0 + _SLACK)

    def remaining(self, spent: float, event: Event) -> float:
        """Return how many more such events fit: a whole number, or ``inf`` for events that cost nothing."""
        if not self.fits(spent, event, 0):
            return 0
        cost = self.cost(event)
        if cost == 0.0:
            return math.inf
        steps = int((self.budget * (1.0 + _SLACK) - spent) / cost)
        while steps and not self.fits(spent, event, steps):
            steps -= 1
        return steps


def best_order(counts: Mapping[Event, int], delta: float) -> float:
    """Return the Rényi order to preset for a plan: the one that gives the plan its smallest epsilon.

    Args:
        counts: planned events and how often each.
        delta: total delta, in (0, 1).

    Returns:
        One of ``DEFAULT_ORDERS``, for which ``VariableRateRDPAccountant.spent_rdp`` costs nothing.

    Raises:
        ValueError: If the plan is empty or costs nothing, or an argument is out of range.

    >>> best_order({Event(1.0, 0.01): 1000}, delta=1e-5)
    7.8
    """
    table = RDPTable(DEFAULT_ORDERS)
    rdp = np.zeros_like(table.orders)
    for event, count in counts.items():
        rdp += check_count(count, f"counts[{event}]") * table.event_row(event)
    if not rdp.any():
        raise ValueError("counts is a plan that costs nothing: no order is better than another")
    return epsilon_from_rdp(rdp, table.orders, delta)[1]


def roomiest_order(
    planned: Mapping[Event, int], epsilon: float, delta: float, spent: Sequence[float] | FloatArray | None = None
) -> float:
    """Return the Rényi order at which a budget holds the most repetitions of a plan, after what was spent before.

    Args:
        planned: planned events and how often each.
        epsilon: total epsilon.
        delta: total delta, in (0, 1).
        spent: divergence spent before the plan at each of ``DEFAULT_ORDERS``, [n]; nothing by default.

    Returns:
        One of ``DEFAULT_ORDERS`` whose conversion leaves room within epsilon, to preset in :class:`RenyiFilter`.

    Raises:
        ValueError: If the plan costs nothing, or the conversion alone costs more than epsilon at every order.

    >>> roomiest_order({Event(1.0, 0.01): 1000}, epsilon=2.2, delta=1e-5)
    7.7
    """
    table = RDPTable(DEFAULT_ORDERS)
    cost = np.zeros_like(table.orders)
    for event, count in planned.items():
        cost += check_count(count, f"planned[{event}]") * table.event_row(event)
    if not cost.any():
        raise ValueError("the plan costs nothing: no order is better than another")
    budget = epsilon - np.array([_conversion(float(order), delta) for order in table.orders])
    if not (budget > 0.0).any():
        raise ValueError(f"epsilon={epsilon!r} is spent by the conversion alone at delta={delta!r}: allow a larger one")
    left = budget - (0.0 if spent is None else np.asarray(spent, dtype=np.float64))
    room = np.where(budget > 0.0, left / cost, -np.inf)
    return float(table.orders[int(np.argmax(room))])


def _conversion(order: float, delta: float) -> float:
    """Return what the conversion to epsilon adds to a divergence."""
    return math.log1p(-1.0 / order) - (math.log(delta) + math.log(order)) / (order - 1.0)
