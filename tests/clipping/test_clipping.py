"""Clip policies: they find the percentile from any start, stay in their limits, and continue from a checkpoint."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm as normal

from opacus_ac.clipping import (
    POLICIES,
    GeometricPolicy,
    PercentilePolicy,
    RawPercentilePolicy,
    build_policy,
    paper_policy,
)
from opacus_ac.clipping.percentile import MAX_CHANGE, SEARCH_STEPS
from opacus_ac.noise import SeededStream
from opacus_ac.optimizer import ClipRateControl
from opacus_ac.release import GaussianMechanism, StepRelease, StepStatistics


def follow(policy, *, batch, noise, steps, seed, spread=1.0):
    """Run ``policy`` on lognormal gradient norms (median 1) with private statistics; return C after every step."""
    statistics = StepStatistics()
    mechanism = GaussianMechanism(noise, SeededStream(torch.Generator().manual_seed(seed)))
    random = np.random.default_rng(seed)
    chosen = []
    for step in range(1, steps + 1):
        norms = np.exp(spread * random.standard_normal(random.poisson(batch)))
        statistics.begin(policy.bound, policy.gradient_share)
        statistics.observe(norms, None)
        if not policy.is_private:
            policy.observe_private(torch.from_numpy(norms))
        policy.update(release(mechanism, statistics, policy.bound, batch, step))
        chosen.append(policy.bound)
    return np.array(chosen)


def release(mechanism, statistics, bound, batch, step=1):
    histogram, loss, *_ = mechanism.release_statistics(statistics, batch)
    return StepRelease(
        step=step,
        max_grad_norm=bound,
        noise_multiplier=mechanism.noise_multiplier,
        gradient_noise_multiplier=mechanism.gradient_multiplier(statistics),
        sample_rate=0.01,
        expected_batch_size=batch,
        clip_rate=histogram.fraction_above(bound),
        loss=loss,
        lr_multiplier=1.0,
        histogram=histogram,
    )


def percentile(rate, spread=1.0):
    return math.exp(spread * normal.ppf(1 - rate))


def trial(rate, start, *, batch, steps, noise=0.8, seeds=31):
    """Return C over the true percentile, [seeds, steps], from ``start`` times the truth."""
    truth = percentile(rate)
    runs = [
        follow(build_policy("percentile", truth * start, rate, batch), batch=batch, noise=noise, steps=steps, seed=s)
        for s in range(seeds)
    ]
    return np.array(runs) / truth


@pytest.mark.statistical
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.1, 10.0])
def test_ten_steps_find_the_percentile(rate, start):
    """B = 256, z_eff = 0.98 z_g, 31 seeds: median error of C after 10 steps <= 15 %, clip rate after 50 within 0.05."""
    ratio = trial(rate, start, batch=256, steps=50)
    assert np.median(np.abs(ratio[:, 9] - 1)) <= 0.15
    rate_after = normal.sf(np.log(ratio[:, -1] * percentile(rate)))
    assert np.median(np.abs(rate_after - rate)) <= 0.05
    assert np.mean(np.abs(rate_after - rate) <= 0.05) >= 0.9


@pytest.mark.statistical
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 1e3])
def test_thirty_steps_find_it_from_a_thousandfold_error(rate, start):
    ratio = trial(rate, start, batch=256, steps=30, seeds=21)
    assert np.median(np.abs(ratio[:, -1] - 1)) <= 0.15


@pytest.mark.statistical
@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.1, 10.0])
def test_small_batches_need_twenty_steps(rate, start):
    """B = 48, 41 seeds: median error of C after 20 steps <= 15 %."""
    ratio = trial(rate, start, batch=48, steps=20, seeds=41)
    assert np.median(np.abs(ratio[:, -1] - 1)) <= 0.15


def test_the_convergence_trial_can_fail():
    """The geometric rule with a small rate is not there after ten steps: the trial above tells rules apart."""
    truth = percentile(0.5)
    policy = GeometricPolicy(10 * truth, target_clip_rate=0.5, rate=0.1)
    chosen = follow(policy, batch=256, noise=0.8, steps=10, seed=0)
    assert abs(chosen[-1] / truth - 1) > 0.15


@pytest.mark.parametrize("start", [0.1, 10.0])
def test_geometric_rule_converges_in_the_end(start):
    truth = percentile(0.5)
    policy = GeometricPolicy(start * truth, target_clip_rate=0.5, rate=0.5)
    assert follow(policy, batch=256, noise=0.5, steps=80, seed=0)[-1] == pytest.approx(truth, rel=0.15)


def test_raw_rule_is_the_published_percentile():
    policy = RawPercentilePolicy(3.0, target_clip_rate=0.2, history=50)
    norms = torch.arange(1, 101, dtype=torch.float64)
    policy.observe_private(norms)
    statistics = StepStatistics(histogram=False)
    statistics.begin(3.0, policy.gradient_share)
    policy.update(None)
    assert policy.bound == pytest.approx(float(np.quantile(np.arange(51, 101), 0.8)))


@pytest.mark.parametrize("name", POLICIES)
def test_change_and_limits_are_respected(name):
    policy = build_policy(name, 1.0, 0.5, 64)
    policy.min_norm, policy.max_norm = 0.05, 4.0
    chosen = np.concatenate([[1.0], follow(policy, batch=64, noise=3.0, steps=40, seed=5)])
    assert np.all((chosen >= 0.05) & (chosen <= 4.0))
    if policy.is_private:
        changes = np.diff(np.log(chosen))
        assert np.all(changes <= math.log(MAX_CHANGE) + 1e-12)
        assert np.all(changes[SEARCH_STEPS:] >= -math.log(MAX_CHANGE) - 1e-12)


def test_a_bound_far_too_large_is_left_in_one_step():
    truth = percentile(0.9)
    chosen = follow(build_policy("percentile", 50 * truth, 0.9, 256), batch=256, noise=0.8, steps=1, seed=0)
    assert chosen[0] == pytest.approx(truth, rel=0.5)


@pytest.mark.parametrize("name", POLICIES)
def test_state_continues_exactly(name):
    def fresh():
        return build_policy(name, 2.0, 0.5, 64)

    whole, first, second = fresh(), fresh(), fresh()
    everything = follow(whole, batch=64, noise=0.8, steps=6, seed=9)
    follow(first, batch=64, noise=0.8, steps=6, seed=9)
    second.load_state_dict(first.state_dict())
    assert second.bound == everything[-1]
    later = [follow(p, batch=64, noise=0.8, steps=3, seed=11) for p in (whole, second)]
    np.testing.assert_array_equal(*later)


def test_state_of_another_policy_is_refused():
    with pytest.raises(ValueError, match="geometric"):
        build_policy("percentile", 1.0, 0.5, 64).load_state_dict(build_policy("geometric", 1.0, 0.5, 64).state_dict())


def test_paper_preset_has_the_published_constants():
    policy = paper_policy("percentile", 3.0, 64)
    assert isinstance(policy, PercentilePolicy)
    assert (policy.target_clip_rate, policy.min_norm, policy.max_norm) == (0.2, 0.1, 10.0)
    assert policy.window == math.ceil(1000 / 64)
    with pytest.raises(ValueError, match="paper"):
        paper_policy("geometric", 3.0, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_policy("median", 1.0, 0.5, 64), "unknown clip_policy"),
        (lambda: build_policy("percentile", 0.0, 0.5, 64), "max_grad_norm"),
        (lambda: build_policy("percentile", math.inf, 0.5, 64), "max_grad_norm"),
        (lambda: build_policy("percentile", 1.0, 1.0, 64), "target_clip_rate"),
        (lambda: PercentilePolicy(1.0, min_norm=2.0, max_norm=1.0), "min_norm"),
        (lambda: PercentilePolicy(1.0, window=0), "window"),
    ],
)
def test_bad_settings_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("rate", "expected"), [(0.5, 1.0), (0.61, 0.995), (0.39, 1.01), (None, 1.0)])
def test_learning_rate_follows_the_clip_rate_outside_its_band(rate, expected):
    control = ClipRateControl(0.5, smoothing=0.0)
    control.update(rate)
    assert control.multiplier == pytest.approx(expected)


def test_learning_rate_multiplier_stays_in_its_limits():
    control = ClipRateControl(0.5)
    for _ in range(2000):
        control.update(1.0)
    assert control.multiplier == 0.1
    with pytest.raises(ValueError, match="lr_control"):
        ClipRateControl(1.5)
    with pytest.raises(ValueError, match="smoothing"):
        ClipRateControl(0.5, smoothing=1.0)


@pytest.mark.statistical
def test_noise_alone_does_not_move_the_learning_rate():
    """1,000 noisy rates around the target (std 0.1, as with batches of 40): smoothed, the multiplier stays put."""
    rates = np.clip(0.9 + 0.1 * np.random.default_rng(0).standard_normal(1000), 0, 1)
    smooth, raw = ClipRateControl(0.9), ClipRateControl(0.9, smoothing=0.0)
    for rate in rates:
        smooth.update(float(rate))
        raw.update(float(rate))
    assert 0.9 < smooth.multiplier < 1.1
    assert raw.multiplier > 1.5


def test_the_published_rule_steers_by_its_own_un_noised_clip_rate():
    policy = RawPercentilePolicy(3.0)
    policy.observe_private(torch.tensor([1.0, 2.0, 4.0, 5.0, math.nan]))
    policy.observe_private(torch.tensor([4.0]))
    policy.update(None)
    assert policy.clip_rate(None) == pytest.approx(3 / 5)
