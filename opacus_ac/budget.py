"""The privacy budget: how much noise a target needs, and the guard that stops before it is exceeded."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from opacus.accountants import IAccountant
from opacus.accountants.utils import get_noise_multiplier

from opacus_ac.accounting import Event, VariableRateRDPAccountant, calibrate_noise_multiplier
from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.ledger import PrivacyLedger
from opacus_ac.sampling import SamplingPlan

_TOLERANCE = 1 + 1e-9

Run = tuple[float, float, int]  # (noise multiplier, sample rate, steps)


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


def check_accountant(accountant: IAccountant, sampling: str) -> None:
    """Raise ``ValueError`` when the accountant has no bound for a kind of sampling."""
    if not isinstance(accountant, VariableRateRDPAccountant) and sampling not in ("poisson", "shuffled"):
        raise ValueError(
            f"sampling={sampling!r} has no bound in the accountant {accountant.mechanism()!r}, which knows Poisson batches "
            'only: use PrivacyEngine(accountant="vrdp") or "vpld"'
        )


def account_for(accountant: IAccountant, event: Event) -> None:
    """Add ``event`` to an accountant of this package or of Opacus.

    Raises:
        ValueError: the accountant has no bound for this kind of sampling; nothing is added.
    """
    if isinstance(accountant, VariableRateRDPAccountant):
        accountant.step_event(event)
        return
    check_accountant(accountant, event.sampling)
    accountant.step(noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate)


def _continues(history: Sequence[Run], earlier: Sequence[Run]) -> bool:
    """Whether ``history`` begins with ``earlier``; runs of equal steps may have grown together."""
    if len(earlier) > len(history):
        return False
    for position, (mine, theirs) in enumerate(zip(history, earlier, strict=False)):
        grown = position == len(earlier) - 1 and mine[2] >= theirs[2]
        if tuple(mine[:2]) != tuple(theirs[:2]) or not (grown or mine[2] == theirs[2]):
            return False
    return True


class Account:
    """What has been spent and what may be: accountant, ledger and target budget of one engine.

    Args:
        accountant: the engine's accountant; charges of an existing ledger are added to it.
        ledger: path of the privacy ledger, or None.

    Guarantees:
        :meth:`charge` has written and accounted for an event before it returns, or raised and done neither; nothing may be
        released before. The target is checked against all runs of the ledger, other processes' included.
    """

    def __init__(self, accountant: IAccountant, ledger: str | os.PathLike[str] | None = None) -> None:
        self.accountant = accountant
        self.guard: BudgetGuard | None = None
        self.ledger = None if ledger is None else PrivacyLedger(ledger)
        self.settings: dict[str, Any] | None = None
        for event in self.ledger.charges if self.ledger is not None else []:
            account_for(accountant, event)

    def check_dataset(self, dataset_size: int) -> None:
        """Raise ``LedgerError`` when the ledger is about another dataset."""
        if self.ledger is not None:
            self.ledger.check_dataset(dataset_size)

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

    def resume(self, state: dict[str, Any]) -> None:
        """Take over an accountant's saved state; what this engine has spent itself stays spent."""
        if self.ledger is not None:
            return  # every charge of the checkpoint is in it
        if len(self.accountant) == 0:
            self.accountant.load_state_dict(state)
            return
        saved = type(self.accountant)()
        saved.load_state_dict(state)
        if _continues(self.accountant.history, saved.history):
            return
        warnings.warn(
            "this engine has accounted for steps that the checkpoint does not know: the sum of both is kept",
            stacklevel=4,
        )
        self.accountant.history = [*saved.history, *self.accountant.history]

    def charge(self, event: Event | None) -> None:
        """Account for a step that is about to be released; None is a step that has been paid for.

        Raises:
            PrivacyBudgetExceeded: the step does not fit into the target; nothing was charged.
        """
        if event is None:
            return
        if self.ledger is None:
            self._check(event)
        else:
            with self.ledger.locked() as others:
                for other in others:
                    account_for(self.accountant, other)
                self._check(event)
                assert self.settings is not None
                self.ledger.charge(event, dataset_size=self.settings["dataset_size"], settings=self.settings)
        account_for(self.accountant, event)

    def _check(self, event: Event) -> None:
        if self.guard is not None:
            self.guard.check(event)


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
