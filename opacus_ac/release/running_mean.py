"""Running means of noisy released values, and numbers shown with their error. Pure Python: pages import it too."""

from __future__ import annotations

import math
from collections import deque

WINDOW = 20
"""Most steps in a running mean."""


def with_error(value: float, error: float | None) -> str:
    """Return a number and its standard error, with the digits that the error leaves.

    >>> with_error(3.1416, 0.42), with_error(3.1416, 0.0271), with_error(31.4, 12.0), with_error(3.1416, None)
    ('3.1 ± 0.4', '3.14 ± 0.03', '31 ± 12', '3.1')
    """
    if error is None or not math.isfinite(error) or not math.isfinite(value):
        return f"{value:.2g}"
    if error == 0:
        return f"{value:.3g}"
    decimals = -math.floor(math.log10(error))
    decimals -= int(round(error, decimals) >= 10 ** (1 - decimals))  # 0.96 is shown as 1
    decimals = max(0, decimals)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


class RunningMean:
    """The mean of a noisy value over the last ``WINDOW`` steps, and the std of the noise that is left in it."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def add(self, value: float | None, std: float | None) -> None:
        """Take the value that a step released, with the std of its noise; None where it released none."""
        if value is not None and std is not None and math.isfinite(value):
            self._steps.append((value, std))

    @property
    def known(self) -> tuple[float, float] | None:
        """(mean, std of the noise in it); None before the first value."""
        if not self._steps:
            return None
        values, stds = zip(*self._steps, strict=True)
        error = math.sqrt(math.fsum(std**2 for std in stds)) / len(stds)
        return math.fsum(values) / len(values), error

    def __str__(self) -> str:
        return "not released" if self.known is None else with_error(*self.known)
