"""Privacy loss distributions of whole runs: a tighter epsilon than Rényi's, and never below the truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from opacus_ac.accounting.composition import Composition, Grid
from opacus_ac.accounting.dominating_pairs import Pair, PairRounding, dominating_pairs
from opacus_ac.accounting.events import Event, check_count, check_delta
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, FloatArray, epsilon_from_rdp
from opacus_ac.accounting.rdp_table import RDPTable

_GROWTH = 2.0  # a grid is planned for so much more than was spent, so that rebuilding it stays rare
_ATTACK_DELTA = 1e-6  # the grid of attacks is planned for it, and loses 1e-10 over its top
#: How many distinct pairs are composed without rounding.
MAX_EXACT = 32


class PrivacyLosses:
    """The composed privacy loss of a growing run.

    Adding an event only counts it. When epsilon is asked for, the transforms are brought up to date, and the grid is
    rebuilt if the run has outgrown it. Events with two dominating pairs have two compositions, and the smaller epsilon
    counts.

    Guarantees:
        Never below the true epsilon of the added events: the first 32 distinct pairs are exact, later ones rounded to
        the costlier side (see ``PairRounding``), and all numerical error is added to delta (see ``Composition``).
    """

    def __init__(self) -> None:
        self._rounding = PairRounding(MAX_EXACT)
        self._counts: dict[tuple[Pair, ...], int] = {}
        self._pending: dict[tuple[Pair, ...], int] = {}
        self._compositions: list[Composition] = []
        self._grid: Grid | None = None
        self._steps = 0

    def add(self, event: Event, steps: int = 1) -> None:
        """Compose with ``steps`` events."""
        self.add_pairs(self._resolved(event, remember=True), steps)

    def add_pairs(self, pairs: tuple[Pair, ...], steps: int) -> None:
        """Compose with ``steps`` events that all of ``pairs`` dominate, as they are."""
        for counts in (self._counts, self._pending):
            counts[pairs] = counts.get(pairs, 0) + steps
        self._steps += steps

    def epsilon(self, delta: float, rdp: FloatArray, orders: FloatArray) -> float:
        """Return the epsilon of what was added.

        Args:
            delta: target delta.
            rdp: Rényi divergences of the same events, [n]; the grid is planned from them.
            orders: their orders, [n].

        Returns:
            Epsilon; ``inf`` where this method cannot say (delta too small, losses beyond 300 nats).
        """
        if not self._prepared(Grid.plan(rdp, orders, self._steps, delta), rdp, orders, delta):
            return math.inf
        return min(composition.epsilon(delta) for composition in self._compositions)

    def epsilon_after(self, event: Event, steps: int, delta: float, rdp: FloatArray, orders: FloatArray) -> float:
        """Return epsilon as it would be after ``steps`` more events; ``rdp`` includes them."""
        if not self._prepared(Grid.plan(rdp, orders, self._steps + steps, delta), rdp, orders, delta):
            return math.inf
        pairs = self._resolved(event, remember=False)
        epsilons = []
        for variant in range(max(len(self._compositions), len(pairs))):
            composition = self._compositions[min(variant, len(self._compositions) - 1)]
            epsilons.append(composition.after(pairs[min(variant, len(pairs) - 1)], steps).epsilon(delta))
        return min(epsilons)

    def attacks(self, rates: Sequence[float], rdp: FloatArray, orders: FloatArray) -> tuple[float, list[float]] | None:
        """Return the largest advantage and true-positive rates of any attacker, on a fine grid of their own.

        Args:
            rates: false-positive rates, each in [0, 1].
            rdp: Rényi divergences of the same events, [n]; the grid is planned from them.
            orders: their orders, [n].

        Returns:
            See :meth:`Composition.attacks`; None where this method cannot say (losses beyond 300 nats).
        """
        planned = Grid.plan(rdp, orders, self._steps, _ATTACK_DELTA)
        if planned is None:
            return None
        found = [c.attacks(rates) for c in _composed([Composition(planned.finer(len(self._counts)))], self._counts)]
        advantage = min(advantage for advantage, _ in found)
        return advantage, [min(caught) for caught in zip(*(each for _, each in found), strict=True)]

    def _resolved(self, event: Event, *, remember: bool) -> tuple[Pair, ...]:
        return tuple(self._rounding.resolve(pair, remember=remember) for pair in dominating_pairs(event))

    def _prepared(self, needed: Grid | None, rdp: FloatArray, orders: FloatArray, delta: float) -> bool:
        """Bring the compositions up to date, on a grid that serves; False if there is none."""
        if needed is None:
            return False
        if self._grid is None or not self._grid.serves(needed):
            roomy = Grid.plan(_GROWTH * rdp, orders, math.ceil(_GROWTH * max(self._steps, 1)), delta)
            self._grid = roomy if roomy is not None and roomy.serves(needed) else needed
            self._compositions, self._pending = [Composition(self._grid)], dict(self._counts)
        self._compositions, self._pending = _composed(self._compositions, self._pending), {}
        return True


def _composed(compositions: list[Composition], counts: Mapping[tuple[Pair, ...], int]) -> list[Composition]:
    """Return compositions with more events, one for each choice among the pairs that dominate an event."""
    for pairs, steps in counts.items():
        while len(compositions) < len(pairs):  # until here both variants were the same
            compositions.append(compositions[0].copy())
        for variant, composition in enumerate(compositions):
            composition.add(pairs[min(variant, len(pairs) - 1)], steps)
    return compositions


def pld_epsilon(counts: Mapping[Event, int], delta: float) -> float:
    """Return the epsilon of a run from its events: the smaller of the privacy-loss and the Rényi bound.

    Args:
        counts: how often each event happened, for instance ``VariableRateRDPAccountant.counts()``.
        delta: target delta.

    Returns:
        Epsilon under ``common_adjacency`` of the events' kinds; 0.0 for a run without events.

    Guarantees:
        Never below the true epsilon, if rates and noise were fixed in advance (not chosen from releases). For constant
        rates some 0.03 % above it; with many distinct rates, which are rounded up, some 0.5 %.

    Raises:
        ValueError: If delta is negative or a count is not a whole number.

    References:
        arXiv 2106.08567 (dominating pairs), 2207.04380 (discretisation), 2106.02848 (composition by FFT).

    >>> round(pld_epsilon({Event(1.0, 0.01): 1000}, delta=1e-5), 3)  # Rényi: 2.101
    1.829
    """
    check_delta(delta)
    losses, table = PrivacyLosses(), RDPTable(DEFAULT_ORDERS)
    rdp = 0.0 * table.orders
    for event, count in counts.items():
        if steps := check_count(count, f"counts[{event}]"):
            losses.add(event, steps)
            rdp = rdp + steps * table.event_row(event)
    bound = epsilon_from_rdp(rdp, table.orders, delta)[0]
    return min(bound, losses.epsilon(delta, rdp, table.orders)) if 0.0 < bound < math.inf else bound
