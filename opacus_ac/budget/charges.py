"""What is known of every charge beside its event, and which bounds hold for all charges together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from opacus_ac.accounting import DEFAULT_ORDERS, Event, RDPTable, epsilon_from_rdp, rdp_event
from opacus_ac.accounting.rdp import FloatArray

RECORD = "one record (a row of the dataset)"
"""The privacy unit of ordinary training: the unit by which neighbouring datasets differ."""


def privacy_unit(max_rows_per_user: int | None) -> str:
    """Return what a run protects, in words: a row of the dataset, or a user with at most so many rows."""
    if max_rows_per_user is None:
        return RECORD
    return f"one user with at most {max_rows_per_user} row{'' if max_rows_per_user == 1 else 's'}"


_RULE = (
    "the noise multiplier or the batch size changed by a rule of yours, or from run to run: epsilon holds if the rule "
    "knows the number of the step only. A rule that looks at releases needs a target budget "
    "(make_private_with_epsilon, vrdp)"
)
_UNKNOWN = (
    "some charges come from a file, or an accountant, that does not say whether their rates and noise followed from "
    "releases: it is taken as if they had, and epsilon holds if they had not"
)
_SEVERAL = (
    "charges whose rates or noise followed from releases went through filters at several Renyi orders, which have no "
    "common bound: epsilon holds if they followed from the number of the step only. Use one ledger for runs on the "
    "same data"
)

_SHARES = (0.5, 0.1, 0.01, 0.9, 0.99)
"""Shares of delta that the filters get; the charges beside them get the rest."""


@dataclass(frozen=True)
class Limit:
    """The privacy filter that a charge went through.

    Attributes:
        order: its preset Renyi order.
        budget: divergence in nats that all charges of the account together may have there, this one included.
    """

    order: float
    budget: float


@dataclass(frozen=True)
class Charge:
    """An event that was charged, and its origin.

    Attributes:
        event: what was released.
        adaptive: whether its rate or noise may have followed from earlier releases. None, of an older file that does
            not say, counts as True.
        limit: the privacy filter that accepted it; None without one.
    """

    event: Event
    adaptive: bool | None = False
    limit: Limit | None = None


@dataclass
class Terms:
    """What holds for the charges of an account as a whole. It only ever gets worse, and two of them add up.

    Attributes:
        samplings: kinds of sampling that were charged.
        units: what the charges protect.
        adaptive: the rate or noise of some charge may have followed from releases.
        unknown: for some charge that is not known; it counts as adaptive, outside of any filter.
        unlimited: some charge that is known to be adaptive went through no privacy filter.
        limits: by order, the budget of the filters that adaptive charges went through, and the events that were charged
            after the last of those. No filter has counted these events.

    References:
        Feldman and Zrnic 2021 (arXiv 2008.11193), theorem 4.3: with adaptive charges only the whole budget of a filter
        at one preset order bounds what was spent.
    """

    samplings: set[str] = field(default_factory=set)
    units: set[str] = field(default_factory=set)
    adaptive: bool = False
    unknown: bool = False
    unlimited: bool = False
    limits: dict[float, tuple[float, dict[Event, int]]] = field(default_factory=dict)

    def take(self, charge: Charge, unit: str | None = None, steps: int = 1) -> None:
        """Add a charge that came after all others, once or several times."""
        event, limit = charge.event, charge.limit
        adaptive = charge.adaptive is not False
        self.samplings.add(event.sampling)
        if unit is not None:
            self.units.add(unit)
        self.adaptive |= adaptive
        self.unknown |= charge.adaptive is None
        self.unlimited |= charge.adaptive is True and limit is None
        for _, after in self.limits.values():
            after[event] = after.get(event, 0) + steps
        if limit is not None and (charge.adaptive or limit.order in self.limits):
            before = self.limits[limit.order][0] if limit.order in self.limits else 0.0
            self.limits[limit.order] = max(before, limit.budget), {}  # the filter has counted all that came before

    def join(self, other: Terms, mine: Mapping[Event, int], theirs: Mapping[Event, int]) -> None:
        """Add what holds for the charges of another account, which the filters of this one did not count.

        Args:
            other: terms of the other account.
            mine: events charged in this one, and how often each.
            theirs: events charged in the other, and how often each.
        """
        limits: dict[float, tuple[float, dict[Event, int]]] = {}
        for order in self.limits.keys() | other.limits.keys():
            budget, after = 0.0, Counter[Event]()
            for terms, events in ((self, mine), (other, theirs)):
                part, beside = terms.limits.get(order, (0.0, events))
                budget += part
                after.update(beside)
            limits[order] = budget, dict(after)
        self.limits = limits
        self.samplings |= other.samplings
        self.units |= other.units
        self.adaptive |= other.adaptive
        self.unknown |= other.unknown
        self.unlimited |= other.unlimited

    @property
    def is_limited(self) -> bool:
        """Whether there are adaptive charges and all went through filters at one order, so that a bound holds."""
        return self.adaptive and not (self.unlimited or self.unknown) and len(self.limits) == 1

    def notes(self, to_come: bool = False) -> list[str]:
        """Return what a reader of a bound must know.

        Args:
            to_come: the next charge will be adaptive, without a filter.
        """
        found = [_UNKNOWN] if self.unknown else []
        if to_come or self.unlimited:
            found.append(_RULE)
        elif len(self.limits) > 1:
            found.append(_SEVERAL)
        return found

    def limit_epsilon(self, delta: float) -> float:
        """Return the epsilon of the filters' whole budgets and of the charges beside them; 0 without filters."""
        return max((_limit_epsilon(order, *parts, delta) for order, parts in self.limits.items()), default=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "samplings": sorted(self.samplings),
            "units": sorted(self.units),
            "adaptive": self.adaptive,
            "unknown": self.unknown,
            "unlimited": self.unlimited,
            "limits": [
                [order, budget, [[*astuple(event), steps] for event, steps in after.items()]]
                for order, (budget, after) in sorted(self.limits.items())
            ],
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Terms:
        """Return the terms that :meth:`state_dict` described."""
        flags = {name: bool(state[name]) for name in ("adaptive", "unknown", "unlimited")}
        limits = {
            float(order): (float(budget), {Event(*values): int(steps) for *values, steps in after})
            for order, budget, after in state["limits"]
        }
        return cls(samplings=set(state["samplings"]), units=set(state["units"]), limits=limits, **flags)

    @classmethod
    def worst(cls, events: Collection[Event]) -> Terms:
        """Return the worst that may hold for charges of which only the events are known.

        Steps at rate 1 may have been shuffled, and rates may have followed from releases. The charges may protect rows
        only: what protects a user also protects each of the user's rows.
        """
        plain = {
            "shuffled" if event.sample_rate == 1.0 else "poisson" for event in events if event.sampling == "poisson"
        }
        samplings = plain | {event.sampling for event in events if event.sampling != "poisson"}
        if not samplings:
            return cls()
        return cls(samplings=samplings, units={RECORD}, adaptive=True, unknown=True)


def renyi_epsilon(counts: Mapping[Event, int], delta: float) -> float:
    """Return the Renyi bound of Gaussian events, at their best order; 0 for none."""
    return epsilon_from_rdp(_divergences(counts), DEFAULT_ORDERS, delta)[0]


def _divergences(counts: Mapping[Event, int]) -> FloatArray:
    """Return the divergence of events at each of the default orders, in nats."""
    table = RDPTable(DEFAULT_ORDERS)
    total: FloatArray = 0.0 * table.orders
    for event, steps in counts.items():
        total = total + steps * table.event_row(event)
    return total


def _limit_epsilon(order: float, budget: float, after: Mapping[Event, int], delta: float) -> float:
    """Return the epsilon of a filter's whole budget together with events that it has not counted.

    It is the smaller of two bounds: all at the filter's order, and basic composition of the filter's budget with the
    events at their own best order.
    """
    if not after:
        return epsilon_from_rdp([budget], [order], delta)[0]
    if any(event.mechanism != "gaussian" for event in after):
        return math.inf
    beside = math.fsum(steps * float(rdp_event(event, [order])[0]) for event, steps in after.items())
    found = [epsilon_from_rdp([budget + beside], [order], delta)[0]]
    spent = _divergences(after)
    for share in _SHARES:
        whole = epsilon_from_rdp([budget], [order], share * delta)[0]
        found.append(whole + epsilon_from_rdp(spent, DEFAULT_ORDERS, (1 - share) * delta)[0])
    return min(found)
