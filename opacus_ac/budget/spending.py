"""What was spent: the charges of an accountant, the terms that hold for all of them, and every bound that follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from opacus.accountants import IAccountant

from opacus_ac.accounting import (
    FALSE_POSITIVE_RATES,
    AttackBounds,
    Event,
    VariableRateRDPAccountant,
    attack_bounds_from_curve,
    common_adjacency,
)
from opacus_ac.budget.accountants import adapt, retire
from opacus_ac.budget.charges import Charge, Terms, privacy_unit


class Spending:
    """The charges of one accountant.

    Args:
        accountant: the accountant.

    Attributes:
        accountant: the accountant behind :class:`opacus_ac.budget.accountants.AccountantAdapter`.
        terms: what holds for all charges that were made through :meth:`add`: privacy units, kinds of sampling, whether
            rates or noise may have followed from releases, and the filters that they went through.

    Guarantees:
        What is reported is never below what was spent, by the rule that fits all charges. What was adaptive once stays
        adaptive.
    """

    def __init__(self, accountant: IAccountant) -> None:
        self.accountant = adapt(accountant)
        self.terms = Terms()
        self._steps = 0

    @property
    def has_charges(self) -> bool:
        """Whether anything was charged through :meth:`add`, or taken over."""
        return self._steps > 0

    def add(self, charge: Charge, unit: str) -> None:
        """Account for a charge, which protects ``unit``."""
        self.accountant.charge(charge.event)
        self._steps += 1
        self.terms.take(charge, unit)

    def all_terms(self) -> Terms:
        """Return the terms of all that the accountant holds, what was put into it from outside included."""
        if self.accountant.steps == self._steps:
            return self.terms
        terms = Terms.of_state(self.terms.state_dict())
        terms.join(Terms.worst(self.accountant.counts()), {}, {})
        return terms

    def adjacency(self, sampling: str) -> str:
        """Return the neighbouring relation that holds for all charges and for batches drawn by ``sampling``."""
        return common_adjacency({sampling, *self.all_terms().samplings})

    def bounds(self, delta: float, tight: bool = True) -> dict[str, float]:
        """Return every epsilon that holds for what was spent, by method.

        Where rates or noise may have followed from releases, epsilon is that of the whole budget of the privacy filter
        that accepted them, whatever was spent of it, and of the charges beside it. Without a filter it is the Rényi
        bound, under the condition that :meth:`notes` states.

        Args:
            delta: delta.
            tight: also compute bounds that take long and may be smaller.
        """
        name, figure = self.accountant.name, self.accountant.epsilon(delta)
        if self.terms.adaptive:
            figure = max(figure, self.accountant.renyi_epsilon(delta), self.terms.limit_epsilon(delta))
            return {f"{name} (privacy filter)" if self.all_terms().is_limited else name: figure}
        found = {self.accountant.method: figure}
        if tight and not self.all_terms().unknown and 0 < figure < math.inf:
            found.update(self.accountant.tighter_bounds(delta))
        return found

    def least_after(self, charge: Charge, delta: float, steps: int = 1) -> float:
        """Return the least that :meth:`bounds` would state after more of a charge, whatever the accountant says.

        It is 0 where neither rates nor noise may have followed from releases: the accountant's own figure holds then.

        Args:
            charge: what would be charged.
            delta: delta.
            steps: how often.
        """
        if not self.terms.adaptive and charge.adaptive is False:
            return 0.0
        terms = Terms.of_state(self.terms.state_dict())
        terms.take(charge, steps=steps)
        return max(self.accountant.renyi_epsilon_after(charge.event, delta, steps), terms.limit_epsilon(delta))

    def attacks(self, rates: Sequence[float] = FALSE_POSITIVE_RATES) -> AttackBounds:
        """Return what any attacker can do against what was spent.

        Where rates or noise may have followed from releases, only the epsilons of :meth:`bounds` hold, so that the
        figures follow from these.

        Args:
            rates: false-positive rates.
        """
        if self.terms.adaptive or self.all_terms().unknown:
            return attack_bounds_from_curve(lambda delta: min(self.bounds(delta, tight=False).values()), rates)
        return self.accountant.attacks(rates)

    def notes(self, delta: float, to_come: bool = False) -> list[str]:
        """Return what a reader of the bounds must know.

        Args:
            delta: delta.
            to_come: the next charge will be adaptive, without a filter.
        """
        return [*self.all_terms().notes(to_come), *self.accountant.notes(delta)]

    def join(self, state: Mapping[str, Any], terms: Terms) -> None:
        """Add the charges of a saved accountant.

        Args:
            state: the accountant's state.
            terms: what holds for its charges.
        """
        saved, before = self.accountant.restored(state), self.all_terms()
        theirs, mine = saved.counts(), self.accountant.counts()
        if mine:
            self.accountant.join(saved)
        else:
            self.accountant.load_state_dict(state)
        before.join(terms, mine, theirs)
        self.terms, self._steps = before, self.accountant.steps

    def as_filter(self) -> Spending:
        """Return the same charges in an accountant that is a privacy filter."""
        accountant = VariableRateRDPAccountant()
        accountant.history = self.accountant.accountant.history
        accountant.other_events = self.accountant.accountant.other_events
        made = Spending(accountant)
        made.terms, made._steps = self.terms, self._steps
        return made

    def replaced_by(self, other: Spending) -> Spending:
        """Return the other; whoever kept the accountant of this one is refused, as it would state too little."""
        retire(self.accountant.accountant)
        return other

    def replace(self, state: Mapping[str, Any], terms: Terms) -> None:
        """Have the charges of another accountant instead of these; the arguments are those of :meth:`join`."""
        self.accountant.load_state_dict(state)
        self.terms, self._steps = terms, self.accountant.steps


def kept_terms(state: Mapping[str, Any], kept: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> Terms:
    """Return what holds for the charges of a checkpoint.

    Args:
        state: the accountant's state.
        kept: state of its terms; None in a checkpoint of an older version, for which the worst is assumed.
        settings: public settings of the run that was saved, None if none had begun.
    """
    if kept is not None:
        return Terms.of_state(kept)
    plain = [Event(noise, rate) for noise, rate, steps in state["history"] if steps]
    terms = Terms.worst([*plain, *(Event(*values) for *values, _ in state.get("other_events", []))])
    if settings is not None and terms.units:
        terms.units = {privacy_unit(settings["max_rows_per_user"])}
    return terms
