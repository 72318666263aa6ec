"""A bounded cache of Rényi rows, so that a sampling rate that changes every step costs one vector addition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from opacus_ac.accounting.divergence import rdp_pair
from opacus_ac.accounting.dominating_pairs import Pair, PairRounding, dominating_pairs
from opacus_ac.accounting.events import Event
from opacus_ac.accounting.grid import noise_below, rate_above
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, FloatArray, rdp_poisson_gaussian

#: How many distinct pairs have exact rows: of Poisson and shuffled events, and of the other kinds.
MAX_PLAIN, MAX_OTHER = 256, 128


class RDPTable:
    """Rényi rows per ``(noise_multiplier, sample_rate)``, exact at first, then on a conservative grid.

    The first ``max_exact`` distinct pairs get their exact row. Later pairs have their rate rounded *up* to a 1 % grid
    and, when the noise multiplier also takes more than ``max_noise`` values, that rounded *down* to a 0.5 % grid.

    Guarantees:
        Every row is at least the exact one, because the divergences do not decrease when the rate grows (a larger rate
        can be post-processed into a smaller one) or when the noise shrinks. Which pairs are exact depends only on the
        order in which pairs were first seen, so replaying a history gives the same sums.

    Args:
        orders: Rényi orders, [n].
        max_exact: how many distinct pairs are kept exact.
        max_noise: how many distinct noise multipliers are kept exact on the grid of rates.
        max_other: how many distinct pairs of events of other kinds are kept exact (see ``PairRounding``).
        max_rows: rows held in memory at most (``8 n`` bytes each); the oldest leaves first and is recomputed if needed.
    """

    def __init__(
        self,
        orders: Sequence[float] | FloatArray = DEFAULT_ORDERS,
        *,
        max_exact: int = MAX_PLAIN,
        max_noise: int = 16,
        max_other: int = MAX_OTHER,
        max_rows: int = 4096,
    ) -> None:
        self.orders: FloatArray = np.array(orders, dtype=np.float64)
        self._max_exact, self._max_noise, self._max_rows = max_exact, max_noise, max(1, max_rows)
        self._max_other = max_other
        self._rows: dict[tuple[float, float] | Pair, FloatArray] = {}
        self.forget()

    def __len__(self) -> int:
        return len(self._rows)

    def forget(self) -> None:
        """Forget which pairs were seen, so that the next ones are exact again; computed rows stay."""
        self._exact: set[tuple[float, float]] = set()
        self._noises: set[float] = set()
        self._rounding = PairRounding(self._max_other)

    def resolve(self, noise_multiplier: float, sample_rate: float, *, remember: bool = True) -> tuple[float, float]:
        """Return the pair whose row stands for these parameters: itself, or the next pair of the grid above its cost.

        Args:
            noise_multiplier: validated, in [0, inf].
            sample_rate: validated, in [0, 1].
            remember: whether this pair takes one of the exact places; False to ask what would happen.

        Returns:
            ``(noise_multiplier, sample_rate)`` with the first not larger and the second not smaller than given.
        """
        pair = (noise_multiplier, sample_rate)
        if pair in self._exact or sample_rate == 0.0 or not 0.0 < noise_multiplier < math.inf:
            return pair
        if len(self._exact) < self._max_exact:
            if remember:
                self._exact.add(pair)
            return pair
        if noise_multiplier not in self._noises:
            if len(self._noises) < self._max_noise:
                if remember:
                    self._noises.add(noise_multiplier)
            else:
                noise_multiplier = noise_below(noise_multiplier)
        return noise_multiplier, rate_above(sample_rate)

    def row(self, pair: tuple[float, float]) -> FloatArray:
        """Return the exact row of a resolved pair, [n]; read-only, computed once while it stays cached."""
        row = self._rows.get(pair)
        return self._kept(pair, rdp_poisson_gaussian(*pair, self.orders)) if row is None else row

    def event_row(self, event: Event, *, remember: bool = True) -> FloatArray:
        """Return the row that stands for one event of any kind, [n]: the best of the pairs that dominate it.

        Args:
            event: the event.
            remember: whether it takes one of the exact places; False to ask what would happen.
        """
        if event.is_plain:
            return self.row(self.resolve(event.noise_multiplier, event.sample_rate, remember=remember))
        pairs = [self._rounding.resolve(pair, remember=remember) for pair in dominating_pairs(event)]
        best: FloatArray = np.minimum.reduce([self._pair_row(pair) for pair in pairs])
        return best

    def _pair_row(self, pair: Pair) -> FloatArray:
        row = self._rows.get(pair)
        return self._kept(pair, rdp_pair(pair, self.orders)) if row is None else row

    def _kept(self, key: tuple[float, float] | Pair, row: FloatArray) -> FloatArray:
        row.setflags(write=False)
        if len(self._rows) >= self._max_rows:
            del self._rows[next(iter(self._rows))]
        self._rows[key] = row
        return row

    def total(self, counts: dict[tuple[float, float], int]) -> FloatArray:
        """Return the sum of the rows of resolved pairs, each taken as often as ``counts`` says, [n]."""
        total = np.zeros_like(self.orders)
        for pair, count in counts.items():
            if count:
                total += count * self.row(pair)
        return total
