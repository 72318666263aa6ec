"""How long the path of a run should be, from inner products of releases with it: the scalar half of ``AutoAdam``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# Constants of the rule. They were chosen on noisy quadratics and on one small language model.
_CAUTION = 0.1  # of the hint: a path that is too short costs a step, one that is too long may cost the run
_FAR = 2.5  # a path that is too short by this factor or more has not left its start
_LONGER = 5.0  # most by which a step lengthens the path: batches differ, and ten times too far cost whole runs
_SHORTER = 10.0  # most by which a step shortens it
_CLEAR = 2.0  # multiple of its std from which an inner product is told from noise
_LEAST_SEEN = 0.4  # of the slope at the start, what the second batch may show of it and the path be too short still
_SPREAD, _DRIFT = 0.6, 0.07  # std of ln(scale): at first, and what every step adds to it
_FLOOR, _CURVED = 0.05, 0.3  # std of a measurement of ln(scale) beside its noise: constant, and per unit of its change


@dataclass
class PathLength:
    """The factor on the path of a run that puts its end where the slope along it is zero.

    The path is the sum of all steps so far. Along a path, a quadratic function has its minimum where the slope is zero.
    The slope at its start and at its end are inner products of releases with the path. The factor scales the whole
    path, so that a step which turns out too long is taken back in part.

    Attributes:
        scale: the factor; a tenth at first, for the case that the hint is too high, and 1 where it cannot be measured.
        variance: variance of ln(scale), as a Kalman filter estimates it.
        averaged: number of steps that were averaged because they did not leave the start.
        seen: slope at the start by later releases, of a path that has not left it, over that by the first release. The
            path consists of first releases, so it has the random part of their batches in common with them.
        searching: whether the path still gets longer by large factors.
        measured: number of steps whose inner products said something.
        blind: number of steps whose inner products were not told from noise.
        falls: number of steps after which the path was found too long and was cut.
    """

    scale: float = _CAUTION
    variance: float = _SPREAD**2
    averaged: int = 1
    seen: float = 1.0
    searching: bool = True
    measured: int = 0
    blind: int = 0
    falls: int = 0

    def follow(self, start: float, here: float, noise: float) -> float:
        """Change the scale by a measurement; return the factor by which the steps in the path count from now on.

        Args:
            start: minus the slope at the start: inner product of the first release and the path, without the noise that
                both have in common.
            here: minus the slope at the end: inner product of the last release and the path.
            noise: std of the noise in ``here``.
        """
        if here < -max(start, _CLEAR * noise):
            self._fall_back(max(start, noise), here)
        elif start <= (_CLEAR if self.searching else 1.0) * noise:
            self.blind += 1
            self.scale = max(self.scale, 1.0) if self.searching else self.scale
        elif self.searching and (change := self._lengthening(start, here, noise)) >= _FAR:
            self.seen = max(min(here / start, 1.0), _LEAST_SEEN if self.averaged == 1 else self.seen)
            self.scale *= change
            self.averaged += 1
            self.measured += 1
            return (self.averaged - 1) / self.averaged
        else:
            self._filter(start, here, noise)
        return 1.0

    def _lengthening(self, start: float, here: float, noise: float) -> float:
        """Return the factor by which the path is too short at least, but for its noise.

        The second batch of a run shows less of the slope than the first, because the path is the first one's, or
        because the slope fell along the way. Where it may be either, the smallest factor errs by little.
        """
        known = start * self.seen
        change = known / max(known - here - noise, known / _LONGER)
        return max(change, _FAR) if self.averaged == 1 and here > _LEAST_SEEN * start else change

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
