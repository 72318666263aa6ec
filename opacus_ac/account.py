"""The account of an engine: accountant, ledger and target budget, charged together and before every release."""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections.abc import Mapping
from typing import Any

from opacus.accountants import IAccountant

from opacus_ac.accounting import Event, PureDPAccountant, VariableRateRDPAccountant, common_adjacency, pld_epsilon
from opacus_ac.accounting.events import check_gaussian
from opacus_ac.budget import BudgetGuard, spent
from opacus_ac.distributed.reducers import LOCAL, Reducer
from opacus_ac.ledger import PrivacyLedger, privacy_unit


def check_accountant(accountant: IAccountant, sampling: str) -> None:
    """Raise ``ValueError`` when the accountant has no bound for a kind of sampling."""
    if not isinstance(accountant, VariableRateRDPAccountant) and sampling not in ("poisson", "shuffled"):
        raise ValueError(
            f"sampling={sampling!r} has no bound in the accountant {accountant.mechanism()!r}, which knows Poisson batches "
            'only: use PrivacyEngine(accountant="vrdp") or "vpld"'
        )


def accounted_mechanism(accountant: IAccountant) -> str:
    """Return which noise an accountant knows the cost of: "gaussian", or "laplace"."""
    return "laplace" if isinstance(accountant, PureDPAccountant) else "gaussian"


def account_for(accountant: IAccountant, event: Event) -> None:
    """Add ``event`` to an accountant of this package or of Opacus.

    Raises:
        ValueError: the accountant has no bound for this kind of sampling, or of noise; nothing is added.
    """
    if isinstance(accountant, VariableRateRDPAccountant | PureDPAccountant):
        accountant.step_event(event)
        return
    check_gaussian(event)
    check_accountant(accountant, event.sampling)
    accountant.step(noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate)


