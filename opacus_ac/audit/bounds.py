"""From observations of a mechanism to lower bounds of its privacy loss, each with a stated confidence.

``alpha`` is everywhere the probability that the bound is wrong. The normal and binomial functions are scipy's, which
Opacus itself requires.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special, stats

from opacus_ac.release.values import FloatArray

LARGEST_MU = 1e4
"""Where bounds stop: a mechanism this far from private has no noise worth the name."""


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the delta of a mu-Gaussian-DP mechanism at ``epsilon``.

    References:
        Dong, Roth and Su 2019 (arXiv 1905.02383), corollary 2.13.

    >>> round(gaussian_delta(1.0, 4.377), 7)
    1e-05
    """
    if mu == 0:
        return 0.0
    first = special.ndtr(mu / 2 - epsilon / mu)
    return float(first - math.exp(min(epsilon + special.log_ndtr(-mu / 2 - epsilon / mu), 0.0)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon >= 0 at which a mu-Gaussian-DP mechanism has at most ``delta``; 0 for mu <= 0.

    >>> round(gaussian_epsilon(1.0, 1e-5), 3)
    4.377
    """
    if mu <= 0 or gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    if mu >= LARGEST_MU:
        return math.inf
    low, high = 0.0, mu * (mu / 2 - float(special.ndtri(delta))) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def largest_rate(hits: int, trials: int, alpha: float) -> float:
    """Return the Clopper-Pearson upper bound of a probability: below it with confidence ``1 - alpha``.

    >>> round(largest_rate(0, 100, 0.05), 4)
    0.0295
    """
    return 1.0 if hits >= trials else float(stats.beta.ppf(1 - alpha, hits + 1, trials - hits))


def mu_from_errors(out_above: int, outs: int, in_below: int, ins: int, alpha: float) -> float:
    """Return a lower bound of mu from the errors of one test with a threshold fixed beforehand.

    Args:
        out_above: false alarms, observations without the record on its side of the threshold.
        outs: observations without the record.
        in_below: misses, observations with the record on the other side.
        ins: observations with the record.
        alpha: half of it is spent on each of the two error rates.

    Guarantees:
        For any mechanism whose trade-off curve lies above that of mu-Gaussian DP, ``bound > mu`` has probability at
        most ``alpha``: ``mu >= Phi^-1(1 - FPR) - Phi^-1(FNR)`` for every test.

    References:
        Nasr et al. 2023 (arXiv 2302.07956), section 4.
    """
    fpr, fnr = largest_rate(out_above, outs, alpha / 2), largest_rate(in_below, ins, alpha / 2)
    if fpr >= 1 or fnr >= 1:
        return 0.0
    return max(0.0, float(special.ndtri(1 - fpr) - special.ndtri(fnr)))


def mu_from_means(ins: FloatArray, outs: FloatArray, alpha: float) -> float:
    """Return a lower bound of (mean difference) / (standard deviation) for Gaussian observations of one variance.

    Sharper than :func:`mu_from_errors`, and good for Gaussian observations only; the error of the estimate is taken
    as normal, so give it 50 observations a side or more.
    """
    n, m = ins.size, outs.size
    if min(n, m) < 2:
        return 0.0
    squares = float(((ins - ins.mean()) ** 2).sum() + ((outs - outs.mean()) ** 2).sum())
    difference = float(ins.mean() - outs.mean())
    if difference <= 0:
        return 0.0
    mu = difference / max(math.sqrt(squares / (n + m - 2)), difference / LARGEST_MU)
    error = math.sqrt(1 / n + 1 / m + mu**2 / (2 * (n + m - 2)))
    return max(0.0, mu - float(special.ndtri(1 - alpha)) * error)


def std_interval(squares: float, degrees: int, alpha: float) -> tuple[float, float]:
    """Return the chi-square interval of a Gaussian's standard deviation.

    Args:
        squares: sum of the squared observations, around a known mean.
        degrees: number of observations.
        alpha: half of it on each side.
    """
    low = squares / stats.chi2.isf(alpha / 2, degrees)
    return math.sqrt(low), math.sqrt(squares / stats.chi2.ppf(alpha / 2, degrees))


def count_p_value(hits: int, trials: int, rate: float) -> float:
    """Return the two-sided binomial p-value of ``hits`` in ``trials`` at ``rate``."""
    tails = stats.binom.cdf(hits, trials, rate), stats.binom.sf(hits - 1, trials, rate)
    return min(1.0, 2 * float(min(tails)))


def guess_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return a bound of the probability that an (epsilon, delta)-DP training run lets ``correct`` guesses be right.

    Args:
        canaries: records that were each included with probability 1/2.
        guesses: how many of them were guessed in or out; the others were passed over. Fixed beforehand.
        correct: right guesses.
        epsilon: claim.
        delta: claim; 0 for the pure version.

    References:
        Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), theorem 5.2.
    """
    rate = float(special.expit(epsilon))
    p_value = float(stats.binom.sf(correct - 1, guesses, rate))
    if delta > 0 and correct > 0:
        # With probability up to 2 m delta / i the count is i higher than pure epsilon-DP allows.
        steps = np.arange(1, correct + 1)
        between = np.cumsum(stats.binom.pmf(correct - steps, guesses, rate))
        p_value += 2 * canaries * delta * float((between / steps).max())
    return min(1.0, p_value)


def guess_epsilon(canaries: int, guesses: int, correct: int, delta: float, alpha: float) -> float:
    """Return the largest epsilon that ``correct`` right guesses rule out with confidence ``1 - alpha``; 0 for none.

    >>> round(guess_epsilon(1000, 100, 100, 0.0, 0.05), 2)
    3.49
    """

    def refuted(epsilon: float) -> bool:
        return guess_p_value(canaries, guesses, correct, epsilon, delta) < alpha

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
