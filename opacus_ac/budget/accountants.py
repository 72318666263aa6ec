"""One face for the accountants of this package and those of Opacus.

The other modules of this folder ask an :class:`AccountantAdapter` and never for the class of an accountant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from opacus.accountants import IAccountant

from opacus_ac.accounting import (
    FALSE_POSITIVE_RATES,
    AttackBounds,
    Event,
    PureDPAccountant,
    VariableRateRDPAccountant,
    attack_bounds,
    attack_bounds_from_curve,
    pld_epsilon,
    rdp_event,
)
from opacus_ac.accounting.events import check_delta, check_gaussian
from opacus_ac.accounting.history import Run
from opacus_ac.accounting.opacus_accountants import CheckedGDPAccountant, CheckedPRVAccountant, CheckedRDPAccountant
from opacus_ac.budget.charges import renyi_epsilon

LOSSES = "privacy loss distribution"
"""Name of the bound from privacy losses in a report."""


class AccountantAdapter:
    """An accountant of Opacus, or any other that has Opacus's interface and no more.

    Args:
        accountant: the accountant; it is shared, not copied.

    Attributes:
        noise: which noise it knows the cost of, "gaussian" or "laplace".
        samplings: kinds of sampling that it has a bound for.
        is_filter: whether it has a privacy filter. Then rates, noise and the time of stopping may follow from releases.
        calibration: method of :func:`opacus_ac.accounting.calibrate_noise_multiplier` for rates that may change; None
            where the noise for a target has to be searched for, at one rate.
        approximation: why its figure is no bound; None where it is one.
    """

    noise: ClassVar[str] = "gaussian"
    samplings: ClassVar[frozenset[str]] = frozenset({"poisson", "shuffled"})
    is_filter: ClassVar[bool] = False
    calibration: ClassVar[str | None] = None
    approximation: ClassVar[str | None] = None

    def __init__(self, accountant: IAccountant) -> None:
        self.accountant: Any = accountant

    @property
    def name(self) -> str:
        """Name under which Opacus knows the accountant."""
        return str(self.accountant.mechanism())

    @property
    def method(self) -> str:
        """What its figure comes from, in the words of a report."""
        return self.name

    # ---------------------------------------------------------------- what was charged

    @property
    def history(self) -> list[Run]:
        """Accounted (noise multiplier, sample rate, steps), of every kind of sampling."""
        return [(float(noise), float(rate), int(steps)) for noise, rate, steps in self.accountant.history]

    @property
    def steps(self) -> int:
        """Number of charges."""
        return sum(steps for _, _, steps in self.history)

    def counts(self) -> dict[Event, int]:
        """Return the events that were charged, and how often each.

        A shuffled pass comes back as a Poisson step at rate 1, which costs the same.
        """
        counts: dict[Event, int] = {}
        for noise, rate, steps in self.history:
            event = Event(noise, rate, mechanism=self.noise)
            counts[event] = counts.get(event, 0) + steps
        return counts

    # ---------------------------------------------------------------- charges

    def check_sampling(self, sampling: str) -> None:
        """Raise ``ValueError`` when the accountant has no bound for a kind of sampling."""
        if sampling not in self.samplings:
            raise ValueError(
                f"sampling={sampling!r} has no bound in the accountant {self.name!r}, which knows Poisson batches "
                'only: use PrivacyEngine(accountant="vrdp") or "vpld"'
            )

    def charge(self, event: Event) -> None:
        """Add an event.

        Raises:
            ValueError: If the accountant has no bound for this kind of sampling or of noise; nothing is added then.
        """
        check_gaussian(event)
        self.check_sampling(event.sampling)
        self.accountant.step(noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate)

    def join(self, earlier: AccountantAdapter) -> None:
        """Add all that another accountant of this kind was charged before."""
        self.accountant.history = [*earlier.accountant.history, *self.accountant.history]

    # ---------------------------------------------------------------- bounds

    def epsilon(self, delta: float) -> float:
        """Return the epsilon spent so far, by the accountant's own rule; infinity when no bound holds.

        No bound holds after a step with noise multiplier 0.

        Raises:
            ValueError: If ``delta`` is negative.
        """
        delta = check_delta(delta)
        if delta < 1 and any(noise == 0 and rate > 0 for noise, rate, _ in self.history):
            return math.inf
        epsilon = float(self.accountant.get_epsilon(delta)) if len(self.accountant) else 0.0
        return math.inf if math.isnan(epsilon) else max(epsilon, 0.0)

    def epsilon_of(self, runs: Iterable[Run], delta: float) -> float:
        """Return the epsilon of another history by the accountant's own rule."""
        probe = type(self)(type(self.accountant)())
        probe.accountant.history = list(runs)
        return probe.epsilon(delta)

    def epsilon_after(self, event: Event, delta: float, steps: int) -> float:
        """Return epsilon after more of an event, without taking them."""
        return self.epsilon_of([*self.accountant.history, (event.noise_multiplier, event.sample_rate, steps)], delta)

    def renyi_epsilon(self, delta: float) -> float:
        """Return the Rényi bound of the Gaussian releases; 0 for others."""
        return _gaussian_renyi_epsilon(self.counts(), delta)

    def renyi_epsilon_after(self, event: Event, delta: float, steps: int) -> float:
        """Return :meth:`renyi_epsilon` after more of an event, without taking them."""
        counts = self.counts()
        return _gaussian_renyi_epsilon({**counts, event: counts.get(event, 0) + steps}, delta)

    def spent_rdp(self, order: float) -> float:
        """Return the Rényi divergence spent so far at one order, in nats.

        Raises:
            ValueError: If the order is out of range, or a release is not Gaussian.
        """
        return math.fsum(steps * float(rdp_event(event, [order])[0]) for event, steps in self.counts().items())

    def tighter_bounds(self, delta: float) -> dict[str, float]:
        """Return further bounds by method, which may be smaller.

        They hold where no rate and no noise followed from releases.
        """
        return {}

    def attacks(self, rates: Sequence[float] = FALSE_POSITIVE_RATES) -> AttackBounds:
        """Return what any attacker can do, as far as the accountant's own epsilons say.

        It holds where no rate and no noise followed from releases.

        Args:
            rates: false-positive rates.
        """
        return attack_bounds_from_curve(self.epsilon, rates)

    def notes(self, delta: float) -> list[str]:
        """Return what a reader of the bounds must know of the accountant."""
        return []

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the accountant's state."""
        return dict(self.accountant.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all that was charged by a saved state."""
        self.accountant.load_state_dict(state)

    def restored(self, state: Mapping[str, Any]) -> AccountantAdapter:
        """Return another accountant of this kind, with a saved state."""
        saved = type(self)(type(self.accountant)())
        saved.load_state_dict(state)
        return saved


class GaussianAdapter(AccountantAdapter):
    """An accountant whose history is known to be of Poisson-subsampled Gaussian releases (Opacus's "rdp" and "prv")."""

    def attacks(self, rates: Sequence[float] = FALSE_POSITIVE_RATES) -> AttackBounds:
        """Return what any attacker can do, from the privacy losses of the releases."""
        return attack_bounds(self.counts(), rates)


class RenyiAdapter(GaussianAdapter):
    """An accountant of this package for Gaussian noise, whose rates and kinds of sampling may change ("vpld")."""

    samplings = frozenset({"poisson", "shuffled", "fixed_size", "truncated_poisson"})
    calibration = "pld"

    @property
    def method(self) -> str:
        """What its figure comes from, in the words of a report."""
        return LOSSES

    @property
    def history(self) -> list[Run]:
        """Accounted (noise multiplier, sample rate, steps), of every kind of sampling."""
        others = self.accountant.other_events.items()
        return super().history + [(event.noise_multiplier, event.sample_rate, steps) for event, steps in others]

    def counts(self) -> dict[Event, int]:
        """Return the events that were charged, and how often each."""
        counts: dict[Event, int] = self.accountant.counts()
        return counts

    def charge(self, event: Event) -> None:
        """Add an event."""
        self.accountant.step_event(event)

    def join(self, earlier: AccountantAdapter) -> None:
        """Add all that another accountant of this kind was charged before."""
        for event, steps in earlier.counts().items():
            self.accountant.step_event(event, steps)

    def epsilon_after(self, event: Event, delta: float, steps: int) -> float:
        """Return epsilon after more of an event, without taking them."""
        return float(self.accountant.epsilon_after(event, delta, steps=steps))

    def renyi_epsilon(self, delta: float) -> float:
        """Return the Rényi bound of the releases."""
        return VariableRateRDPAccountant.get_epsilon(self.accountant, delta)

    def renyi_epsilon_after(self, event: Event, delta: float, steps: int) -> float:
        """Return :meth:`renyi_epsilon` after more of an event, without taking them."""
        return VariableRateRDPAccountant.epsilon_after(self.accountant, event, delta, steps)

    def spent_rdp(self, order: float) -> float:
        """Return the Rényi divergence spent so far at one order, in nats."""
        return float(self.accountant.spent_rdp(order))


class RenyiFilterAdapter(RenyiAdapter):
    """The accountant "vrdp", which is a privacy filter at one preset order."""

    is_filter = True
    calibration = "rdp"

    @property
    def method(self) -> str:
        """What its figure comes from, in the words of a report."""
        return self.name

    def tighter_bounds(self, delta: float) -> dict[str, float]:
        """Return the bound of the privacy loss distribution, which takes up to some seconds to compute."""
        return {LOSSES: pld_epsilon(self.counts(), delta)}


class LaplaceAdapter(AccountantAdapter):
    """The accountant "pure", for Laplace noise."""

    noise = "laplace"

    def charge(self, event: Event) -> None:
        """Add an event."""
        self.accountant.step_event(event)


class ApproximateAdapter(AccountantAdapter):
    """Opacus's accountant "gdp", whose figure is no bound."""

    approximation = (
        'accountant="gdp" is an approximation by the central limit theorem, which can lie far below the truth'
    )

    def notes(self, delta: float) -> list[str]:
        """Return the note that no bound is claimed, with the figure of the approximation."""
        figure = self.accountant.approximation(delta)
        return [
            f"{self.approximation}, so no finite epsilon is claimed (its figure: "
            f'{"none" if figure is None else f"{figure:.4f}"}). accountant="vrdp" would state '
            f"{self.renyi_epsilon(delta):.4f} for the same steps"
        ]


def _gaussian_renyi_epsilon(counts: Mapping[Event, int], delta: float) -> float:
    """Return the Rényi bound of the Gaussian events among others; 0 if there are none."""
    return renyi_epsilon({event: steps for event, steps in counts.items() if event.mechanism == "gaussian"}, delta)


_ADAPTERS: tuple[tuple[type[IAccountant], type[AccountantAdapter]], ...] = (
    (VariableRateRDPAccountant, RenyiAdapter),
    (PureDPAccountant, LaplaceAdapter),
    (CheckedGDPAccountant, ApproximateAdapter),
    (CheckedRDPAccountant, GaussianAdapter),
    (CheckedPRVAccountant, GaussianAdapter),
    (IAccountant, AccountantAdapter),
)


def adapt(accountant: IAccountant) -> AccountantAdapter:
    """Return an accountant behind the face that all have.

    A subclass of "vrdp" is no privacy filter: nobody knows by which rule it adds up.
    """
    if type(accountant) is VariableRateRDPAccountant:
        return RenyiFilterAdapter(accountant)
    return next(adapter for kind, adapter in _ADAPTERS if isinstance(accountant, kind))(accountant)


def retire(accountant: IAccountant) -> None:
    """Have an accountant that another one replaced refuse what it no longer knows: it would state too little."""

    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise ValueError(
            "this accountant was replaced by a privacy filter, which has its charges and all later ones: ask "
            "engine.accountant, or engine.get_epsilon(delta)"
        )

    for name in ("get_epsilon", "step", "state_dict", "load_state_dict"):
        setattr(accountant, name, refuse)
