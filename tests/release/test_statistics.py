"""The norm histogram and noisy loss: unbiased, aligned on the global grid, and refused when ill-posed."""

import math
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import classifier, loader

from opacus_ac import PrivacyEngine
from opacus_ac.noise import SeededStream
from opacus_ac.release import GaussianMechanism, NormWindow, StepStatistics, default_histogram_weight
from opacus_ac.release.statistics import DEFAULT_WEIGHT, SMALLEST_WEIGHT, WANTED_ERROR, energy_profiles
from opacus_ac.release.values import GRID_RATIO, Decoded, StepRelease, monotone


def clipped_share(ratio):
    return np.minimum(1.0, ratio)


@pytest.mark.parametrize("bound", [1e-8, 0.3, 1.0, 7.0, 1e9])
def test_window_holds_the_bound_in_its_middle_and_lies_on_the_global_grid(bound):
    window = NormWindow.around(bound, 20)
    assert window.edges[10] <= bound * (1 + 1e-12)
    assert bound < window.edges[11] * (1 + 1e-12)
    index = np.log(window.edges) / math.log(GRID_RATIO)
    np.testing.assert_allclose(index, np.round(index), atol=1e-9)


def test_groups_cover_everything():
    window = NormWindow.around(1.0, 4)
    norms = np.array([0.0, 1e-9, window.edges[0], 1.0, window.edges[-1], 1e9, np.inf, np.nan])
    assert window.groups(norms).tolist() == [0, 0, 1, 3, 5, 5, 5, 5]


def test_without_noise_counts_and_loss_come_back():
    statistics = StepStatistics(loss_bound=5.0)
    statistics.begin(1.0, clipped_share)
    norms, losses = np.array([0.01, 0.5, 0.5, 30.0, np.inf]), np.array([1.0, 2.0, 7.0, np.nan, -1.0])
    statistics.observe(norms[:3], losses[:3])
    statistics.observe(norms[3:], losses[3:])
    histogram, loss, *_ = statistics.decode(statistics.vector(), 0.0, 5.0)
    assert histogram.counts.sum() == pytest.approx(5)
    assert histogram.counts[histogram.window.groups(np.array([0.5]))[0]] == pytest.approx(2)
    assert loss == pytest.approx((1 + 2 + 5 + 5 + 0) / 5)
    assert histogram.fraction_above(1.0) == pytest.approx(0.4)


@pytest.mark.statistical
def test_noisy_estimates_are_unbiased_with_the_stated_variance():
    """2,000 releases; means within 4.5 standard errors (about 1e-5 two-sided per group, 23 groups)."""
    statistics = StepStatistics(loss_bound=5.0)
    mechanism = GaussianMechanism(0.8, SeededStream(torch.Generator().manual_seed(3)))
    norms = np.exp(np.random.default_rng(0).standard_normal(100))
    losses = np.full(100, 2.0)
    counts, means = [], []
    for _ in range(2000):
        statistics.begin(1.0, clipped_share)
        statistics.observe(norms, losses)
        histogram, loss, *_ = mechanism.release_statistics(statistics, 100.0)
        counts.append(histogram.counts)
        means.append(loss)
    truth = np.bincount(histogram.window.groups(norms), minlength=22)
    error = np.mean(counts, 0) - truth
    assert np.all(np.abs(error) < 4.5 * np.sqrt(histogram.variances / 2000))
    ratio = np.var(counts, 0) / histogram.variances
    assert np.all(np.abs(ratio - 1) < 4.5 * math.sqrt(2 / 2000))
    std = mechanism.gradient_multiplier(statistics) / statistics.loss_weight * 5.0 / 100
    assert abs(np.mean(means) - 2.0) < 4.5 * std / math.sqrt(2000)
    assert np.std(means) == pytest.approx(std, rel=0.1)


@pytest.mark.statistical
@pytest.mark.parametrize("bound", [0.02, 1.0, 1.3, 40.0])
def test_the_std_of_the_clip_rate_is_that_of_its_noise(bound):
    """4,000 releases of an empty batch; the std of a std from them is 1.1 %, and 5 % are allowed."""
    statistics = StepStatistics()
    mechanism = GaussianMechanism(0.8, SeededStream(torch.Generator().manual_seed(4)))
    rates = []
    for _ in range(4000):
        statistics.begin(1.0, clipped_share)
        histogram, *_ = mechanism.release_statistics(statistics, 100.0)
        position = np.clip(math.log(bound) / math.log(GRID_RATIO) - histogram.window.first, 0, histogram.window.bins)
        rates.append(np.interp(position, np.arange(histogram.window.bins + 1), histogram.tails()[0]))
    assert np.std(rates) == pytest.approx(histogram.fraction_std(bound), rel=0.05)


