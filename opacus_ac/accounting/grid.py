"""Geometric grids to which parameters are rounded, always to the costlier side, once they take too many values."""

from __future__ import annotations

import math

#: Relative spacing of the grids of rates and of noise multipliers.
RATE_STEP = 0.01
NOISE_STEP = 0.005

_LOG_NOISE = math.log1p(NOISE_STEP)


def rate_above(sample_rate: float, step: float = RATE_STEP) -> float:
    """Return the least point of the grid ``(1 + step) ** -i`` that is not below a rate in (0, 1].

    >>> 0.01 <= rate_above(0.01) <= 0.0101
    True
    """
    # The slack keeps a grid point where it is; the loop makes sure that no rounding goes below the rate.
    log_step = math.log1p(step)
    index = math.floor(-math.log(sample_rate) / log_step + 1e-6)
    rate = math.exp(-index * log_step)
    while rate < sample_rate:
        index -= 1
        rate = math.exp(-index * log_step)
    return min(rate, 1.0)


def noise_below(noise_multiplier: float) -> float:
    """Return the greatest point of the grid ``1.005 ** i`` that is not above a finite positive noise multiplier.

    >>> 0.995 <= noise_below(1.0) <= 1.0
    True
    """
    index = math.floor(math.log(noise_multiplier) / _LOG_NOISE + 1e-6)
    noise = math.exp(index * _LOG_NOISE)
    while noise > noise_multiplier:
        index -= 1
        noise = math.exp(index * _LOG_NOISE)
    return noise
