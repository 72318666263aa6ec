"""Rényi rows of dominating pairs: closed forms where they exist, quadrature for mixtures that shift both ways.

Rényi divergences do not increase when a pair is replaced by one that it dominates, so a row of a dominating pair, the
larger of both directions, bounds the step. As in ``rdp`` everything computes the excess A - 1 >= 0 of
A = E_L[(U/L)^a], relative to its own size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from opacus_ac.accounting.dominating_pairs import Component, Pair, dominating_pairs
from opacus_ac.accounting.events import Event
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, FloatArray, rdp_poisson_gaussian

_TAIL = 9.5  # standard deviations kept on either side
_MAX_CELLS = 1 << 20  # nodes times orders of one quadrature
_SERIES_TERMS = 12
_SERIES_LIMIT = 0.05


def rdp_event(event: Event, orders: Sequence[float] | FloatArray = DEFAULT_ORDERS) -> FloatArray:
    """Return the Rényi divergences of one step of any kind.

    Args:
        event: the step.
        orders: Rényi orders, [n], each above 1.

    Returns:
        Divergences [n], in nats; 0 where nothing is released, ``inf`` where nothing hides the data.

    Guarantees:
        An upper bound under the adjacency of the event's kind (see ``pairs``), exact for its dominating pair up to
        1e-9 relative; at each order the best of the pairs that dominate the event.

    Raises:
        ValueError: If an order is out of range.

    >>> [float(round(value, 4)) for value in rdp_event(Event(2.0, 0.01, "fixed_size"), [2, 8])]
    [0.0003, 0.0014]
    """
    rows = [rdp_pair(pair, orders) for pair in dominating_pairs(event)]
    best: FloatArray = np.minimum.reduce(rows)
    return best


def rdp_pair(pair: Pair, orders: Sequence[float] | FloatArray = DEFAULT_ORDERS) -> FloatArray:
    """Return the Rényi divergences of a dominating pair, at each order the larger of both directions, [n].

    Raises:
        ValueError: If an order is out of range.
    """
    if len(pair.components) == 1 and (scale := _one_way(pair.components[0])) is not None:
        return rdp_poisson_gaussian(pair.noise_multiplier / scale, pair.components[0].rate, orders)
    alphas = np.asarray(orders, dtype=np.float64)
    rdp_poisson_gaussian(math.inf, 0.0, orders)  # checks the orders
    if pair.is_nothing:
        return np.zeros_like(alphas)
    log_excess = np.full_like(alphas, -math.inf)
    for part in pair.components:
        if part.rate > 0.0:
            log_excess = np.logaddexp(log_excess, part.log_weight + _log_excess(pair.noise_multiplier, part, alphas))
    rows: FloatArray = np.logaddexp(0.0, log_excess) / (alphas - 1.0)
    return rows


def _one_way(part: Component) -> float | None:
    """Return the shift of a component that is a Poisson-subsampled or plain Gaussian, else None."""
    if part.rate == 1.0:
        return part.up + part.down
    return part.up if part.down == 0.0 else None


def _log_excess(noise: float, part: Component, alphas: FloatArray) -> FloatArray:
    scale = _one_way(part)
    if scale is not None:
        exponent = (alphas - 1.0) * rdp_poisson_gaussian(noise / scale, part.rate, alphas)
        with np.errstate(divide="ignore"):
            log_excess: FloatArray = exponent + np.log(-np.expm1(-exponent))
        return log_excess
    forward = _quadrature(noise, part.rate, part.up, part.down, alphas)
    backward = _quadrature(noise, part.rate, part.down, part.up, alphas)
    return np.maximum(forward, backward)


def _quadrature(noise: float, rate: float, up: float, down: float, alphas: FloatArray) -> FloatArray:
    """Log excess of every order, orders of similar size together (their integrands reach equally far)."""
    result = np.full_like(alphas, math.inf)
    if noise == 0.0:
        return result
    spacing = min(0.4 * noise, 0.42 * noise * noise / max(up, down))
    group = np.ceil(np.log2(alphas))
    for index in np.unique(group):
        chosen = group == index
        reach = float(alphas[chosen].max()) * (up + (down if rate > 0.5 else 0.0))
        nodes = (reach + down + 2.0 * _TAIL * noise) / max(spacing, 1e-300)
        if nodes * int(chosen.sum()) <= _MAX_CELLS:
            x: FloatArray = -down - _TAIL * noise + spacing * np.arange(math.ceil(nodes) + 1, dtype=np.float64)
            result[chosen] = _trapezoid(x, spacing, noise, rate, (up, down), alphas[chosen])
    return result


def _trapezoid(
    x: FloatArray, spacing: float, noise: float, rate: float, shifts: tuple[float, float], alphas: FloatArray
) -> FloatArray:
    """Return the log of E_L[(1 + v)^a - 1 - a v], v = U/L - 1, by the trapezoid rule.

    The integrand is analytic in the strip |Im x| < pi s^2 / max(shifts): an error like exp(-2 pi^2 s^2 / (c spacing)).
    """
    up, down = shifts
    precision = 1.0 / (noise * noise)
    log_up, log_down = precision * up * (x - 0.5 * up), -precision * down * (x + 0.5 * down)
    log_keep, log_rate = math.log1p(-rate), math.log(rate)
    log_lower = np.logaddexp(log_keep, log_rate + log_down)
    log_ratio = np.logaddexp(log_keep, log_rate + log_up) - log_lower
    # log_ratio cancels where it is small; its own excess does not.
    v = rate * (np.expm1(np.minimum(log_up, 600.0)) - np.expm1(np.minimum(log_down, 600.0)))
    v = v * np.exp(-log_lower)
    near = np.abs(v) <= _SERIES_LIMIT
    log_ratio = np.where(near, np.log1p(np.where(near, v, 0.0)), log_ratio)
    density = -0.5 * precision * x * x + log_lower + math.log(spacing / (noise * math.sqrt(2.0 * math.pi)))
    terms = _log_gap(log_ratio, v, alphas[:, None]) + density
    top = terms.max(axis=1)
    result: FloatArray = top + np.log(np.exp(terms - top[:, None]).sum(axis=1))
    return result


def _log_gap(log_ratio: FloatArray, v: FloatArray, alphas: FloatArray) -> FloatArray:
    """Return log((1 + v)^a - 1 - a v), [orders, nodes], from v and log(1 + v)."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        powered = alphas * log_ratio
        # v > 0: a log(1+v) + log(1 - (1 + a v) (1+v)^-a); v < 0: no overflow.
        linear = np.log1p(alphas * np.maximum(v, 0.0)) - powered
        above = powered + np.log(-np.expm1(np.minimum(linear, 0.0)))
        below = np.log(np.maximum(np.expm1(np.minimum(powered, 0.0)) - alphas * np.minimum(v, 0.0), 0.0))
        series = np.zeros_like(powered)
        for j in range(_SERIES_TERMS + 1, 2, -1):
            series = (alphas - (j - 1)) / j * v * (1.0 + series)
        small = 2.0 * np.log(np.abs(v)) + np.log(0.5 * alphas * (alphas - 1.0)) + np.log1p(series)
    limit = _SERIES_LIMIT / np.maximum(alphas, 1.0)
    gap: FloatArray = np.where(np.abs(v) <= limit, small, np.where(v > 0.0, above, below))
    return gap