def test_without_noise_the_clip_rate_has_none():
    statistics = StepStatistics()
    statistics.begin(1.0, clipped_share)
    histogram, *_ = statistics.decode(statistics.vector(), 0.0, 5.0)
    assert histogram.fraction_std(1.0) == 0


def test_the_std_of_a_flat_clip_rate_leaves_out_what_the_histogram_cannot_see():
    statistics = StepStatistics(histogram_weight=0.0)
    statistics.begin(1.0, clipped_share)
    histogram, *_ = statistics.decode(statistics.vector(), 0.8, 100.0)
    assert not np.isfinite(histogram.variances).all()
    assert 0 < histogram.fraction_std(0.5) < 1
    assert histogram.fraction_std(1.0) == math.inf


def test_tails_are_read_from_both_ends():
    """With a public batch size the lower bins tell about the upper tail, far better than the noisy upper bins do."""
    statistics = StepStatistics()
    statistics.begin(1.0, clipped_share)
    statistics.observe(np.full(64, 0.05), None)
    histogram, *_ = statistics.decode(statistics.vector(), 1.0, 64.0)
    tail, variance = histogram.tails()
    assert tail[0] == pytest.approx(1.0)
    assert tail[-1] == pytest.approx(0.0)
    middle = 10
    assert variance[middle] < 0.3 * np.sum(histogram.variances[middle + 1 :]) / 64**2


def test_groups_that_the_encoding_cannot_see_carry_no_information():
    statistics = StepStatistics(histogram_weight=0.0)
    statistics.begin(1.0, clipped_share)
    statistics.observe(np.array([0.1, 50.0, 50.0]), None)
    histogram, *_ = statistics.decode(statistics.vector(), 1.0, 3.0)
    assert np.isinf(histogram.variances[12:]).all()
    assert np.isfinite(histogram.tails()[0]).all()


