"""The account of an engine: accountant, ledger and target budget, charged together and before every release."""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections.abc import Mapping
from typing import Any

from opacus.accountants import IAccountant

from opacus_ac.accounting import Event, VariableRateRDPAccountant, common_adjacency, pld_epsilon
from opacus_ac.accounting.opacus_accountants import CheckedGDPAccountant
from opacus_ac.budget.accountants import account_for, accounted_mechanism, spent
from opacus_ac.budget.charges import Charge, Terms, privacy_unit, renyi_epsilon
from opacus_ac.budget.guard import BudgetGuard
from opacus_ac.budget.ledger import PrivacyLedger
from opacus_ac.distributed.reducers import LOCAL, Reducer
from opacus_ac.errors import PrivacyBudgetExceeded


def counted(accountant: IAccountant) -> dict[Event, int]:
    """Return the events of an accountant, and how often each; a shuffled pass comes back as a Poisson step at rate 1."""
    if isinstance(accountant, VariableRateRDPAccountant):
        return accountant.counts()
    mechanism, counts = accounted_mechanism(accountant), dict[Event, int]()
    for noise, rate, steps in accountant.history:
        event = Event(noise, rate, mechanism=mechanism)
        counts[event] = counts.get(event, 0) + steps
    return counts


_RUN = ("noise_multiplier", "expected_batch_size", "sampling", "dataset_size", "max_batch_size")
"""Settings on which the charges of a run depend."""


