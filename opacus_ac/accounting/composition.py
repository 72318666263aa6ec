r"""Composition of privacy losses by the discrete Fourier transform, with every error on the side of a larger epsilon.

The composed loss is a sum of independent losses on one grid of n points; the running product of their transforms stands
for its distribution modulo n. What this misses is added to delta: the Chernoff bound of the probability that the sum
passes the grid's top (it would reappear at the bottom), infinite losses, the rounding of the masses, and that of the
transforms. A sum below the bottom reappears at the top, which only overstates.

References:
    Gopi, Lee, Wutschitz 2021, arXiv 2106.02848; Koskela, Jälkö, Honkela 2020, arXiv 1906.03049.
    Zhu, Dong, Wang 2022, arXiv 2106.08567, theorem 10 (dominating pairs compose).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from opacus_ac.accounting.dominating_pairs import Pair
from opacus_ac.accounting.loss_distribution import Atoms, discretise
from opacus_ac.accounting.rdp import FloatArray

_EPS = float(np.finfo(np.float64).eps)
_MIN_LOG_SIZE, _MAX_LOG_SIZE = 12, 18
_MAX_LOSS = 300.0  # beyond, e^loss and the Chernoff factors leave floating point's reach
_WRAPPED = 1e-4  # share of delta that the grid is planned to lose over its top
_FINENESS = 0.05  # spacing over the root mean square of one step's loss: epsilon grows by some 0.03 %
_FINEST = 0.002  # the same where attacks are asked for: true-positive rates grow by less than 1e-6
_FEW_PAIRS = 4  # so many distinct pairs may have grids of the largest size
_COARSER = 1.5  # a grid may be so much coarser before it is planned anew
_MARGIN = 1.1
# Exponents of the Chernoff bound, times the grid's top: two sequences that double, so that squares save exponentials.
_FIRST_TILTS = np.array([2.0, 2.0 * math.sqrt(2.0)])
_DOUBLINGS = 8
_TILTS = np.concatenate([_FIRST_TILTS * 2.0**k for k in range(_DOUBLINGS)])
_CACHED_ROWS = 64


@dataclass(frozen=True)
class Grid:
    """An even grid of ``2 ** log_size`` losses around 0, ``spacing`` nats apart."""

    spacing: float
    log_size: int
    needed: float = 0.0  # the top that the run needs, at most ``top``

    @property
    def size(self) -> int:
        """Number of points."""
        return 1 << self.log_size

    @property
    def top(self) -> float:
        """The loss at which the grid ends and begins anew at its bottom."""
        return 0.5 * self.size * self.spacing

    @staticmethod
    def plan(rdp: FloatArray, orders: FloatArray, steps: int, delta: float) -> Grid | None:
        """Return a grid for a run, from its Rényi divergences; None where no grid serves.

        Args:
            rdp: divergences of the whole run, [n].
            orders: their orders, [n].
            steps: number of composed steps.
            delta: the delta that will be asked for, in (0, 1).
        """
        if steps == 0 or not 0.0 < delta < 1.0:
            return None
        # P(loss >= l) <= exp((order - 1) (rdp - l)) must be a small share of delta at the top.
        top = float(np.min(rdp - (math.log(delta) + math.log(_WRAPPED)) / (orders - 1.0))) * _MARGIN
        if not 0.0 < top <= _MAX_LOSS:
            return None
        # Near order 1 the divergence of a step is half the variance of its loss.
        scale = math.sqrt(2.0 * float(rdp[0]) / (float(orders[0]) * steps))
        spacing = max(_FINENESS * scale, 2.0 * top / (1 << _MAX_LOG_SIZE))
        log_size = max(_MIN_LOG_SIZE, math.ceil(math.log2(2.0 * top / spacing) - 1e-9))
        size = 1 << log_size
        return Grid(min(spacing, 4.0 * _MAX_LOSS / size), log_size, top)

    def finer(self, pairs: int) -> Grid:
        """Return a grid for figures at fixed false-positive rates, for a run with so many distinct pairs.

        The error of connecting the dots shrinks with the square of the spacing. The work is bounded: the more pairs
        there are, the fewer points each gets.
        """
        wanted = math.ceil(math.log2(2.0 * self.needed / self.spacing * _FINENESS / _FINEST))
        most = _MAX_LOG_SIZE - max(0, math.ceil(math.log2(max(pairs, 1) / _FEW_PAIRS)))
        log_size = max(self.log_size, min(wanted, most))
        return Grid(2.0 * self.needed / (1 << log_size), log_size, self.needed)

    def serves(self, needed: Grid) -> bool:
        """Return whether a run that needs another grid may stay on this one."""
        return self.top >= needed.needed * (1.0 - 1e-6) and self.spacing <= _COARSER * needed.spacing


class Composition:
    """The composed privacy loss of pairs added so far, in both directions.

    Guarantees:
        ``epsilon`` is at least the true epsilon of the composed pairs, for every delta.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._transform: npt.NDArray[np.complex128] = np.ones((2, grid.size // 2 + 1), np.complex128)
        self._infinite = np.zeros(2)
        self._log_moments = np.zeros((2, len(_TILTS)))
        self._error = 0.0
        self._steps = 0
        self._rows: dict[Pair, tuple[Atoms, Atoms]] = {}

    def add(self, pair: Pair, count: int) -> None:
        """Compose with ``count`` independent steps of one pair (noise multiplier finite and positive)."""
        if count == 0 or pair.is_nothing:
            return
        transform = np.empty_like(self._transform)
        for direction, atoms in enumerate(self._row(pair)):
            row = np.fft.rfft(self._laid_out(atoms))
            transform[direction] = self._transform[direction] * _power(row, count)
            self._infinite[direction] += count * atoms.infinite
            self._log_moments[direction] += count * self._log_moment(atoms)
            self._error += count * atoms.error
        self._transform = transform
        self._steps += count

    def after(self, pair: Pair, count: int) -> Composition:
        """Return a composition with more steps; this one does not change."""
        other = self.copy()
        other.add(pair, count)
        return other

    def copy(self) -> Composition:
        """Return an independent composition (only the cache of rows is shared)."""
        other = copy.copy(self)
        other._infinite, other._log_moments = self._infinite.copy(), self._log_moments.copy()
        return other

    def epsilon(self, delta: float) -> float:
        """Return the least epsilon for delta, in [0, inf]; inf if delta is below what the errors add up to."""
        return max(self._epsilon(direction, delta) for direction in (0, 1))

    def _epsilon(self, direction: int, delta: float) -> float:
        transform, half = self._transform[direction], self.grid.size // 2
        left = delta - self._missing(direction)
        if left <= 0.0:
            return math.inf
        masses = np.fft.irfft(transform, self.grid.size)
        losses = self.grid.spacing * np.arange(half)
        above = np.maximum(masses[:half], 0.0)
        # delta(eps) = sum_{t > eps} m (1 - e^{eps - t}) = mass - e^eps * weighted, piecewise between the points.
        mass = np.cumsum(above[::-1])[::-1]
        weighted = np.cumsum((above * np.exp(-losses))[::-1])[::-1]
        deltas = mass - np.exp(losses) * weighted
        fits = np.flatnonzero(deltas <= left)
        if not fits.size:
            return math.inf
        first = int(fits[0])
        if first == 0:
            return 0.0
        # Between the points first - 1 and first only the atoms from first on count.
        return max(float(losses[first - 1]), math.log((mass[first] - left) / weighted[first]))

    def attacks(self, rates: Sequence[float]) -> tuple[float, list[float]]:
        """Return the largest advantage of any attacker, and the largest true-positive rate at false-positive rates.

        The true-positive rate is at most H_c(U || L) + c * false-positive rate for every c >= 0. H_c of atoms is
        linear between their losses, so the least value is at one of them.

        Args:
            rates: false-positive rates, each in [0, 1].

        Guarantees:
            At least the true values of the composed pairs, with U as the releases that hold the record.
        """
        half, missing = self.grid.size // 2, self._missing(0)
        above = np.maximum(np.fft.fftshift(np.fft.irfft(self._transform[0], self.grid.size)), 0.0)
        losses = self.grid.spacing * np.arange(-half, half)
        mass = np.cumsum(above[::-1])[::-1]
        weighted = np.cumsum((above * np.exp(-losses))[::-1])[::-1]
        scales = np.exp(losses)
        divergences = mass - scales * weighted + missing
        return float(divergences[half]), [min(1.0, float((divergences + scales * rate).min())) for rate in rates]

    def _missing(self, direction: int) -> float:
        """Return the probability that the masses on the grid do not show: infinite losses, and every error."""
        # Chernoff: P(loss >= top) <= E[e^{tilt loss}] e^{-tilt top}.
        wrapped = math.exp(min(0.0, float((self._log_moments[direction] - _TILTS).min())))
        return float(self._infinite[direction] + wrapped + self._error + self._rounding(self._transform[direction]))

    def _rounding(self, transform: npt.NDArray[np.complex128]) -> float:
        """Return a bound on the sum of the absolute rounding errors of the composed masses.

        One transform errs by at most e = 4 eps log2(n) per entry (its masses add up to 1). A product of T factors with
        entries |f| <= 1 then errs by at most e (2 T |F| + 1): a factor below 1/2 either is alone or is outdone by the
        others. Parseval turns the root of the sum of squares over the n frequencies into the sum over masses.
        """
        entry = 4.0 * _EPS * self.grid.log_size
        energy = 2.0 * float(np.vdot(transform, transform).real)
        return entry * (2.0 * self._steps * math.sqrt(energy) + math.sqrt(self.grid.size))

    def _row(self, pair: Pair) -> tuple[Atoms, Atoms]:
        row = self._rows.get(pair)
        if row is None:
            row = discretise(pair, self.grid.spacing, self.grid.size // 2 - 1)
            if len(self._rows) >= _CACHED_ROWS:
                del self._rows[next(iter(self._rows))]
            self._rows[pair] = row
        return row

    def _laid_out(self, atoms: Atoms) -> FloatArray:
        grid = np.zeros(self.grid.size)
        below = min(max(-atoms.start, 0), len(atoms.masses))
        if below:
            grid[atoms.start : atoms.start + below or None] = atoms.masses[:below]
        offset = max(atoms.start, 0)
        grid[offset : offset + len(atoms.masses) - below] = atoms.masses[below:]
        return grid

    def _log_moment(self, atoms: Atoms) -> FloatArray:
        """Return the log of E[e^{tilt * loss}] over the finite losses, for each tilt."""
        filled = np.flatnonzero(atoms.masses)
        losses, masses = (atoms.start + filled) * self.grid.spacing, atoms.masses[filled]
        factors = np.exp(np.multiply.outer(_FIRST_TILTS / self.grid.top, losses - losses[-1]))
        moments = np.empty(len(_TILTS))
        for k in range(_DOUBLINGS):
            moments[2 * k : 2 * k + 2] = factors @ masses
            np.square(factors, out=factors)
        result: FloatArray = np.log(moments) + _TILTS * (losses[-1] / self.grid.top)
        return result


def _power(row: npt.NDArray[np.complex128], count: int) -> npt.NDArray[np.complex128]:
    """Return ``row ** count``, by squaring."""
    result: npt.NDArray[np.complex128] | None = None
    while count:
        if count & 1:
            result = row if result is None else result * row
        count >>= 1
        if count:
            row = row * row
    assert result is not None
    return result
