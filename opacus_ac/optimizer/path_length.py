"""How long the path of a run should be, from inner products of releases with it: the scalar half of ``AutoAdam``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Constants of the rule. They were chosen on noisy quadratics and on one small language model.
_CAUTION = 0.1  # of the hint: a path that is too short costs a step, one that is too long may cost the run
_FAR = 2.5  # a path that is too short by this factor or more has not left its start
_FIRST, _LONGER = 5.0, 10.0  # most by which a step lengthens the path, at first and later: a hint may be too high
_SHORTER = 10.0  # most by which a step shortens it
_BLIND = 10**0.2  # by which the scale grows towards 1 in a step that measures nothing: five steps from a tenth
_CLEAR = 2.0  # multiple of its std from which an inner product is told from noise
_CERTAIN = 0.5  # std of noise by which the path gets longer less than it seems to be too short
_SPREAD, _DRIFT = 0.6, 0.07  # std of ln(scale): at first, and what every step adds to it
_FLOOR, _CURVED = 0.05, 0.3  # std of a measurement of ln(scale) beside its noise: constant, and per unit of its change


@dataclass
class PathLength:
    """The factor on the path of a run that puts its end where the slope along it is zero.

    The path is the sum of all steps so far. Along a path, a quadratic function has its minimum where the slope is zero.
    The slope at its start and at its end are inner products of releases with the path. The factor scales the whole
    path, so that a step which turns out too long is taken back in part.

    Attributes:
        scale: the factor; a tenth at first, as the hint may be too high, and soon 1 where nothing is measured.
        variance: variance of ln(scale), as a Kalman filter estimates it.
        averaged: number of steps that were averaged because they did not leave the start.
        searching: whether the path still gets longer by large factors.
        measured: number of steps whose inner products said something.
        blind: number of steps whose inner products were not told from noise.
        falls: number of steps after which the path was found too long and was cut.
    """

    scale: float = _CAUTION
    variance: float = _SPREAD**2
    averaged: int = 1
    searching: bool = True
    measured: int = 0
    blind: int = 0
    falls: int = 0

    def follow(self, start: float, here: float, noise: float) -> float:
        """Change the scale by a measurement; return the factor by which the steps in the path count from now on.

        Args:
            start: minus the slope at the start: inner product of the first release and the path, without what both have
                in common by chance.
            here: minus the slope at the end: inner product of the last release and the path.
            noise: std of what is random in ``here``.
        """
        if here < -max(start, _CLEAR * noise):
            self._fall_back(max(start, noise), here)
        elif start <= (_CLEAR if self.searching else 1.0) * noise:
            self.blind += 1
            self.scale = max(self.scale, min(1.0, self.scale * _BLIND)) if self.searching else self.scale
        elif self.searching and start / max(start - here - noise, start / _LONGER) >= _FAR:  # it may be too short
            change = max(1.0, start / max(start - here + _CERTAIN * noise, start / self._most))
            self.scale *= change
            self.measured += 1
            if change >= _FAR:
                self.averaged += 1
                return (self.averaged - 1) / self.averaged
        else:
            self._filter(start, here, noise)
        return 1.0

    @property
    def _most(self) -> float:
        """The most by which the path gets longer now."""
        return _FIRST if self.averaged == 1 else _LONGER

    def _fall_back(self, start: float, here: float) -> None:
        """Go back towards the start: the slope at the end leads back, more steeply than it led away at the start."""
        self.scale *= max(1 / _SHORTER, start / (start - here)) if start > 0 else 0.5
        self.variance, self.searching = _SPREAD**2, False
        self.measured += 1
        self.falls += 1

    def _filter(self, start: float, here: float, noise: float) -> None:
        """Move ln(scale) by a measurement, as far as that is more certain than what is known."""
        self.searching = False
        self.measured += 1
        change = start / max(start - here, start / 4)
        moved = math.log(change)
        uncertain = (noise * change / start) ** 2 + _FLOOR**2 + (_CURVED * moved) ** 2
        self.variance += _DRIFT**2
        gain = self.variance / (self.variance + uncertain)
        self.scale *= math.exp(min(1.0, max(-1.0, gain * moved)))
        self.variance *= 1 - gain

    def entries(self) -> dict[str, Any]:
        """Return the values as entries of a parameter group."""
        return {f"path_{name}": value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> PathLength:
        """Return the length that the entries of a parameter group describe."""
        return cls(**{field.name: group[f"path_{field.name}"] for field in fields(cls)})