class Account:
    """What has been spent and what may be: accountant, ledger and target budget of one engine.

    Args:
        accountant: the engine's accountant; charges of an existing ledger are added to it.
        ledger: path of the privacy ledger, or None.

    Guarantees:
        :meth:`charge` has written and accounted for an event before it returns, or raised and done neither, on every rank;
        nothing may be released before. The target is checked against all runs of the ledger, other processes' included.
    """

    def __init__(self, accountant: IAccountant, ledger: str | os.PathLike[str] | None = None) -> None:
        self.accountant = accountant
        self.guard: BudgetGuard | None = None
        self.ledger = None if ledger is None else PrivacyLedger(ledger, accounted_mechanism(accountant))
        self.settings: dict[str, Any] | None = None
        self._samplings: set[str] = set()
        self._known: set[str] = set()
        self._reducer: Reducer = LOCAL
        for event in self.ledger.charges if self.ledger is not None else []:
            self._add(event)

    def check_dataset(self, dataset_size: int, max_rows_per_user: int | None = None) -> None:
        """Raise ``ValueError`` when what was charged, here or in the ledger, is about another dataset or privacy unit."""
        unit = privacy_unit(max_rows_per_user)
        before = unit if self.settings is None or len(self.accountant) == 0 else self._unit
        if before != unit:
            raise ValueError(
                f"this engine has accounted for steps that protect {before}, and this run protects {unit}: they do not add up. "
                "Use a PrivacyEngine of its own for each"
            )
        if self.ledger is not None:
            self._check_ledger_is_whole()
            self.ledger.check_dataset(dataset_size, unit)

    def _check_ledger_is_whole(self) -> None:
        """Raise ``ValueError`` when the accountant has been given steps that the ledger does not hold."""
        if self.ledger is None:
            return
        known, charged = sum(steps for _, _, steps in self.history), len(self.ledger.charges)
        if known != charged:
            raise ValueError(
                f"the accountant holds {known} steps and the ledger {charged}: its history was changed from outside, and the next "
                "run on this ledger would not know of it. Write earlier steps to the ledger (opacus_ac.ledger.PrivacyLedger.charge) "
                "before the engine is built, or use an engine without ledger="
            )

    @property
    def _unit(self) -> str:
        """What the run protects."""
        assert self.settings is not None
        return privacy_unit(self.settings["max_rows_per_user"])

    def begin(self, settings: dict[str, Any]) -> None:
        """Prepare for the charges of a run; ``settings`` are public and noted in the ledger."""
        self.settings = settings

    @property
    def ledger_head(self) -> dict[str, Any] | None:
        """Head of the ledger, for a checkpoint; None without a ledger."""
        return None if self.ledger is None else self.ledger.head

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
            self.ledger.check_head(head)

    def adjacency(self, sampling: str) -> str:
        """Return the neighbouring relation that holds for all that was charged, and for batches drawn by ``sampling``."""
        others = getattr(self.accountant, "other_events", {})
        return common_adjacency({sampling, *self._samplings, *(event.sampling for event in others)})

    @property
    def noise_multiplier(self) -> float | None:
        """The noise multiplier that the run began with."""
        return None if self.settings is None else self.settings["noise_multiplier"]

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

    def bounds(self, delta: float, own_rule: bool = False, tight: bool = True) -> dict[str, float]:
        """Return every epsilon that holds for what was spent, by method.

        Args:
            delta: delta.
            own_rule: rates or noise may have followed from releases. Under a privacy filter the bound is then its whole
                budget, whatever of it was spent.
            tight: also compute the privacy loss distribution, where it may be smaller.
        """
        self._check_ledger_is_whole()
        name = self.accountant.mechanism()
        found = {name: spent(self.accountant, delta)}
        if own_rule and self.guard is not None and self.guard.is_filter:
            return {f"{name} (privacy filter)": self.guard.bound(delta)}
        rdp_only = type(self.accountant) is VariableRateRDPAccountant
        if tight and rdp_only and 0 < found[name] < math.inf and not own_rule:
            found["privacy loss distribution"] = pld_epsilon(self.accountant.counts(), delta)
        return found

    def mark(self) -> str:
        """Return a new name for a checkpoint of this moment, which :meth:`resume` will know."""
        name = secrets.token_hex(16)
        self._known.add(name)
        return name

    def resume(self, state: dict[str, Any], name: str) -> None:
        """Take over an accountant's saved state; what this engine has spent itself stays spent.

        Args:
            state: the accountant's state.
            name: the name of the checkpoint. One that this engine has written or read before is part of what it has spent.
        """
        known = name in self._known
        self._known.add(name)
        if known or self.ledger is not None:  # every charge of the checkpoint is in the ledger
            return
        if len(self.accountant) == 0:
            self.accountant.load_state_dict(state)
            return
        saved = type(self.accountant)()
        saved.load_state_dict(state)
        warnings.warn(
            "this engine has accounted for steps that the checkpoint does not know: the sum of both is kept",
            stacklevel=4,
        )
        if isinstance(self.accountant, VariableRateRDPAccountant):
            for event, steps in saved.counts().items():
                self.accountant.step_event(event, steps)
        else:
            self.accountant.history = [*saved.history, *self.accountant.history]

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

    def _charge(self, event: Event) -> list[Event]:
        """Charge a step here and return all that the account has taken in, charges of other runs included."""
        added: list[Event] = []
        if self.ledger is None:
            self._check(event)
        else:
            with self.ledger.locked() as others:
                for other in others:
                    self._add(other)
                    added.append(other)
                self._check(event)
                assert self.settings is not None
                size = self.settings["dataset_size"]
                self.ledger.charge(event, dataset_size=size, unit=self._unit, settings=self.settings)
        self._add(event)
        return [*added, event]

    def join(self, reducer: Reducer) -> None:
        """Make this the account of several processes: rank 0 charges, and has the ledger; the others follow it."""
        self._reducer = reducer
        if reducer.world == 1:
            return
        state, samplings = reducer.on_first(lambda: (self.accountant.state_dict(), sorted(self._samplings)))
        if reducer.rank != 0:
            self.accountant.load_state_dict(state)
            self._samplings, self.ledger = set(samplings), None

    def _add(self, event: Event) -> None:
        account_for(self.accountant, event)
        self._samplings.add(event.sampling)

    def _check(self, event: Event) -> None:
        if self.guard is not None:
            self.guard.check(event)
