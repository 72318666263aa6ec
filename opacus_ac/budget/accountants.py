"""One face for this package's accountants and Opacus's."""

from __future__ import annotations

import math

from opacus.accountants import IAccountant

from opacus_ac.accounting import Event, PureDPAccountant, VariableRateRDPAccountant
from opacus_ac.accounting.events import check_delta, check_gaussian


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
