"""The accountant "vpld": Rényi accounting, and beside it the privacy loss distribution, which is tighter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from opacus_ac.accounting.events import Event, check_count, check_delta
from opacus_ac.accounting.history import Run
from opacus_ac.accounting.pld import PrivacyLosses
from opacus_ac.accounting.rdp_accountant import VariableRateRDPAccountant


class VariableRatePLDAccountant(VariableRateRDPAccountant):
    """Accountant whose epsilon is the smaller of the Rényi and the privacy-loss bound ("vpld").

    History, state dict and events are those of ``VariableRateRDPAccountant``. A step is
    only counted. ``get_epsilon`` brings the transforms up to date (one per new distinct pair) and takes some
    milliseconds.

    Guarantees:
        Never below the true epsilon, and never above ``VariableRateRDPAccountant``'s, if rates and noise multipliers
        were fixed before the run. If they are chosen from past releases, neither this epsilon nor any other minimum of
        several bounds is a filter: preset an order and use ``RenyiFilter``.

    References:
        arXiv 2106.08567 (dominating pairs), 2207.04380 (discretisation), 2106.02848 (composition by FFT).

    >>> accountant = VariableRatePLDAccountant()
    >>> accountant.step_event(Event(1.0, 0.01), steps=1000)
    >>> round(accountant.get_epsilon(delta=1e-5), 2)  # Rényi: 2.10
    1.83
    """

    def __init__(self) -> None:
        self._losses = PrivacyLosses()
        super().__init__()

    @classmethod
    def mechanism(cls) -> str:
        """Name under which ``register`` makes this accountant known to Opacus."""
        return "vpld"

    def _replace(self, runs: list[Run], others: dict[Event, int]) -> None:
        super()._replace(runs, others)
        self._losses = PrivacyLosses()
        for event, steps in self.counts().items():
            self._losses.add(event, steps)

    def _account(self, noise: float, rate: float, steps: int) -> None:
        super()._account(noise, rate, steps)
        self._losses.add(Event(noise, rate), steps)

    def _account_other(self, event: Event, steps: int) -> None:
        super()._account_other(event, steps)
        self._losses.add(event, steps)

    def get_epsilon(self, delta: float, alphas: Sequence[float] | None = None, **kwargs: Any) -> float:
        """Return the epsilon spent so far, under the adjacency of the events accounted (see ``common_adjacency``).

        Args:
            delta: target delta.
            alphas: Rényi orders; if given, the Rényi bound on them is returned.
            **kwargs: arguments meant for other accountants (Opacus's engine passes them on); ignored.

        Raises:
            ValueError: If ``delta`` is negative or an order is not above 1.
        """
        bound = super().get_epsilon(delta, alphas)
        if alphas is not None or not 0.0 < bound < math.inf:
            return bound
        return min(bound, self._losses.epsilon(delta, self._rdp, self._table.orders))

    def epsilon_after(self, event: Event, delta: float, steps: int = 1) -> float:
        """Return what epsilon would be after more events of one kind; the accountant does not change.

        Raises:
            ValueError: If an argument is out of range.
        """
        bound = super().epsilon_after(event, delta, steps)
        if check_count(steps, "steps") == 0 or not 0.0 < bound < math.inf:
            return bound
        after = self._rdp_after(event, int(steps))
        return min(bound, self._losses.epsilon_after(event, int(steps), check_delta(delta), after, self._table.orders))
