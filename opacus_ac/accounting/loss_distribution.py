r"""Privacy losses of one dominating pair on an even grid, in both directions, never more favourable than the truth.

The loss log(U/L) of a component increases with x, so the interval of losses [t_i, t_{i+1}] is an interval of x with
masses m_U and m_L. *Connecting the dots* replaces it by two atoms, at t_i and t_{i+1}, with the same two masses: b =
(m_U - m_L e^{t_i}) / (1 - e^{-d}) goes up, the rest down. The hockey-stick divergence of the result is the true one at
the grid's points and its chord (in e^t) between them, and the true one is convex: the result dominates.

References:
    Doroshenko, Ghazi, Kamath, Kumar, Manurangsi 2022, arXiv 2207.04380 (connect the dots).
    Koskela, Jälkö, Honkela 2020, arXiv 1906.03049; Gopi, Lee, Wutschitz 2021, arXiv 2106.02848 (FFT accounting).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from opacus_ac.accounting.dominating_pairs import Component, Pair
from opacus_ac.accounting.rdp import FloatArray

_TAIL = 9.5  # standard deviations kept on either side; what lies beyond (1e-21) counts as an infinite loss
_CELLS = 4096  # of the table that starts the search for a loss's place
_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Atoms:
    """A discrete privacy loss: ``masses[i]`` at loss ``(start + i) * spacing``, the rest infinite.

    Attributes:
        start: index of the first loss.
        masses: [n], probabilities under the first distribution of the pair.
        infinite: probability of an infinite loss.
        error: bound on the sum of the rounding errors of the masses.
    """

    start: int
    masses: FloatArray
    infinite: float
    error: float


def discretise(pair: Pair, spacing: float, limit: int) -> tuple[Atoms, Atoms]:
    """Return the privacy losses of U against L and of L against U.

    Args:
        pair: a dominating pair with a finite positive noise multiplier.
        spacing: distance d of the grid's points, in nats.
        limit: losses are kept at indices from ``-limit`` to ``limit``; larger ones count as infinite, smaller ones as
            ``-limit * spacing``.

    Guarantees:
        Each result dominates its direction of the pair up to ``error``.
    """
    parts = [
        (math.exp(part.log_weight), _component(pair.noise_multiplier, part, spacing, limit)) for part in pair.components
    ]
    forward = _mixed([(weight, both[0]) for weight, both in parts])
    return forward, _mixed([(weight, both[1]) for weight, both in parts])


def _mixed(parts: list[tuple[float, Atoms]]) -> Atoms:
    start = min(atoms.start for _, atoms in parts)
    masses = np.zeros(max(atoms.start + len(atoms.masses) for _, atoms in parts) - start)
    for weight, atoms in parts:
        masses[atoms.start - start : atoms.start - start + len(atoms.masses)] += weight * atoms.masses
    infinite = sum(weight * atoms.infinite for weight, atoms in parts)
    return Atoms(start, masses, infinite, sum(weight * atoms.error for weight, atoms in parts) + _EPS * len(parts))


def _component(noise: float, part: Component, spacing: float, limit: int) -> tuple[Atoms, Atoms]:
    if part.rate == 0.0:
        nothing = Atoms(0, np.ones(1), 0.0, 0.0)
        return nothing, nothing
    law = _Law(noise, part)
    ends = law.loss(np.array([-part.down - _TAIL * noise, part.up + _TAIL * noise])) / spacing
    low = max(math.floor(ends[0]), -limit)
    high = max(min(math.ceil(ends[1]), limit), low + 1)
    t = spacing * np.arange(low, high + 1)
    upper, lower, error = law.masses(law.place(t))
    forward = _connect(low, t, upper, lower, error)
    # In the other direction the two distributions trade places and losses change sign.
    return forward, _connect(-high, -t[::-1], lower[::-1], upper[::-1], error)


def _connect(start: int, t: FloatArray, upper: FloatArray, lower: FloatArray, error: float) -> Atoms:
    """Return atoms at the points t [n] for the masses [n + 1] below, between and above them."""
    between, step = upper[1:-1], float(t[1] - t[0])
    with np.errstate(over="ignore", invalid="ignore"):
        rising = (between - lower[1:-1] * np.exp(t[:-1])) / -math.expm1(-step)
    rising = np.clip(np.nan_to_num(rising, nan=math.inf), 0.0, between)
    masses = np.zeros(len(t))
    masses[:-1] = between - rising
    masses[1:] += rising
    masses[0] += upper[0]  # a smaller loss, moved up
    return Atoms(start, masses, float(upper[-1]), error)


class _Law:
    """Loss and distribution functions of one component with rate > 0."""

    def __init__(self, noise: float, part: Component) -> None:
        self._noise, self._part = noise, part
        self._log_rate = math.log(part.rate)
        self._log_keep = math.log1p(-part.rate) if part.rate < 1.0 else -math.inf

    def loss(self, x: FloatArray) -> FloatArray:
        """Return log(U/L) at x, which is increasing."""
        return self._loss_and_slope(x)[0]

    def _loss_and_slope(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        part, precision = self._part, 1.0 / (self._noise * self._noise)
        up = self._log_rate + precision * part.up * (x - 0.5 * part.up)
        down = self._log_rate - precision * part.down * (x + 0.5 * part.down)
        log_upper, log_lower = np.logaddexp(self._log_keep, up), np.logaddexp(self._log_keep, down)
        slope = precision * (part.up * np.exp(up - log_upper) + part.down * np.exp(down - log_lower))
        return log_upper - log_lower, slope

    def place(self, t: FloatArray) -> FloatArray:
        """Return the x at which the loss is t; infinite where it never is."""
        part, variance = self._part, self._noise * self._noise
        if part.rate == 1.0:
            return variance * t / (part.up + part.down) + 0.5 * (part.up - part.down)
        if part.down == 0.0:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                inside = np.expm1(np.minimum(t, 30.0)) / part.rate
                log_ratio = np.where(t <= 30.0, np.log1p(np.maximum(inside, -1.0)), t - self._log_rate)
            # Beyond t = 30 the exact value is log((e^t - 1 + q) / q): smaller by less than e^-30, which rounds away.
            return variance / part.up * log_ratio + 0.5 * part.up
        return self._search(t)

    def _search(self, t: FloatArray) -> FloatArray:
        part = self._part
        x = np.linspace(-part.down - (_TAIL + 1.0) * self._noise, part.up + (_TAIL + 1.0) * self._noise, _CELLS)
        known = self.loss(x)
        right = np.clip(np.searchsorted(known, t), 1, _CELLS - 1)
        low, high = x[right - 1], x[right]
        rise = np.maximum(known[right] - known[right - 1], 1e-300)
        found = np.clip(low + (t - known[right - 1]) / rise * (high - low), low, high)
        for _ in range(5):
            value, slope = self._loss_and_slope(found)
            found = np.clip(found - (value - t) / np.maximum(slope, 1e-300), low, high)
        return found

    def masses(self, x: FloatArray) -> tuple[FloatArray, FloatArray, float]:
        """Return the masses of U and of L in the intervals between x [n], each [n + 1], and the sum of their errors."""
        part = self._part
        still, error = _interval_masses(x / self._noise)
        up, error_up = _interval_masses((x - part.up) / self._noise)
        down, error_down = _interval_masses((x + part.down) / self._noise) if part.down else (still, 0.0)
        upper = (1.0 - part.rate) * still + part.rate * up
        lower = (1.0 - part.rate) * still + part.rate * down
        return upper, lower, error + part.rate * (error_up + error_down)


def _interval_masses(x: FloatArray) -> tuple[FloatArray, float]:
    """Return the standard normal masses of the intervals that x [n] separates, [n + 1], each from the nearer tail."""
    tails = 0.5 * np.fromiter(map(math.erfc, (np.abs(x) * math.sqrt(0.5)).tolist()), np.float64, len(x))
    below = np.where(x < 0.0, tails, 1.0 - tails)
    above = np.where(x < 0.0, 1.0 - tails, tails)
    ends_below, ends_above = np.concatenate([[0.0], below, [1.0]]), np.concatenate([[1.0], above, [0.0]])
    left_half = np.concatenate([x, [math.inf]]) <= 0.0
    masses = np.where(left_half, np.diff(ends_below), -np.diff(ends_above))
    return np.maximum(masses, 0.0), 8.0 * _EPS * float(tails.sum())
