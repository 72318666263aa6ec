"""The length of a path from given slopes: the scalar half of AutoAdam, without weights and releases."""

import math
import statistics

import numpy as np
import pytest

from opacus_ac.optimizer import path_length
from opacus_ac.optimizer.path_length import PathLength, Slopes


def followed(slope, *, noise, start=0.3, measurements=60, seed=0, length=PathLength):
    """Follow ``slope(scale)``, a share of that at the start, in noise of a known std; return length and true slopes."""
    draws = np.random.default_rng(seed)
    path, slopes = length(scale=math.exp(start), searching=False), []
    for _ in range(measurements):
        slopes.append(slope(path.scale))
        path.follow(Slopes(1.0, slopes[-1] + noise * draws.standard_normal(), noise, 0.1 * noise))
    return path, slopes


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize(("planned", "most"), [(None, 5), (20, 5), (1000, 5), (19, 7.5), (1, 7.5)])
def test_a_path_gets_longer_by_a_limit(planned, most):
    """Batches differ by more than the noise: adapters that went further on the word of one ended above their start."""
    length = PathLength.planned(planned)
    begins = 0.2 if most > 5 else 0.1
    for step in range(1, 4):
        length.follow(Slopes(1.0, 0.999, 0.01, 0.01, single=step == 1))
        assert length.scale == pytest.approx(begins * most**step)
    near = PathLength()
    near.follow(Slopes(1.0, 0.3, 0.01, 0.01))  # the slope fell by most of what it was: this is measured
    assert not near.searching
    assert 0.1 < near.scale < 0.15


# ---------------------------------------------------------------- measurements


def test_a_factor_has_an_end():
    length = PathLength(scale=9.9e3, searching=False)
    length.follow(Slopes(1.0, 0.9, 0.01, 0.01))
    assert length.scale == 1e4


class NotSteeper(PathLength):
    """Takes every loss for a parabola."""

    def _learn_steepness(self, seen, noise):
        pass


@pytest.mark.parametrize("steepness", [3.0, 6.0, 10.0])
def test_a_steep_loss_does_not_swing(steepness):
    """Adapters swung so, too long and too short in turn, with slopes at the end of half that at the start."""

    def late(kind):
        runs = [
            followed(lambda s: -steepness * math.log(s), noise=0.1, seed=seed, length=kind)[1][20:]
            for seed in range(20)
        ]
        return statistics.pstdev(slope for run in runs for slope in run)

    assert late(PathLength) < 0.15
    assert late(NotSteeper) > 1.5 * late(PathLength)


def test_the_steepness_is_learned_and_has_limits():
    found = [followed(lambda s: -5 * math.log(s), noise=0.05, seed=seed)[0].steepness for seed in range(20)]
    assert 3 < statistics.fmean(found) < 6
    path, _ = followed(lambda s: -60 * math.log(s), noise=0.05)
    assert 9 < path.steepness <= 10
    assert path.scale == pytest.approx(1, abs=0.1)
    flat, _ = followed(lambda s: -0.2 * math.log(s), noise=0.01)
    assert flat.steepness < 1.5


@pytest.mark.parametrize("planned", [19, 1000])
@pytest.mark.parametrize("searched", [1, 2, 4, 6])
def test_after_a_search_the_path_is_worth_a_fixed_number_of_steps(searched, planned, monkeypatch):
    """However long the search was: a run that began far too low went on with steps a third as long, and ended 5 % behind."""
    monkeypatch.setattr(path_length, "_CAREFUL", 0.0)  # a slope of zero leaves the path as it is
    length, weighs = PathLength.planned(planned), 1.0  # in steps to come
    for step in range(searched + 1):
        before = length.scale
        kept, taken = length.follow(Slopes(1.0, 1.0 if step < searched else 0.0, 0.01, 0.01, single=step == 0))
        weighs = kept * weighs + (taken if step < searched else 0.0)
    assert not length.searching
    assert length.averaged == searched + 1
    assert weighs == pytest.approx(1.25 if planned == 19 else 2.0)
    assert length.scale * weighs == pytest.approx(before * (1.0 if planned == 19 else (searched + 2) / 2))  # it stays


