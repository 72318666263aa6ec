"""How long the path of a run should be, from inner products of releases with it: the scalar half of ``AutoAdam``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

# Constants of the rule. They were chosen on noisy quadratics and on one small language model.
_CAUTION = 0.1  # of the hint: a path that is too short costs a step, one that is too long may cost the run
_CAUTION_SHORT = 0.2  # _CAUTION of a short run, to which each step counts
_LEAST_CHANGE = 0.015  # of the weights, by the first step: a smaller change teaches little, however low the hint
_LEAST_CHANGE_NEW = 0.15  # the same of new weights, as adapters are: half of them begin at zero, and all go far
_NEW = 0.25  # share of entries that are zero, from which weights are new
_FAR = 2.5  # a path that is too short by this factor or more has not left its start
_LONGER = 5.0  # most by which a step lengthens the path: batches differ, and ten times too far cost whole runs
_SHORT_RUN = 20  # planned steps from which a run has the time for a slower search
_LONGER_SHORT = 7.5  # _LONGER of a short run, whose path is no longer than one step until the search ends
_STEPS_FOUND, _STEPS_FOUND_SHORT = 2.0, 1.25  # how many steps to come are as long as the path that a search found
_BLIND = 10**0.1  # most by which the path gets longer in a step that tells nothing: ten steps or more to the hint
_SHORTER = 0.5  # factor of a cut: a loss rises more steeply than a parabola, so what the slopes say would be too much
_MOST = 1e4  # most that the factor can be: along a loss that never turns it would grow without end
_CLEAR = 2.0  # multiple of its std from which an inner product is told from noise
_LEAST_SEEN = 0.4  # of the slope at the start, what the second batch has to show of it for the path to be too short
_SURE = 0.5  # std of noise by which the path gets longer less than it seems to be too short
_YOUNG = 0.1  # variance of ln(scale) from which a path may be cut: later, one batch is not believed that much
_SPREAD, _DRIFT = 0.6, 0.07  # std of ln(scale): at first, and what every step adds to it
_FLOOR, _CURVED = 0.05, 0.3  # std of a measurement of ln(scale) beside its noise: constant, and per unit of its change
_AHEAD, _BACK = 0.75, -3.0  # shares of the slope at the start beyond which the slope at the end says no more
_CAREFUL = 0.2  # of the noise of a measurement, for a steepness of 1: by this much the path is held shorter
_MOST_CAREFUL = 0.75  # most of the slope at the start that it is held short by, so that a quarter of the path is left
_UP, _DOWN = 0.5, 1.0  # most by which a measurement moves ln(scale): slopes get steeper before they fall
_STEEP_SPREAD, _STEEP_DRIFT = 2.0, 0.3  # std of the steepness: at first, and what every measurement adds to it
_FLATTEST, _STEEPEST = 0.3, 10.0  # least and most that the steepness can be
_BATCHES = 0.1  # std of a slope, as a share of that at the start, beside its noise: what batches and steps add


def are_new(zeros: float) -> bool:
    """Say whether weights are new, as those of adapters are, by the share of entries that are zero at the start."""
    return zeros >= _NEW


class Slopes(NamedTuple):
    """Slopes along a path.

    Attributes:
        start: minus the slope at the start.
        here: minus the slope at the end.
        noise: std of the noise in ``here``.
        start_noise: std of the noise in ``start``.
        single: whether the path is one release, the one that ``start`` is from.
    """

    start: float
    here: float
    noise: float
    start_noise: float
    single: bool = False


@dataclass
class PathLength:
    """The factor on the path of a run that puts its end where the slope along it is zero.

    The path is the sum of all steps so far. Along a path, a quadratic function has its minimum where the slope is zero.
    The slope at its start and at its end are inner products of releases with the path. The factor scales the whole
    path, so that a step which turns out too long is taken back in part.

    Attributes:
        scale: the factor; a tenth or a fifth at first, as the hint may be too high, or what :meth:`begin` makes of it,
            and soon 1 where nothing can be measured.
        variance: variance of ln(scale), as a Kalman filter estimates it.
        averaged: number of steps that were averaged because they did not leave the start.
        searching: whether the path still gets longer by large factors.
        measured: number of steps whose inner products said something.
        blind: number of steps whose inner products were not told from noise.
        falls: number of steps after which the path was found too long and was cut.
        short: whether the run is so short that each step of the search counts.
        steepness: how fast the slope at the end changes with ln(scale), in units of the slope at the start; 1 for a
            parabola at its minimum.
        steepness_variance: its variance, as a second Kalman filter estimates it.
        seen: slope at the end at the last measurement, in units of that at the start; 0 for none.
        went: what the last measurement added to ln(scale).
    """

    scale: float = _CAUTION
    variance: float = _SPREAD**2
    averaged: int = 1
    searching: bool = True
    measured: int = 0
    blind: int = 0
    falls: int = 0
    short: bool = False
    steepness: float = 1.0
    steepness_variance: float = _STEEP_SPREAD**2
    seen: float = 0.0
    went: float = 0.0

    @classmethod
    def planned(cls, steps: int | None) -> PathLength:
        """Return the length at the start of a run of ``steps`` steps; None where their number is not known."""
        short = steps is not None and steps < _SHORT_RUN
        return cls(short=short, scale=_CAUTION_SHORT if short else _CAUTION)

    def begin(self, size: float, zeros: float) -> None:
        """Begin with a step that changes the weights by enough to learn from, even where the hint is far too low.

        Args:
            size: root mean square of the weights before the first step, in units of the hint. A public number.
            zeros: share of their entries that are zero.
        """
        least = _LEAST_CHANGE_NEW if are_new(zeros) else _LEAST_CHANGE
        self.scale = max(self.scale, min(least * size, _MOST))

    def follow(self, slopes: Slopes) -> tuple[float, float]:
        """Change the scale by a measurement.

        Returns:
            The factors by which the steps in the path count from now on, and the next step. The steps of a search are
            averaged: in a short run they weigh 1 together, in a longer one the last always weighs 1, so that k of them
            weigh (k + 1) / 2. When the search ends, the path stays where it is, and weighs 2 steps, or 1.25 in a short
            run. Without this, a long search would leave steps that are much too short.
        """
        searched = self.searching
        kept, taken = self._follow(slopes)
        if searched and not self.searching and self.averaged > 1:
            weighs, wanted = (self.averaged + 1) / 2, _STEPS_FOUND
            if self.short:
                weighs, wanted = 1.0, _STEPS_FOUND_SHORT
            self.scale *= weighs / wanted
            kept *= wanted / weighs
        return kept, taken

    def _follow(self, slopes: Slopes) -> tuple[float, float]:
        """Change the scale by a measurement; return the factors of :meth:`follow` as they are before a search ends."""
        start, here, noise, start_noise, single = slopes
        told = start > (_CLEAR if self.searching else 1.0) * start_noise
        if not (told or single) and abs(here) > _CLEAR * noise and (here < 0 or not self.searching):
            # Of the start nothing is known, but the end is told from noise: the start is taken to be as steep.
            self._filter(slopes._replace(start=abs(here), start_noise=noise))
        elif self._is_too_long(slopes):
            self.scale *= _SHORTER
            self.variance, self.searching = _SPREAD**2, False
            self.seen = self.went = 0.0  # the next measurement is not of the path that the last one was of
            self.measured += 1
            self.falls += 1
        elif not told:
            self._blind(slopes)
        elif self.searching and here >= (_LEAST_SEEN if single else 1 - 1 / _FAR) * start:
            return self._lengthen(slopes)
        elif single:
            self._blind(slopes)  # a first release that is mostly itself, or a slope that fell: the next one tells
        else:
            self._filter(slopes)
        return 1.0, 1.0

    def _is_too_long(self, slopes: Slopes) -> bool:
        """Say whether the end leads back more steeply than the start led away, by more than noise, in a young path."""
        noise = math.hypot(slopes.noise, slopes.start_noise)
        steep = slopes.here < -max(slopes.start, 0.0) - _CLEAR * noise
        return steep and (self.searching or self.variance >= _YOUNG)

    def _lengthen(self, slopes: Slopes) -> tuple[float, float]:
        """Lengthen a path that has not left its start; return the factors of :meth:`follow`.

        The second batch shows less of the slope than the first, because the path is the first one's, or because the
        slope fell along the way. Where it may be either, the smallest factor errs by little.
        """
        start, left = slopes.start, slopes.start - slopes.here
        if not slopes.single:
            left += _SURE * math.hypot(slopes.noise, slopes.start_noise)
        change = start / max(left, start / (_LONGER_SHORT if self.short else _LONGER))
        change = max(change, _FAR if slopes.single else 1.0)
        self.scale = min(self.scale * change, _MOST)
        self.measured += 1
        if change < _FAR:
            return 1.0, 1.0
        self.averaged += 1
        return (self.averaged - 1) / self.averaged, 1 / self.averaged if self.short else 1.0

    def _blind(self, slopes: Slopes) -> None:
        """Go on towards the hint; where the end leads back, by less, and from one std of its noise on the other way."""
        self.blind += 1
        if not self.searching:
            return
        if not self.measured and self.scale > 1:
            self.scale = max(self.scale / _BLIND, 1.0)  # it began above the hint
            return
        leads = slopes.here / slopes.noise if slopes.noise > 0 else 0.0
        change = _BLIND ** min(1.0, max(-1.0, 1.0 + leads))
        self.scale = min(self.scale * change, max(self.scale, 1.0))

    def _filter(self, slopes: Slopes) -> None:
        """Move ln(scale) by a measurement, as far as that is more certain than what is known."""
        self.searching = False
        self.measured += 1
        seen = slopes.here / slopes.start
        noise = math.hypot(slopes.noise, slopes.start_noise * seen) / slopes.start
        self._learn_steepness(seen, noise)
        # Where noise hides the slope, a path that is too long would stay so, and costs more than one that is too short.
        held = min(_CAREFUL * self.steepness * noise, _MOST_CAREFUL)
        # A path that is far too long lies where the loss is flat again, and only a large change leads back.
        steepness = self.steepness if seen < held else max(self.steepness, 1.0)
        change = max(_BACK, min(seen - held, _AHEAD)) / steepness
        uncertain = (noise / steepness) ** 2 + _FLOOR**2 + (_CURVED * change) ** 2
        self.variance += _DRIFT**2
        if self.seen * seen > 0:
            # Two in a row on one side: by as much as both say beyond the noise, ln(scale) is less certain than thought.
            agreed = max(min(abs(self.seen), abs(seen)) - noise, 0.0)
            self.variance = max(self.variance, (agreed / steepness) ** 2)
        gain = self.variance / (self.variance + uncertain)
        before = self.scale
        self.scale = min(before * math.exp(min(_UP, max(-_DOWN, gain * change))), _MOST)
        self.seen, self.went = seen, math.log(self.scale / before)
        self.variance *= 1 - gain

    def _learn_steepness(self, seen: float, noise: float) -> None:
        """Learn from a measurement how far the slope moved by what the last one did to the path.

        The last one moved ln(scale) to where a slope of zero was expected. So all of this slope is a surprise: noise,
        what is not known of ln(scale), or a steepness that was taken too small or too large. The first two are weighed
        by their variances. Without this, a loss that is steeper than a parabola makes the path too long and too short
        in turn.
        """
        self.steepness_variance += _STEEP_DRIFT**2
        others = noise**2 + _BATCHES**2 + self.variance * self.steepness**2
        gain = -self.went * self.steepness_variance / (self.went**2 * self.steepness_variance + others)
        self.steepness_variance *= 1 + gain * self.went
        self.steepness = min(_STEEPEST, max(_FLATTEST, self.steepness + gain * seen))

    def entries(self) -> dict[str, Any]:
        """Return the values as entries of a parameter group."""
        return {f"path_{name}": value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> PathLength:
        """Return the length that the entries of a parameter group describe."""
        return cls(**{field.name: group[f"path_{field.name}"] for field in fields(cls)})
