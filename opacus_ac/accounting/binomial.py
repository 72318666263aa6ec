"""Tails of the binomial distribution, in logarithms, without lgamma (whose error grows with its argument)."""

from __future__ import annotations

import math

import numpy as np


def log_tail(trials: int, probability: float, at_least: int) -> float:
    """Return the log of P(Binomial(trials, probability) >= at_least).

    The probabilities around the mode are built from their ratios and normalised by their own sum, which is 1 up to
    e^-700.

    Args:
        trials: number of draws, at least 0.
        probability: probability of success of each draw, in [0, 1].
        at_least: the threshold; 0 or less has probability 1.

    Returns:
        The logarithm, ``-inf`` for impossible events. Relative error of the probability below 1e-10 within 40 standard
        deviations (and 400 draws) of the mean; Chernoff's upper bound beyond.

    >>> round(1024 * math.exp(log_tail(10, 0.5, 8)), 6)
    56.0
    """
    if at_least <= 0:
        return 0.0
    if at_least > trials or probability <= 0.0:
        return -math.inf
    if probability >= 1.0:
        return 0.0
    mean = trials * probability
    reach = math.ceil(40.0 * math.sqrt(mean * (1.0 - probability)) + 400.0)
    if at_least - mean > reach:
        return _chernoff(trials, probability, at_least)
    low, high = max(0, math.floor(mean) - reach), min(trials, math.ceil(mean) + 2 * reach)
    if at_least < low:
        return 0.0
    k = np.arange(low, high, dtype=np.float64)
    ratios = np.log(trials - k) - np.log(k + 1.0) + (math.log(probability) - math.log1p(-probability))
    weights = np.concatenate([[0.0], np.cumsum(ratios)])
    tail = weights[at_least - low :]
    return min(0.0, _log_sum(tail) - _log_sum(weights))


def _log_sum(values: np.ndarray) -> float:
    top = float(values.max())
    return top + math.log(float(np.exp(values - top).sum()))


def _chernoff(trials: int, probability: float, at_least: int) -> float:
    """Return the upper bound exp(-n KL(k/n || p)) for k above the mean."""
    share = at_least / trials
    divergence = share * math.log(share / probability)
    if share < 1.0:
        divergence += (1.0 - share) * (math.log1p(-share) - math.log1p(-probability))
    return -trials * divergence