@pytest.mark.parametrize("away", [3.0, 5.0])
def test_a_path_far_too_long_comes_back_from_where_the_loss_is_flat(away):
    """Beyond its minimum this loss gets flat: adapters that went four times too far stayed there, above their start."""
    path, _ = followed(lambda s: math.tanh(1 - s) / (1 + s) ** 2 * 4, noise=0.01, start=math.log(away), measurements=12)
    assert 0.7 < path.scale < 1.4
    assert path.steepness >= 0.3
    stuck = PathLength(scale=away, searching=False)
    for _ in range(12):
        stuck.follow(Slopes(1.0, -0.25, 0.01, 0.01))  # however short it gets, the slope stays
    assert stuck.steepness == 0.3
    assert stuck.scale < 0.01 * away
    ahead = PathLength(scale=1.0, steepness=0.3, searching=False, variance=1.0)
    ahead.follow(Slopes(1.0, 0.25, 0.01, 0.01))  # what leads on is not taken for flat
    assert ahead.scale < math.exp(0.26)


@pytest.mark.statistical
@pytest.mark.parametrize(("noise", "within"), [(0.1, 0.01), (0.3, 0.03), (0.5, 0.06)])
def test_noise_does_not_make_a_path_shorter_than_it_is_meant_to(noise, within, monkeypatch):
    """Of a parabola, 200 seeds: the mean of ln(scale) is that of the minimum. It was 0.11 below at noise of 0.3, and 0.4 at 0.5."""

    def ends():
        return [math.log(followed(lambda s: 1 - s, noise=noise, seed=seed)[0].scale) for seed in range(200)]

    assert -0.6 * noise < statistics.fmean(ends()) < -0.15 * noise
    monkeypatch.setattr(path_length, "_CAREFUL", 0.0)
    assert abs(statistics.fmean(ends())) < within
    assert statistics.stdev(ends()) < noise / 2


@pytest.mark.statistical
def test_where_noise_hides_the_slope_the_path_is_held_shorter():
    """A path twice too long stayed so at epsilon 1, and cost 6 %: the noise let no measurement move it."""

    def mean(noise, start):
        ends = [followed(lambda s: 1 - s, noise=noise, start=start, seed=seed)[0].scale for seed in range(200)]
        return statistics.fmean(map(math.log, ends))

    assert mean(0.8, math.log(2)) == pytest.approx(mean(0.8, 0.0), abs=0.1)  # it does not stay twice too long
    assert 0 > mean(0.1, 0.0) > mean(0.3, 0.0) > mean(0.8, 0.0) > mean(2.0, 0.0) > math.log(0.2)  # a quarter is left


@pytest.mark.parametrize(
    ("steepness", "noise", "rests"),
    [(1.0, 0.5, 0.1), (3.0, 0.5, 0.3), (0.3, 1.0, 0.06), (3.0, 1.0, 0.6), (9.0, 1.0, 0.75)],
)
def test_the_slope_at_which_a_path_rests(steepness, noise, rests):
    """A fifth of the noise times the steepness. Ternary weights stayed 4 % above: a third too long is cheap in noise, and steep."""

    def moved(seen):
        path = PathLength(scale=1.0, searching=False, steepness=steepness)
        path.follow(Slopes(1.0, seen, noise, 0.0))
        return path.scale

    assert moved(rests) == pytest.approx(1.0)
    assert moved(rests - 0.01) < 1 < moved(rests + 0.01)


# ---------------------------------------------------------------- a low hint


