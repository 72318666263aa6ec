"""The account of an engine: accountant, ledger and target budget, charged together and before every release."""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from opacus.accountants import IAccountant

from opacus_ac.accounting import FALSE_POSITIVE_RATES, AttackBounds, Event
from opacus_ac.budget.charges import Charge, Terms, privacy_unit
from opacus_ac.budget.guard import BudgetGuard
from opacus_ac.budget.ledger import PrivacyLedger
from opacus_ac.budget.spending import Spending
from opacus_ac.distributed.reducers import LOCAL, Reducer
from opacus_ac.errors import PrivacyBudgetExceeded

_RUN = ("noise_multiplier", "expected_batch_size", "sampling", "dataset_size", "max_batch_size")
"""Settings on which the charges of a run depend."""


class Account:
    """What has been spent and what may be: accountant, ledger and target budget of one engine.

    Args:
        accountant: the engine's accountant; charges of an existing ledger are added to it.
        ledger: path of the privacy ledger, or None.

    Attributes:
        accountant: the accountant behind :class:`opacus_ac.budget.accountants.AccountantAdapter`.
        guard: what refuses steps beyond the target; None without a target.
        settings: public settings of the run; None before the first.

    Guarantees:
        :meth:`charge` writes and accounts for an event before it returns, or raises and does neither, on every rank.
        Nothing may be released before it returns. The target covers all runs of the ledger, those of other processes
        too.
    """

    def __init__(self, accountant: IAccountant, ledger: str | os.PathLike[str] | None = None) -> None:
        self._spending = Spending(accountant)
        self.accountant = self._spending.accountant
        self.guard: BudgetGuard | None = None
        self.ledger = None if ledger is None else PrivacyLedger(ledger, self.accountant.noise)
        self.settings: dict[str, Any] | None = None
        self._from_ledger = 0
        self._unshared: list[Charge] = []  # of the ledger, not yet known to the other ranks
        self._known: set[str] = set()
        self._reducer: Reducer = LOCAL
        self._by_function = self._departs = False
        self._catch_up()

    # ---------------------------------------------------------------- runs

    def check_dataset(self, dataset_size: int, max_rows_per_user: int | None = None) -> None:
        """Raise ``ValueError`` when earlier charges, here or in the ledger, are of other data or protect another unit.

        Args:
            dataset_size: number of records of the run.
            max_rows_per_user: largest number of rows of a user, where users are protected; None for rows.
        """
        self.refresh()
        unit = privacy_unit(max_rows_per_user)
        if self.ledger is not None:
            self._check_ledger_is_whole()
            self.ledger.check_dataset(dataset_size, unit)
        others = sorted(self._spending.all_terms().units - {unit})
        if others:
            raise ValueError(
                f"this engine has accounted for steps that protect {others[0]}, and this run protects {unit}: they do "
                "not add up. Use a PrivacyEngine of its own for each"
            )

    def _check_ledger_is_whole(self) -> None:
        """Raise ``ValueError`` when the accountant has been given steps that the ledger does not hold."""
        if self.ledger is None:
            return
        known, charged = self.accountant.steps, len(self.ledger)
        if known != charged:
            raise ValueError(
                f"the accountant holds {known} steps and the ledger {charged}: its history was changed from outside, "
                "and the next run on this ledger would not know of it. Write earlier steps to the ledger "
                "(opacus_ac.budget.ledger.PrivacyLedger.charge) before the engine is built, or use an engine without "
                "ledger="
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
        changed = any(before.get(name, settings[name]) != settings[name] for name in _RUN)
        self._departs = self._spending.has_charges and changed
        self._by_function = by_function
        self.settings = settings

    def is_adaptive(self, event: Event) -> bool:
        """Whether the rate or noise of a charge of this run may follow from releases.

        It may when a function chooses the batch sizes, and when the noise is another than the run began with. Without a
        target it may also in a run with other settings than the one before it in this account.
        """
        if self.settings is None:
            return False
        changed = event.noise_multiplier not in (0.0, self.settings["noise_multiplier"])
        return self._by_function or changed or (self._departs and not self.is_filtered)

    def start_target(self, epsilon: float, delta: float, planned: Mapping[Event, int]) -> None:
        """Refuse, from now on, steps that would exceed a target.

        Args:
            epsilon: target epsilon.
            delta: target delta.
            planned: events of the planned run, and how often each.
        """

        def stated_after(event: Event, steps: int) -> float:
            return self._spending.least_after(self._charge_of(event), delta, steps)

        self.guard = BudgetGuard(self.accountant, epsilon, delta, planned, stated_after)

    def as_filter(self) -> Spending:
        """Return what was charged so far, in the accountant "vrdp", which is a privacy filter."""
        return self._spending.as_filter()

    def become(self, spending: Spending) -> IAccountant:
        """Go on with these charges and their accountant, which is returned; the old one then refuses to be asked."""
        self._spending, self.accountant = self._spending.replaced_by(spending), spending.accountant
        return cast(IAccountant, self.accountant.accountant)

    # ---------------------------------------------------------------- what was spent

    def adjacency(self, sampling: str) -> str:
        """Return the neighbouring relation that holds for all charges and for batches drawn by ``sampling``."""
        return self._spending.adjacency(sampling)

    @property
    def is_filtered(self) -> bool:
        """Whether a privacy filter covers rates and noise that follow from releases."""
        return self.guard is not None and self.guard.is_filter

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """Accounted (noise multiplier, sample rate, steps), of every kind of sampling."""
        return self.accountant.history

    def bounds(self, delta: float, tight: bool = True) -> dict[str, float]:
        """Return every epsilon that holds for what was spent, by method; see :meth:`Spending.bounds`.

        What others have added to the ledger is included.
        """
        self.refresh()
        self._check_ledger_is_whole()
        return self._spending.bounds(delta, tight)

    def epsilon(self, delta: float) -> float:
        """Return the epsilon spent so far, without the privacy loss distribution: never below :meth:`bounds`."""
        return min(self.bounds(delta, tight=False).values())

    def attacks(self, rates: Sequence[float] = FALSE_POSITIVE_RATES) -> AttackBounds:
        """Return what any attacker can do against what was spent; see :meth:`Spending.attacks`."""
        self.refresh()
        return self._spending.attacks(rates)

    def notes(self, delta: float, event: Event | None = None) -> list[str]:
        """Return what a reader of the bounds must know.

        Args:
            delta: delta.
            event: what the next step would cost.
        """
        to_come = event is not None and not self.is_filtered and self.is_adaptive(event)
        return self._spending.notes(delta, to_come)

    # ---------------------------------------------------------------- checkpoints

    @property
    def ledger_head(self) -> dict[str, Any] | None:
        """Head of the ledger, for a checkpoint; None without a ledger."""
        return None if self.ledger is None else self.ledger.head

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the charges beside the accountant's state."""
        return self._spending.all_terms().state_dict()

    def check_checkpoint(self, head: Mapping[str, Any] | None) -> None:
        """Raise ``ValueError`` unless a checkpoint with this head belongs to this engine's ledger, or both have none.

        Args:
            head: head of the ledger as the checkpoint was written; None if there was no ledger.
        """
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
        mine = self._spending.all_terms().units | (set() if self.settings is None else {self._unit})
        wrong = sorted(terms.units - mine)
        if mine and wrong:
            raise ValueError(
                f"the checkpoint's steps protect {wrong[0]}, and this engine's {sorted(mine)[0]}: they do not add up. "
                "Load it with a PrivacyEngine of its own, or take over the weights only (module.load_state_dict)"
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
            name: the name of the checkpoint. A checkpoint that this engine has written or read before is part of what
                it has spent.
            terms: what holds for its charges (:func:`opacus_ac.budget.spending.kept_terms`).

        Raises:
            ValueError: If they protect something else than this engine's; nothing is taken over then.
        """
        self.check_terms(terms)
        known = name in self._known
        self._known.add(name)
        if known or self.ledger is not None:  # every charge of the checkpoint is in the ledger
            return
        if self.accountant.steps:
            warnings.warn(
                "this engine has accounted for steps that the checkpoint does not know: the sum of both is kept",
                stacklevel=4,
            )
        self._spending.join(state, terms)

    # ---------------------------------------------------------------- charges

    def look_ahead(self, event: Event) -> None:
        """Raise when ``event`` would exceed the target; charge nothing."""
        if self.guard is not None:
            self._share_order(self.guard)
            self.guard.check(event)

    def remaining(self, event: Event) -> int:
        """Return how many more of ``event`` fit into the target."""
        assert self.guard is not None
        self.refresh()
        try:
            self._share_order(self.guard)
        except PrivacyBudgetExceeded:
            return 0
        return self.guard.remaining(event)

    def charge(self, event: Event | None) -> None:
        """Account for a step that is about to be released; None is a step that has been paid for.

        Raises:
            PrivacyBudgetExceeded: If the step does not fit into the target; nothing is charged then.
        """
        if event is None:
            return
        added = self._reducer.on_first(lambda: self._charge(event))
        if self._reducer.rank != 0:
            for other in added:
                self._spending.add(other, self._unit)

    def _charge(self, event: Event) -> list[Charge]:
        """Charge a step here and return all that the other ranks do not know, charges of other runs included."""
        if self.ledger is None:
            charge = self._accepted(event)
            self._spending.add(charge, self._unit)
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
        return self._charge_of(event)

    def _charge_of(self, event: Event) -> Charge:
        """Return an event with its origin."""
        return Charge(event, self.is_adaptive(event), None if self.guard is None else self.guard.limit)

    def _share_order(self, guard: BudgetGuard) -> None:
        """Set the guard to the Rényi order of earlier filters: one order has to hold for all adaptive charges."""
        limits = self._spending.terms.limits
        if len(limits) == 1:
            guard.use_order(next(iter(limits)))

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
            assert self.ledger.unit is not None  # it is in the first line
            self._spending.add(charge, self.ledger.unit)
            self._from_ledger += 1
            self._unshared.append(charge)

    def join(self, reducer: Reducer) -> None:
        """Make this the account of several processes: rank 0 charges, and has the ledger; the others follow it."""
        self._reducer = reducer
        if reducer.world == 1:
            return
        state, terms = reducer.on_first(lambda: (self.accountant.state_dict(), self.state_dict()))
        self._unshared = []
        if reducer.rank != 0:
            self._spending.replace(state, Terms.of_state(terms))
            self.ledger = None