@pytest.mark.parametrize(
    ("squares", "profile"),
    [
        ([9.0, 0.0], [1.0, 0.0]),
        ([3.0, 4.0], [0.6, 0.8]),
        ([3e300, 4e300], [0.6, 0.8]),
        ([3e-320, 4e-320], [0.6, 0.8]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([math.inf, 1.0], [0.0, 0.0]),
        ([math.nan, 1.0], [0.0, 0.0]),
    ],
)
def test_a_profile_has_length_one_or_nothing(squares, profile):
    np.testing.assert_allclose(energy_profiles(np.array([[1.0, 2.0], squares]))[1], profile, rtol=1e-3)


@pytest.mark.statistical
def test_the_noisy_profile_is_unbiased_with_the_stated_std():
    """2,000 releases of 3 groups; means and variances within 4.5 standard errors (7e-6 two-sided each). Seeded."""
    statistics = StepStatistics(loss_bound=5.0, groups=3)
    mechanism = GaussianMechanism(0.8, SeededStream(torch.Generator().manual_seed(5)))
    squares = np.random.default_rng(0).exponential([1.0, 10.0, 0.1], (50, 3))
    truth = energy_profiles(squares).sum(0) / 64
    found, losses = [], []
    for _ in range(2000):
        statistics.begin(1.0, clipped_share)
        statistics.observe(np.ones(20), np.full(20, 2.0), squares[:20])
        statistics.observe(np.ones(30), np.full(30, 2.0), squares[20:])
        released = mechanism.release_statistics(statistics, 64.0)
        found.append(released.profile.energies)
        losses.append(released.loss)
    std = released.profile.std
    assert std == pytest.approx(0.8 * math.sqrt(1 + 3 * 0.0412) / math.sqrt(0.0412) / 64)
    assert np.all(np.abs(np.mean(found, 0) - truth) < 4.5 * std / math.sqrt(2000))
    assert np.all(np.abs(np.var(found, 0) / std**2 - 1) < 4.5 * math.sqrt(2 / 2000))
    assert abs(np.mean(losses) - 2.0 * 50 / 64) < 4.5 * 5.0 * std / math.sqrt(2000)


@pytest.mark.parametrize("squares", [None, np.zeros((2, 3)), np.zeros((1, 2))])
def test_squared_norms_of_every_record_and_group_or_none(squares):
    statistics = StepStatistics(groups=2)
    statistics.begin(1.0, clipped_share)
    with pytest.raises(ValueError, match=r"profile of 2 groups.*\[B, G\]"):
        statistics.observe(np.ones(2), None, squares)


def test_profiles_of_several_processes_are_refused():
    statistics = StepStatistics(groups=2)
    statistics.begin(1.0, clipped_share)
    with pytest.raises(ValueError, match="over processes"):
        statistics.tally()


def test_monotone_keeps_a_falling_sequence_and_mends_another():
    falling = np.array([1.0, 0.7, 0.7, 0.2])
    np.testing.assert_array_equal(monotone(falling), falling)
    assert np.all(np.diff(monotone(np.array([1.0, 0.4, 0.8, 0.1]))) <= 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"histogram_weight": -1.0}, "histogram_weight"),
        ({"histogram_weight": math.nan}, "histogram_weight"),
        ({"loss_bound": 0.0}, "loss_bound"),
        ({"loss_bound": 1.0, "loss_weight": 0.0}, "loss_bound"),
        ({"bins": 1}, "bins"),
        ({"groups": -1}, "groups"),
        ({"groups": 2, "group_weight": 0.0}, "group_weight"),
        ({"groups": 2, "group_weight": math.inf}, "group_weight"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepStatistics(**arguments)


@pytest.mark.parametrize("losses", [None, np.zeros(3)])
def test_a_loss_for_every_record_or_none(losses):
    statistics = StepStatistics(loss_bound=1.0)
    statistics.begin(1.0, clipped_share)
    with pytest.raises(ValueError, match="record_losses"):
        statistics.observe(np.ones(2), losses)


@pytest.mark.parametrize(("multiplier", "size"), [(0.7, 48), (0.7, 200), (1.0, 512), (3.0, 4096), (0.8, 100)])
def test_the_default_weight_is_what_the_batch_needs(multiplier, size):
    """The std of a released clip rate near 1, whose counts are all above C, is 0.05, or what 2 % of noise buy, if that is more."""
    weight = default_histogram_weight(multiplier, size)
    std = multiplier * math.hypot(1, weight) / (weight * size)
    assert SMALLEST_WEIGHT <= weight <= DEFAULT_WEIGHT
    if SMALLEST_WEIGHT < weight < DEFAULT_WEIGHT:
        assert std == pytest.approx(WANTED_ERROR)
    assert (weight == DEFAULT_WEIGHT) == (size == 48)


def test_a_run_is_given_the_weight_that_its_batch_needs():
    for size, wanted in ((64, DEFAULT_WEIGHT), (512, default_histogram_weight(1.0, 512))):
        _, optimizer, _ = PrivacyEngine().make_private(
            module=(model := classifier()), optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader(4096, size), noise_multiplier=1.0,
        )  # fmt: skip
        assert optimizer.statistics.histogram_weight == wanted


PUBLISHED = {
    "histogram": {},
    "histogram and loss": {"loss_bound": 5.0},
    "all": {"loss_bound": 5.0, "groups": 3, "bins": 7},
    "loss": {"histogram": False, "loss_bound": 5.0},
    "nothing": {"histogram": False},
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_a_release_shows_the_vector_that_it_was_decoded_from(case):
    """So that an audit reads from a release what a record did to each entry; entries with infinite noise aside."""
    statistics = StepStatistics(**PUBLISHED[case])
    statistics.begin(1.0, clipped_share)
    squares = np.ones((3, statistics.groups)) if statistics.groups else None
    statistics.observe(np.array([0.1, 2.0, 9.0]), np.array([1.0, 2.0, 7.0]), squares)
    noisy = statistics.vector() + np.linspace(-1, 1, statistics.vector().size)
    decoded = statistics.decode(noisy, 0.8, 16.0)
    release = StepRelease(1, 1.0, 0.7, 0.8, 0.25, 16.0, None, lr_multiplier=1.0, **decoded._asdict())
    np.testing.assert_allclose(statistics.published(release), noisy, rtol=1e-12)


def test_what_statistics_say_are_fields_of_a_release():
    assert set(Decoded._fields) <= {field.name for field in fields(StepRelease)}


def test_every_statistic_is_named_in_the_report():
    named = {case: len(StepStatistics(**options).released()) for case, options in PUBLISHED.items()}
    assert named == {"histogram": 1, "histogram and loss": 2, "all": 3, "loss": 1, "nothing": 0}