@pytest.mark.parametrize(
    ("planned", "size", "zeros", "begins"),
    [
        (1000, 1.0, 0.0, 0.1),
        (10, 1.0, 0.0, 0.2),
        (1000, 100.0, 0.0, 1.5),
        (10, 100.0, 0.24, 1.5),
        (1000, 100.0, 0.25, 15.0),
        (1000, 0.0, 1.0, 0.1),
        (10, 1e12, 0.0, 1e4),
        (10, math.inf, 0.0, 1e4),
        (10, math.nan, 0.0, 0.2),
    ],
)
def test_the_first_step_changes_the_weights_by_enough_to_learn_from(planned, size, zeros, begins):
    length = PathLength.planned(planned)
    length.begin(size, zeros)
    assert length.scale == pytest.approx(begins)


def test_where_nothing_is_measured_a_path_that_began_above_the_hint_goes_back_to_it():
    def after(steps, **of_length):
        path = PathLength(scale=15.0, **of_length)
        for _ in range(steps):
            path.follow(Slopes(0.1, 0.1, 1.0, 1.0))
        return path.scale

    assert after(1) == pytest.approx(15 / 10**0.1)
    assert after(20) == 1
    assert after(20, measured=1) == 15  # it was measured that the path may be so long


def test_two_measurements_that_agree_are_believed():
    """A path that is known and was far too long all the same. One batch may be at fault; two that agree are not."""

    def third(first):
        path = PathLength(scale=1.0, variance=0.02, searching=False)
        path.follow(Slopes(1.0, first, 0.1, 0.1))
        before = path.scale
        path.follow(Slopes(1.0, -1.2, 0.1, 0.1))
        return path.scale / before

    assert third(-1.2) < 0.6
    assert third(0.05) > 0.75
    assert third(-0.05) > 0.75  # the first one says no more than noise would


def test_a_cut_is_no_measurement_of_the_steepness():
    """The path was halved, so that the next slope says nothing of what the one before did."""
    path = PathLength(scale=1.0, searching=False)
    path.follow(Slopes(1.0, 0.5, 1.5, 0.1))
    assert path.went != 0
    path.follow(Slopes(1.0, -1.5, 0.1, 0.1))
    assert (path.falls, path.seen, path.went) == (1, 0, 0)
    path.follow(Slopes(1.0, -0.3, 0.1, 0.1))
    assert path.steepness == 1


def test_one_batch_does_not_cut_a_path_that_is_known():
    """A slope that leads back halves a young path at once. Late in a run, where one batch in hundreds shows it, it does not."""
    back = Slopes(1.0, -1.5, 0.1, 0.1)
    young, known = PathLength(scale=1.0), PathLength(scale=1.0, variance=0.02, searching=False)
    young.follow(back)
    known.follow(back)
    assert (young.scale, young.falls, young.searching) == (0.5, 1, False)
    assert known.falls == 0
    assert 0.7 < known.scale < 0.95


@pytest.mark.parametrize("searching", [True, False])
@pytest.mark.parametrize(("here", "noise"), [(5.0, 1.0), (-5.0, 1.0), (1.5, 1.0), (-1.5, 1.0)])
def test_where_the_start_is_noise_the_end_may_tell(here, noise, searching):
    """A path that leads on at its end is too short, and one that leads back too long, whatever is known of its start."""
    length = PathLength(scale=0.3, searching=searching)
    length.follow(Slopes(0.1, here, noise, 1.0))
    if abs(here) < 2 * noise or (here > 0 and searching):  # a search goes on to the hint
        assert length.blind == 1
        step = 1.0 if here > 0 else -0.5  # the end leads back by one and a half std
        assert length.scale == pytest.approx(0.3 * 10 ** (0.1 * step) if searching else 0.3)
    else:
        assert length.measured == 1
        assert (length.scale > 0.3) == (here > 0)
        assert 0.1 < length.scale < 0.5


def test_a_path_gets_longer_by_what_is_certain():
    """Slopes that differ by nothing but noise lengthen it less, the more noise there is, and the search goes on."""
    scales = []
    for noise in (0.01, 0.3, 0.45):
        length = PathLength()
        length.follow(Slopes(1.0, 1.0, noise, noise))
        assert length.searching
        scales.append(length.scale)
    assert scales == pytest.approx([0.5, 0.1 / 0.2121, 0.1 / 0.3182], rel=1e-3)
