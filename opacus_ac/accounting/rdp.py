r"""Rényi differential privacy of the Poisson-subsampled Gaussian mechanism, exactly and without cancellation.

With V = N(0, s^2) and U = (1 - q) N(0, s^2) + q N(1, s^2), the dominating pair under add/remove adjacency, the Rényi
divergence of order a is log(A_a) / (a - 1), where A_a = E_{x~V}[(1 + u(x))^a] and u(x) = q (e^{(2x - 1) / 2s^2} - 1).
Because E_V[u] = 0, the *excess* A_a - 1 = E_V[(1 + u)^a - 1 - a u] has a non-negative integrand; everything below
computes the excess, so rows are accurate relative to their own size even where they are 1e-12, and never negative.

References:
    Mironov, Talwar, Zhang 2019, arXiv 1908.10530, theorem 5 and section 3.3 (the mechanism).
    Balle, Barthe, Gaboardi, Hsu, Sato 2020, arXiv 1905.09982, theorem 21 (conversion to epsilon).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from opacus_ac.accounting.events import check_delta, check_noise_multiplier, check_sample_rate

FloatArray = npt.NDArray[np.float64]

_LOW = (1.01, 1.015, 1.02, 1.03, 1.04, 1.05, 1.06, 1.075)
_OPACUS = (*(1 + x / 10.0 for x in range(1, 100)), *range(12, 64))
_HIGH = (64, 72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)

#: Rényi orders, [172]: Opacus's, and beyond both ends (its largest, 63, floors epsilon at 0.10 for delta = 1e-5).
DEFAULT_ORDERS: FloatArray = np.array((*_LOW, *_OPACUS, *_HIGH), dtype=np.float64)
DEFAULT_ORDERS.setflags(write=False)

_MAX_ORDER = 1 << 16  # an integer order costs memory in proportion to itself
_MAX_NODES = 4096  # of the quadrature; the default orders need them all at sigma = 0.09
_TAIL = 9.5  # standard deviations kept on either side; the Gaussian beyond them weighs e^-45
_SERIES_TERMS = 19


def rdp_poisson_gaussian(
    noise_multiplier: float, sample_rate: float, orders: Sequence[float] | FloatArray = DEFAULT_ORDERS
) -> FloatArray:
    """Return the Rényi divergences of one step of the Poisson-subsampled Gaussian mechanism.

    Args:
        noise_multiplier: ratio of the noise std to the L2 sensitivity, in [0, inf].
        sample_rate: probability that a record is in the batch, in [0, 1].
        orders: Rényi orders, [n], each above 1.

    Returns:
        Divergences [n], in nats; 0 where nothing is released, ``inf`` where nothing hides the data.

    Guarantees:
        Exact to about 1e-11 relative under add/remove adjacency, in both directions of the divergence. Fractional
        orders become an upper bound (convexity of log A in the order) for noise multipliers below about 0.09, where
        one step costs tens of nats anyway. Non-decreasing in the sample rate, non-increasing in the noise multiplier.

    Raises:
        ValueError: If an argument is out of its range.

    References:
        arXiv 1908.10530, theorem 5.

    >>> [float(round(value, 6)) for value in rdp_poisson_gaussian(1.0, 0.01, [1.5, 2, 32])]
    [0.000127, 0.000172, 11.246276]
    """
    sigma, q = check_noise_multiplier(noise_multiplier), check_sample_rate(sample_rate)
    tables = _tables(tuple(map(float, orders)))
    scale = 1.0 / sigma if sigma > 0.0 else math.inf
    precision = scale * scale
    if q == 0.0 or precision == 0.0:
        return np.zeros_like(tables.orders)
    full_batch = tables.orders * (0.5 * precision)
    if q == 1.0 or not 1e-6 <= sigma <= 1e140:  # beyond floating point's reach the unsampled value is an upper bound
        return full_batch
    rdp = np.empty_like(tables.orders)
    with np.errstate(under="ignore"):
        rdp[tables.is_whole] = _whole_orders(tables, precision, q)
        rdp[~tables.is_whole] = _fractional_orders(tables, sigma, q)
    # Sampling never costs: rounding near q = 1 must not say otherwise.
    result: FloatArray = np.minimum(rdp, full_batch)
    return result


def epsilon_from_rdp(
    rdp: Sequence[float] | FloatArray, orders: Sequence[float] | FloatArray, delta: float
) -> tuple[float, float]:
    """Convert Rényi divergences into the epsilon of (epsilon, delta)-differential privacy.

    Args:
        rdp: Rényi divergences, [n].
        orders: their orders, [n], each above 1.
        delta: target delta; 0 costs ``inf`` and 1 or more costs nothing.

    Returns:
        ``(epsilon, order)``: the least epsilon, never negative, and the order that gives it.

    Raises:
        ValueError: If the lengths differ, ``delta`` is negative, or a divergence is NaN or negative.

    References:
        arXiv 1905.09982, theorem 21.

    >>> epsilon_from_rdp([1.0], [2.0], delta=0.25)
    (1.0, 2.0)
    """
    delta = check_delta(delta)
    values, alphas = np.asarray(rdp, dtype=np.float64), _tables(tuple(map(float, orders))).orders
    if values.shape != alphas.shape:
        raise ValueError(f"rdp has shape {values.shape} and orders {alphas.shape}; give one divergence per order")
    if not bool((values >= 0.0).all()):
        raise ValueError("rdp holds a NaN or a negative number; Rényi divergences are non-negative")
    if delta >= 1.0 or not values.any():  # divergence 0 at every order: the two outputs are the same
        return 0.0, float(alphas[0])
    if delta == 0.0:
        return math.inf, float(alphas[-1])
    epsilons = values + np.log1p(-1.0 / alphas) - (math.log(delta) + np.log(alphas)) / (alphas - 1.0)
    best = int(np.argmin(epsilons))
    return max(float(epsilons[best]), 0.0), float(alphas[best])


@dataclass(frozen=True)
class _Tables:
    """What depends on the orders only. Terms of whole orders lie in one flat array, order after order."""

    orders: FloatArray
    is_whole: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]  # where each whole order's terms k = 2..order begin
    lengths: npt.NDArray[np.int64]
    k: npt.NDArray[np.int64]
    rest: FloatArray  # order - k
    log_binomial: FloatArray
    series: FloatArray  # binomial(order, j) for j = 2.., [fractional orders, _SERIES_TERMS]


@lru_cache(maxsize=8)
def _tables(orders: tuple[float, ...]) -> _Tables:
    alphas = np.array(orders, dtype=np.float64)
    if not orders or not all(1.0 < order <= _MAX_ORDER for order in orders):
        raise ValueError(f"orders must be a non-empty sequence of numbers above 1 and at most {_MAX_ORDER}")
    alphas.setflags(write=False)
    is_whole = alphas == np.floor(alphas)
    whole = alphas[is_whole].astype(np.int64)
    lengths = whole - 1
    k = np.concatenate([np.arange(2, order + 1) for order in whole]) if whole.size else np.zeros(0, np.int64)
    rest = np.repeat(whole, lengths) - k
    log_factorial = np.array([math.lgamma(n + 1.0) for n in range(int(whole.max(initial=0)) + 1)])
    log_binomial = np.repeat(log_factorial[whole], lengths) - log_factorial[k] - log_factorial[rest]
    fractional = alphas[~is_whole]
    columns, column = [], fractional
    for j in range(2, 2 + _SERIES_TERMS):
        column = column * (fractional - (j - 1)) / j
        columns.append(column)
    starts = np.cumsum(lengths) - lengths
    return _Tables(
        alphas, is_whole, starts, lengths, k, rest.astype(np.float64), log_binomial, np.stack(columns, axis=1)
    )


def _whole_orders(tables: _Tables, precision: float, q: float) -> FloatArray:
    """Rows of whole orders: A - 1 = sum_{k>=2} binomial(a, k) q^k (1-q)^(a-k) (e^((k^2-k)/2s^2) - 1), all positive."""
    if not tables.starts.size:
        return np.zeros(0)
    ks = np.arange(2.0, float(tables.k.max()) + 1.0)
    exponent = (0.5 * precision) * ks * (ks - 1.0)
    per_k = ks * math.log(q) + exponent + np.log(-np.expm1(-exponent))
    terms = tables.log_binomial + per_k[tables.k - 2] + tables.rest * math.log1p(-q)
    top = np.maximum.reduceat(terms, tables.starts)
    sums = np.add.reduceat(np.exp(terms - np.repeat(top, tables.lengths)), tables.starts)
    rows: FloatArray = np.logaddexp(0.0, top + np.log(sums)) / tables.lengths
    return rows


def _fractional_orders(tables: _Tables, sigma: float, q: float) -> FloatArray:
    """Rows of fractional orders, by the trapezoid rule on the excess; an upper bound where that takes too many nodes.

    The integrand is analytic in the strip |Im x| < pi s^2, so the rule converges like exp(-2 pi^2 s^2 / spacing).
    """
    alphas = tables.orders[~tables.is_whole]
    if not alphas.size:
        return np.zeros(0)
    spacing = min(0.5 * sigma, 0.42 * sigma * sigma)
    nodes = math.ceil((float(alphas.max()) + 2.0 * _TAIL * sigma) / spacing) + 1
    if nodes > _MAX_NODES:
        return _convexity_bound(alphas, sigma, q)
    x = spacing * np.arange(nodes) - _TAIL * sigma
    precision = 1.0 / (sigma * sigma)
    log_weight = (-0.5 * precision) * x * x
    exponent = precision * (x - 0.5)
    u = q * np.expm1(np.minimum(exponent, 700.0))
    # Where u is small the integrand cancels: there its binomial series is summed, moment by moment.
    near = np.abs(u) <= min(0.1, 1.0 / float(alphas.max()))
    small, weight = u[near], np.exp(log_weight[near])
    powers = np.cumprod(np.broadcast_to(small, (_SERIES_TERMS + 1, small.size)), axis=0)[1:]
    excess = tables.series @ (powers @ weight)
    far = ~near
    top = np.zeros_like(alphas)
    if far.any():
        # log(1 + u) without overflow, then E[(1 + u)^a] - E[1] - a E[u] over these nodes, scaled by e^top.
        log_ratio = np.where(exponent < 700.0, np.log1p(u), np.logaddexp(0.0, math.log(q) + exponent))[far]
        powered = np.multiply.outer(alphas, log_ratio) + log_weight[far]
        top = np.maximum(powered.max(axis=1), 0.0)
        mass = np.exp(log_weight[far])
        mean = q * (np.exp((-0.5 * precision) * (x[far] - 1.0) ** 2) - mass).sum()
        scaled = np.exp(powered - top[:, None]).sum(axis=1) - np.exp(-top) * (mass.sum() + alphas * mean)
        excess = np.exp(-top) * excess + np.maximum(scaled, 0.0)
    normaliser = math.log(spacing / (sigma * math.sqrt(2.0 * math.pi)))
    with np.errstate(divide="ignore"):  # log 0 = -inf is an excess of 0
        rows: FloatArray = np.logaddexp(0.0, np.log(excess) + top + normaliser) / (alphas - 1.0)
    return rows


def _convexity_bound(alphas: FloatArray, sigma: float, q: float) -> FloatArray:
    """Return an upper bound: the chord between the neighbouring whole orders, as log A is convex in the order."""
    low = np.floor(alphas)
    wanted = np.unique(np.concatenate([low, low + 1.0]))
    wanted = wanted[wanted >= 2.0]
    log_a = rdp_poisson_gaussian(sigma, q, wanted) * (wanted - 1.0)
    knots, values = np.concatenate([[1.0], wanted]), np.concatenate([[0.0], log_a])  # A = 1 at order 1
    bound: FloatArray = np.interp(alphas, knots, values) / (alphas - 1.0)
    return bound
