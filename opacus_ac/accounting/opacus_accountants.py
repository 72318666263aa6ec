"""Opacus's accountants with the guarantees of this package.

They are right at the edges of their domain, are never negative, and never report an approximation as a bound.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from opacus.accountants import GaussianAccountant, IAccountant, PRVAccountant, RDPAccountant
from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

from opacus_ac.accounting.events import Event, check_delta
from opacus_ac.accounting.history import append_run
from opacus_ac.accounting.pld import pld_epsilon

_MAX_GRID = 1 << 23
"""Largest grid on which Opacus's "prv" composes here; larger ones take minutes or do not fit into memory."""


class _CheckedEpsilon:
    """The epsilon of an Opacus accountant where that is a number, and the limit at the edges where it is not."""

    _opacus: type[IAccountant]
    history: list[tuple[float, float, int]]

    def get_epsilon(self, delta: float, *args: Any, **kwargs: Any) -> float:
        """Return an upper bound of epsilon, never negative; infinity where there is none.

        Args:
            delta: target delta; 0 costs infinity, 1 or more costs nothing.
            *args: as in Opacus.
            **kwargs: as in Opacus.

        Raises:
            ValueError: If ``delta`` is negative.
        """
        delta = check_delta(delta)
        runs = [run for run in self.history if run[1] > 0 and run[2] > 0 and not math.isinf(run[0])]
        if not runs or delta >= 1.0:
            return 0.0
        if delta == 0.0 or any(noise == 0 for noise, _, _ in runs):
            return math.inf
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # orders at the end of their range, and overflow, which gives infinity or NaN
            epsilon = self._epsilon(runs, delta, *args, **kwargs)
        return _by_losses(runs, delta) if math.isnan(epsilon) else max(epsilon, 0.0)

    def _epsilon(self, runs: list[tuple[float, float, int]], delta: float, *args: Any, **kwargs: Any) -> float:
        """Return Opacus's figure for runs that cost something."""
        return float(self._plain(runs).get_epsilon(delta, *args, **kwargs))

    def _plain(self, runs: list[tuple[float, float, int]]) -> IAccountant:
        """Return Opacus's own accountant with some runs."""
        plain = self._opacus()
        plain.history = runs
        return plain


def _by_losses(runs: list[tuple[float, float, int]], delta: float) -> float:
    """Return the bound of this package for the same steps."""
    counts: dict[Event, int] = {}
    for noise, rate, steps in runs:
        event = Event(noise, rate)
        counts[event] = counts.get(event, 0) + steps
    return pld_epsilon(counts, delta)


class CheckedRDPAccountant(_CheckedEpsilon, RDPAccountant):  # type: ignore[misc, unused-ignore]
    """Opacus's "rdp"; its conversion alone goes below 0 at large deltas."""

    _opacus = RDPAccountant


class CheckedPRVAccountant(_CheckedEpsilon, PRVAccountant):  # type: ignore[misc, unused-ignore]
    """Opacus's "prv", whose upper bound includes its own numerical error.

    Where its grid would not fit, the bound of "vpld" is returned.

    References:
        Gopi, Lee and Wutschitz 2021 (arXiv 2106.02848), theorem 5.5.
    """

    _opacus = PRVAccountant

    def _epsilon(self, runs: list[tuple[float, float, int]], delta: float, *args: Any, **kwargs: Any) -> float:
        try:
            fits = self._grid(runs, delta, **kwargs) <= _MAX_GRID
            epsilon = super()._epsilon(runs, delta, *args, **kwargs) if fits else math.inf
        except (ValueError, ArithmeticError, RuntimeError, MemoryError):  # overflow, or no room for delta on its grid
            epsilon = math.inf
        return _by_losses(runs, delta) if math.isinf(epsilon) else epsilon

    def _grid(
        self,
        runs: list[tuple[float, float, int]],
        delta: float,
        *,
        eps_error: float = 0.01,
        delta_error: float | None = None,
        **kwargs: Any,
    ) -> int:
        """Return the number of points on which Opacus would compose."""
        domain = self._get_domain(
            prvs=[PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in runs],
            num_self_compositions=[steps for _, _, steps in runs],
            eps_error=eps_error,
            delta_error=delta / 1000 if delta_error is None else delta_error,
        )
        return int(domain.size)


class CheckedGDPAccountant(_CheckedEpsilon, GaussianAccountant):  # type: ignore[misc, unused-ignore]
    """Opacus's "gdp", which reports an infinite epsilon once a step was taken.

    Its figure rests on a central limit theorem and can lie far below the true epsilon.

    References:
        arXiv 2106.02848, section 1 (it underestimates).
    """

    _opacus = GaussianAccountant

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Opacus's own warning came when its accountant was made
            super().__init__()

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Add a step; unlike Opacus's accountant, rates and noise may change."""
        self.history = list(self.history)
        append_run(self.history, float(noise_multiplier), float(sample_rate), 1)

    def _epsilon(self, runs: list[tuple[float, float, int]], delta: float, *args: Any, **kwargs: Any) -> float:
        return math.inf

    def approximation(self, delta: float) -> float | None:
        """Return Opacus's figure, which is no bound; None where it has none."""
        if len(self.history) != 1:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return float(self._plain(self.history).get_epsilon(delta))
        except (ValueError, ArithmeticError):
            return None


_CHECKED = {
    RDPAccountant: CheckedRDPAccountant,
    PRVAccountant: CheckedPRVAccountant,
    GaussianAccountant: CheckedGDPAccountant,
}


def checked(accountant: IAccountant) -> IAccountant:
    """Return the checked form of an accountant of Opacus, with its history; any other as it is."""
    kind = _CHECKED.get(type(accountant))
    if kind is None:
        return accountant
    found = kind()
    found.history = accountant.history
    return found