class Account:
    """What has been spent and what may be: accountant, ledger and target budget of one engine.

    Args:
        accountant: the engine's accountant; charges of an existing ledger are added to it.
        ledger: path of the privacy ledger, or None.

    Attributes:
        terms: what holds for all charges together: privacy units, kinds of sampling, whether rates or noise may have followed
            from releases, and the filters that they went through. It is kept in ledger and checkpoints.

    Guarantees:
        :meth:`charge` has written and accounted for an event before it returns, or raised and done neither, on every rank;
        nothing may be released before. The target is checked against all runs of the ledger, other processes' included.
        What is reported is never below what was spent, by the rule that fits all charges: what was adaptive once stays so.
    """

    def __init__(self, accountant: IAccountant, ledger: str | os.PathLike[str] | None = None) -> None:
        self.accountant = accountant
        self.guard: BudgetGuard | None = None
        self.ledger = None if ledger is None else PrivacyLedger(ledger, accounted_mechanism(accountant))
        self.settings: dict[str, Any] | None = None
        self.terms = Terms()
        self._steps = sum(steps for _, _, steps in self.history)  # charged through this account
        self._from_ledger = 0
        self._unshared: list[Charge] = []  # of the ledger, not yet known to the other ranks
        self._known: set[str] = set()
        self._reducer: Reducer = LOCAL
        self._by_function = self._departs = False
        self._catch_up()

    # ---------------------------------------------------------------- runs

    def check_dataset(self, dataset_size: int, max_rows_per_user: int | None = None) -> None:
        """Raise ``ValueError`` when what was charged, here or in the ledger, is about another dataset or privacy unit."""
        self.refresh()
        if self.ledger is not None:
            self._check_ledger_is_whole()
            self.ledger.check_dataset(dataset_size, privacy_unit(max_rows_per_user))
        self._check_unit(privacy_unit(max_rows_per_user), self._terms().units)

    def _check_unit(self, unit: str, charged: set[str]) -> None:
        others = sorted(charged - {unit})
        if others:
            raise ValueError(
                f"this engine has accounted for steps that protect {others[0]}, and this run protects {unit}: they do not add up. "
                "Use a PrivacyEngine of its own for each"
            )

    def _check_ledger_is_whole(self) -> None:
        """Raise ``ValueError`` when the accountant has been given steps that the ledger does not hold."""
        if self.ledger is None:
            return
        known, charged = sum(steps for _, _, steps in self.history), len(self.ledger)
        if known != charged:
            raise ValueError(
                f"the accountant holds {known} steps and the ledger {charged}: its history was changed from outside, and the next "
                "run on this ledger would not know of it. Write earlier steps to the ledger (opacus_ac.budget.ledger.PrivacyLedger.charge) "
                "before the engine is built, or use an engine without ledger="
            )

    @property
    def _unit(self) -> str:
        """What the run protects."""
        assert self.settings is not None
        return privacy_unit(self.settings["max_rows_per_user"])

    def begin(self, settings: dict[str, Any], *, by_function: bool = False) -> None:
        """Prepare for the charges of a run.

        Args:
            settings: its public settings, noted in the ledger.
            by_function: its batch sizes come from a function, which may look at releases.
        """
        before = self.settings or (None if self.ledger is None else self.ledger.last_settings) or {}
        self._departs = self._steps > 0 and any(before.get(name, settings[name]) != settings[name] for name in _RUN)
        self._by_function = by_function
        self.settings = settings

    def is_adaptive(self, event: Event) -> bool:
        """Whether the rate or noise of a charge of this run may follow from releases.

        It may when a function chooses the batch sizes, when the noise is another than the run began with, and, without a
        target, in a run with other settings than the one before it in this account.
        """
        if self.settings is None:
            return False
        changed = event.noise_multiplier not in (0.0, self.settings["noise_multiplier"])
        return self._by_function or changed or (self._departs and not self.is_filtered)

    # ---------------------------------------------------------------- what was spent

    def _terms(self) -> Terms:
        """Return the terms of all that the accountant holds, what was put into it from outside included."""
        if sum(steps for _, _, steps in self.history) == self._steps:
            return self.terms
        terms = Terms.of_state(self.terms.state_dict())
        terms.join(Terms.worst(self.accountant.history, getattr(self.accountant, "other_events", ())), {}, {})
        return terms

    def adjacency(self, sampling: str) -> str:
        """Return the neighbouring relation that holds for all that was charged, and for batches drawn by ``sampling``."""
        return common_adjacency({sampling, *self._terms().samplings})

    @property
    def is_filtered(self) -> bool:
        """Whether a privacy filter covers rates and noise that follow from releases."""
        return self.guard is not None and self.guard.is_filter

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """Accounted (noise multiplier, sample rate, steps), of every kind of sampling."""
        runs = [(float(noise), float(rate), int(steps)) for noise, rate, steps in self.accountant.history]
        others: Mapping[Event, int] = getattr(self.accountant, "other_events", {})
        return runs + [(event.noise_multiplier, event.sample_rate, steps) for event, steps in others.items()]

    def bounds(self, delta: float, tight: bool = True) -> dict[str, float]:
        """Return every epsilon that holds for what was spent, by method; what others have added to the ledger included.

        Where rates or noise may have followed from releases, that is the whole budget of the privacy filter that they went
        through, whatever of it was spent, and what was charged beside it; where they went through none, the Renyi bound, with
        the condition that :meth:`notes` states.

        Args:
            delta: delta.
            tight: also compute the privacy loss distribution, where it may be smaller.
        """
        self.refresh()
        self._check_ledger_is_whole()
        name, terms, figure = self.accountant.mechanism(), self.terms, spent(self.accountant, delta)
        if terms.adaptive:
            figure = max(figure, self._renyi(delta), terms.limit_epsilon(delta))
            return {f"{name} (privacy filter)" if self._terms().is_limited else name: figure}
        tight = tight and not self._terms().unknown
        found = {name: figure}
        if tight and type(self.accountant) is VariableRateRDPAccountant and 0 < figure < math.inf:
            found["privacy loss distribution"] = pld_epsilon(self.accountant.counts(), delta)
        return found

    def _renyi(self, delta: float) -> float:
        """Return the Renyi bound of what was spent, of Gaussian releases; 0 for others."""
        if isinstance(self.accountant, VariableRateRDPAccountant):
            return VariableRateRDPAccountant.get_epsilon(self.accountant, delta)
        counts = counted(self.accountant)
        return renyi_epsilon({event: steps for event, steps in counts.items() if event.mechanism == "gaussian"}, delta)

    def epsilon(self, delta: float) -> float:
        """Return the epsilon spent so far, without the privacy loss distribution: never below :meth:`bounds`."""
        return min(self.bounds(delta, tight=False).values())

    def notes(self, delta: float, event: Event | None = None) -> list[str]:
        """Say what a reader of the bounds must know; ``event`` is what the next step would cost."""
        to_come = event is not None and not self.is_filtered and self.is_adaptive(event)
        found = self._terms().notes(to_come)
        if isinstance(self.accountant, CheckedGDPAccountant):
            figure = self.accountant.approximation(delta)
            found.append(
                'accountant="gdp" is an approximation by the central limit theorem, which can lie far below the truth, so no finite '
                f"epsilon is claimed (its figure: {'none' if figure is None else f'{figure:.4f}'}). "
                f'accountant="vrdp" would state {self._renyi(delta):.4f} for the same steps'
            )
        return found

    # ---------------------------------------------------------------- checkpoints

    @property
    def ledger_head(self) -> dict[str, Any] | None:
        """Head of the ledger, for a checkpoint; None without a ledger."""
        return None if self.ledger is None else self.ledger.head

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the charges beside the accountant's state."""
        return self._terms().state_dict()

    def check_checkpoint(self, head: Mapping[str, Any] | None) -> None:
        """Raise ``ValueError`` unless a checkpoint with this head belongs to this engine's ledger, or both have none."""
        if head is not None and self.ledger is None:
            raise ValueError(
                "the checkpoint was written under a privacy ledger: build the engine with ledger=<its path>"
            )
        if head is None and self.ledger is not None:
            raise ValueError(
                "the checkpoint was written without a ledger, so its steps are not in this one: load it with an engine "
                "without ledger="
            )
        if head is not None and self.ledger is not None:
            self.refresh()
            self.ledger.check_head(head)

    def check_terms(self, terms: Terms) -> None:
        """Raise ``ValueError`` when the charges of a checkpoint protect something else than this engine's."""
        mine = self._terms().units | (set() if self.settings is None else {self._unit})
        wrong = sorted(terms.units - mine)
        if mine and wrong:
            raise ValueError(
                f"the checkpoint's steps protect {wrong[0]}, and this engine's {sorted(mine)[0]}: they do not add up. Load it with a "
                "PrivacyEngine of its own, or take over the weights only (module.load_state_dict)"
            )

    def mark(self) -> str:
        """Return a new name for a checkpoint of this moment, which :meth:`resume` will know."""
        name = secrets.token_hex(16)
        self._known.add(name)
        return name

    def resume(self, state: dict[str, Any], name: str, terms: Terms) -> None:
        """Take over an accountant's saved state; what this engine has spent itself stays spent.

        Args:
            state: the accountant's state.
            name: the name of the checkpoint. One that this engine has written or read before is part of what it has spent.
            terms: what holds for its charges (:func:`kept_terms`).

        Raises:
            ValueError: they protect something else than this engine's; nothing was taken over.
        """
        self.check_terms(terms)
        known = name in self._known
        self._known.add(name)
        if known or self.ledger is not None:  # every charge of the checkpoint is in the ledger
            return
        saved = type(self.accountant)()
        saved.load_state_dict(state)
        before, theirs, mine = self._terms(), counted(saved), counted(self.accountant)
        if len(self.accountant) == 0:
            self.accountant.load_state_dict(state)
        else:
            warnings.warn(
                "this engine has accounted for steps that the checkpoint does not know: the sum of both is kept",
                stacklevel=4,
            )
            if isinstance(self.accountant, VariableRateRDPAccountant):
                for event, steps in theirs.items():
                    self.accountant.step_event(event, steps)
            else:
                self.accountant.history = [*saved.history, *self.accountant.history]
        before.join(terms, mine, theirs)
        self.terms, self._steps = before, sum(steps for _, _, steps in self.history)

    # ---------------------------------------------------------------- charges

    def look_ahead(self, event: Event) -> None:
        """Raise when ``event`` would exceed the target; charge nothing."""
        if self.guard is not None:
            self._share_order()
            self.guard.check(event)

    def remaining(self, event: Event) -> int:
        """Return how many more of ``event`` fit into the target."""
        assert self.guard is not None
        self.refresh()
        try:
            self._share_order()
        except PrivacyBudgetExceeded:
            return 0
        return self.guard.remaining(event)

    def charge(self, event: Event | None) -> None:
        """Account for a step that is about to be released; None is a step that has been paid for.

        Raises:
            PrivacyBudgetExceeded: the step does not fit into the target; nothing was charged.
        """
        if event is None:
            return
        added = self._reducer.on_first(lambda: self._charge(event))
        if self._reducer.rank != 0:
            for other in added:
                self._add(other)

    def _charge(self, event: Event) -> list[Charge]:
        """Charge a step here and return all that the other ranks do not know, charges of other runs included."""
        if self.ledger is None:
            charge = self._accepted(event)
            self._add(charge)
            return [charge]
        with self.ledger.locked():
            self._catch_up()
            charge = self._accepted(event)
            assert self.settings is not None
            self.ledger.charge(
                event,
                dataset_size=self.settings["dataset_size"],
                unit=self._unit,
                settings=self.settings,
                adaptive=charge.adaptive,
                limit=charge.limit,
            )
        self._catch_up()
        added, self._unshared = self._unshared, []
        return added

    def _accepted(self, event: Event) -> Charge:
        """Return the charge of an event that fits into the target, with its origin."""
        self.look_ahead(event)
        return Charge(event, self.is_adaptive(event), None if self.guard is None else self.guard.limit)

    def _share_order(self) -> None:
        """Take the Renyi order of the filters that adaptive charges went through: one order has to hold for all of them."""
        if self.guard is not None and len(self.terms.limits) == 1:
            self.guard.use_order(next(iter(self.terms.limits)))

    def refresh(self) -> None:
        """Take in what other processes have written to the ledger since the last look."""
        if self.ledger is not None:
            self.ledger.refresh()
            self._catch_up()

    def _catch_up(self) -> None:
        """Add the charges of the ledger that are new."""
        if self.ledger is None:
            return
        for charge in self.ledger.entries(self._from_ledger):
            self._add(charge, self.ledger.unit)
            self._from_ledger += 1
            self._unshared.append(charge)

    def join(self, reducer: Reducer) -> None:
        """Make this the account of several processes: rank 0 charges, and has the ledger; the others follow it."""
        self._reducer = reducer
        if reducer.world == 1:
            return
        state, terms = reducer.on_first(lambda: (self.accountant.state_dict(), self._terms().state_dict()))
        self._unshared = []
        if reducer.rank != 0:
            self.accountant.load_state_dict(state)
            self.terms, self.ledger = Terms.of_state(terms), None
            self._steps = sum(steps for _, _, steps in self.history)

    def _add(self, charge: Charge, unit: str | None = None) -> None:
        account_for(self.accountant, charge.event)
        self._steps += 1
        self.terms.take(charge, self._unit if unit is None else unit)


def kept_terms(state: Mapping[str, Any], kept: Mapping[str, Any] | None, settings: Mapping[str, Any] | None) -> Terms:
    """Return what holds for the charges of a checkpoint.

    Args:
        state: the accountant's state.
        kept: :meth:`Account.state_dict`; None in a checkpoint of an older version, for which the worst is assumed.
        settings: public settings of the run that was saved, None if none had begun.
    """
    if kept is not None:
        return Terms.of_state(kept)
    others = [Event(*values[:-1]) for values in state.get("other_events", [])]
    terms = Terms.worst(state["history"], others)
    if settings is not None and terms.units:
        terms.units = {privacy_unit(settings["max_rows_per_user"])}
    return terms
