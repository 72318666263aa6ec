"""Laplace noise on whole numbers, and the accountant of pure differential privacy."""

import math

import mpmath
import pytest
import torch
from dp_accounting.pld import privacy_loss_distribution
from helpers import classifier, loader
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant, create_accountant
from torch import nn
from zeroth import Scripted, by_hand, measured, released

from opacus_ac import PrivacyBudgetExceeded, PrivacyEngine
from opacus_ac.accounting import PureDPAccountant, VariableRateRDPAccountant, register
from opacus_ac.accounting.pure_accountant import laplace_epsilon, laplace_noise_multiplier
from opacus_ac.noise import SecretStream, SeededStream
from opacus_ac.zeroth_order import ZerothOrderSettings
from opacus_ac.zeroth_order.laplace import GRID, LaplaceMechanism, WholeNumbers

K = 4
finite = st.floats(-1e6, 1e6)
extreme = st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-30]))


def laplace(**kwargs):
    return by_hand(mechanism="laplace", **kwargs)


# ---------------------------------------------------------------- the release


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    record=st.lists(extreme, min_size=K, max_size=K),
    bound=st.floats(1e-4, 1e4),
    policy=st.sampled_from(["fixed", "automatic"]),
)
def test_one_record_moves_the_sum_by_whole_numbers_of_at_most_c_in_l1(record, bound, policy):
    optimizer = laplace(max_grad_norm=bound, clip_policy=policy)
    measured(optimizer, torch.tensor([record], dtype=torch.float64))
    summed = optimizer.coefficients.summed_grad
    assert bool((summed == summed.round()).all())
    assert float(summed.abs().sum()) <= GRID


def test_the_bound_is_attained():
    optimizer = laplace(max_grad_norm=0.3)
    measured(optimizer, torch.tensor([[1e5, 0.0, 0.0, 0.0]], dtype=torch.float64))
    assert float(optimizer.coefficients.summed_grad.abs().sum()) == pytest.approx(GRID, abs=1)


def test_without_noise_the_release_is_the_sum_up_to_the_grid():
    optimizer = laplace(max_grad_norm=10.0)
    deltas = torch.tensor([[1.0, -2.0, 0.5, 0.25], [0.1, 0.2, -0.3, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(released(optimizer, deltas), deltas.sum(0), rtol=0, atol=2 * 10.0 / GRID)


def test_noise_is_added_to_exactly_the_whole_sum():
    """The float64 detour between sum and mechanism loses nothing: the release is on the grid, off by whole noise."""
    bound, multiplier = 0.3, 2.0
    deltas = torch.full((50, K), 0.02, dtype=torch.float64)
    values = released(laplace(max_grad_norm=bound, noise_multiplier=multiplier, seed=5), deltas)
    alone = laplace(max_grad_norm=bound)
    measured(alone, deltas)
    numbers = WholeNumbers(SeededStream(torch.Generator().manual_seed(5)))
    noise = torch.tensor([numbers.laplace(int(multiplier * GRID)) for _ in range(K)])
    expected = (alone.coefficients.summed_grad + noise) * (bound / GRID) / 1
    torch.testing.assert_close(values, expected.double(), rtol=1e-12, atol=0)


@pytest.mark.statistical
@pytest.mark.parametrize("scale", [1, 3])
def test_discrete_laplace_has_its_probabilities(scale):
    """n = 20,000 draws; each of 9 counts within 6 of its binomial stds: a false alarm in 2e-8."""
    n, numbers = 20_000, WholeNumbers(SeededStream(torch.Generator().manual_seed(1)))
    draws = torch.tensor([numbers.laplace(scale) for _ in range(n)])
    normal = (1 - math.exp(-1 / scale)) / (1 + math.exp(-1 / scale))
    for value in range(-4, 5):
        p = normal * math.exp(-abs(value) / scale)
        assert abs(int((draws == value).sum()) - n * p) < 6 * math.sqrt(n * p * (1 - p))


@pytest.mark.statistical
def test_noise_has_the_scale_of_the_multiplier():
    """n = 4,000; |x| / b has mean 1 and std 1, so its mean is off by 0.0158 (one sigma); 6 sigma mean 2e-9."""
    optimizer = laplace(num_directions=100, noise_multiplier=3.0, max_grad_norm=0.5)
    draws = torch.cat([released(optimizer, torch.zeros(1, 100)) for _ in range(40)])
    assert float(draws.abs().mean()) == pytest.approx(3.0 * 0.5, rel=6 / math.sqrt(4000))


def test_uniform_whole_numbers_stay_below_their_bound_and_reach_all():
    numbers = WholeNumbers(SecretStream())
    for bound in (1, 2, 3, 7, 8):
        seen = {numbers.below(bound) for _ in range(600)}  # one of 8 is missed with probability 8 (7/8)^600 = 1e-34
        assert seen == set(range(bound))
    with pytest.raises(ValueError, match="above 2\\^53"):
        numbers.below(2**60)


def test_histogram_and_loss_have_no_room_in_a_laplace_release():
    with pytest.raises(ValueError, match="clip_policy='percentile' needs a norm histogram"):
        laplace(clip_policy="percentile")
    from opacus_ac.release import StepStatistics

    with pytest.raises(ValueError, match="no norm histogram and no loss"):
        laplace(statistics=StepStatistics(histogram=False, loss_bound=1.0))
    with pytest.raises(ValueError, match="the differences alone"):
        LaplaceMechanism(1.0, SecretStream()).gradient_multiplier(StepStatistics())


# ---------------------------------------------------------------- the accountant


@pytest.mark.parametrize("noise", [0.05, 0.5, 1.0, 10.0, 1e5])
@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.5, 1.0])
def test_epsilon_of_a_step_is_the_amplified_one(noise, rate):
    with mpmath.workdps(40):
        exact = mpmath.log(1 + mpmath.mpf(rate) * (mpmath.exp(1 / mpmath.mpf(noise)) - 1))
    assert laplace_epsilon(noise, rate) == pytest.approx(float(exact), rel=1e-12)


def test_limits():
    assert laplace_epsilon(0.0, 0.5) == math.inf
    assert laplace_epsilon(math.inf, 0.5) == laplace_epsilon(1.0, 0.0) == 0.0
    assert laplace_epsilon(1e-3, 0.5) == pytest.approx(1000 + math.log(0.5))
    assert laplace_epsilon(1e-3, 1.0) == 1000


def test_it_is_what_dp_accounting_says_at_delta_zero():
    """Its discretised loss distribution (steps of 1e-4, rounded up) has the same largest loss, up to a step per release."""
    pld = privacy_loss_distribution.from_laplace_mechanism(2.0, sampling_prob=0.1)
    composed = pld.self_compose(5)
    assert pld.get_epsilon_for_delta(0.0) == pytest.approx(laplace_epsilon(2.0, 0.1), abs=1.1e-4)
    accountant = PureDPAccountant()
    accountant.history = [(2.0, 0.1, 5)]
    # The largest loss has a probability of its own, so that a tiny delta buys next to nothing.
    assert composed.get_epsilon_for_delta(1e-9) == pytest.approx(accountant.get_epsilon(0.0), abs=6e-4)
    assert composed.get_epsilon_for_delta(1e-3) <= accountant.get_epsilon(1e-3)


@pytest.mark.parametrize(("epsilon", "rate", "steps", "b"), [(4, 0.0416, 1000, 10.88), (10, 0.0625, 10000, 62.99)])
def test_calibration_inverts_the_formula(epsilon, rate, steps, b):
    multiplier = laplace_noise_multiplier(epsilon, rate, steps)
    assert multiplier == pytest.approx(b, rel=2e-3)
    assert steps * laplace_epsilon(multiplier, rate) == pytest.approx(epsilon, rel=1e-9)


def test_the_accountant_is_known_to_opacus_and_keeps_its_history():
    register()
    accountant = create_accountant("pure")
    assert isinstance(accountant, PureDPAccountant)
    accountant.step(noise_multiplier=2.0, sample_rate=0.1)
    accountant.step(noise_multiplier=2.0, sample_rate=0.1)
    accountant.step(noise_multiplier=1.0, sample_rate=1.0)
    assert accountant.history == [(2.0, 0.1, 2), (1.0, 1.0, 1)]
    assert accountant.get_epsilon(0.0) == pytest.approx(2 * laplace_epsilon(2.0, 0.1) + 1.0)
    other = PureDPAccountant()
    other.load_state_dict(accountant.state_dict())
    assert other.history == accountant.history
    with pytest.raises(ValueError, match="noise_multiplier=-1"):
        accountant.step(noise_multiplier=-1.0, sample_rate=0.1)
    with pytest.raises(ValueError, match="delta"):
        accountant.get_epsilon(-1.0)
    with pytest.raises(ValueError, match="vrdp"):
        accountant.load_state_dict(VariableRateRDPAccountant().state_dict())


def test_accountants_refuse_the_other_noise_by_hand_too():
    optimizer = laplace(noise_multiplier=2.0)
    for accountant in (RDPAccountant(), VariableRateRDPAccountant()):
        with pytest.raises(ValueError, match="takes the noise for Gaussian"):
            optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.1))
    pure = PureDPAccountant()
    optimizer.attach_step_hook(pure.get_optimizer_hook_fn(sample_rate=0.1))
    optimizer.step(Scripted(torch.zeros(1, K), 1e-3))
    assert pure.history == [(2.0, 0.1, 1)]
    gaussian = by_hand(noise_multiplier=2.0)
    gaussian.attach_step_hook(pure.get_optimizer_hook_fn(sample_rate=0.1))
    with pytest.raises(ValueError, match="accounts for Laplace noise only"):
        gaussian.step(Scripted(torch.zeros(1, K), 1e-3))


# ---------------------------------------------------------------- the engine


def engine_run(target=None, steps=8, **kwargs):
    model = classifier().eval()
    engine = PrivacyEngine(accountant="pure")
    arguments = {
        "module": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "data_loader": loader(64, 16),
        "zeroth_order": ZerothOrderSettings(num_directions=K, mechanism="laplace"), **kwargs,
    }  # fmt: skip
    if target is None:
        made = engine.make_private(noise_multiplier=2.0, **arguments)
    else:
        made = engine.make_private_with_epsilon(target_epsilon=target, target_delta=0.0, steps=steps, **arguments)
    return (engine, *made)


def take(model, optimizer, batches):
    for inputs, targets in batches:
        optimizer.step(lambda: nn.functional.cross_entropy(model(inputs), targets, reduction="none"))  # noqa: B023


def test_a_run_has_an_epsilon_at_delta_zero():
    engine, model, optimizer, batches = engine_run()
    take(model, optimizer, batches)
    assert engine.accountant.history == [(2.0, 0.25, 4)]
    assert engine.get_epsilon(0.0) == pytest.approx(4 * math.log1p(0.25 * math.expm1(0.5)))
    report = engine.privacy_report(0.0)
    assert (report.accountant, report.delta) == ("pure", 0.0)
    assert "0)-differential privacy by pure accounting" in str(report)


def test_a_target_is_kept_at_delta_zero():
    engine, model, optimizer, batches = engine_run(target=3.0, steps=6)
    assert engine.remaining_steps() == 6
    take(model, optimizer, batches)
    with pytest.raises(PrivacyBudgetExceeded):
        take(model, optimizer, batches)
    assert optimizer.steps_taken == 6
    assert 2.98 < engine.get_epsilon(0.0) <= 3.0


@pytest.mark.parametrize("accountant", ["vrdp", "vpld", "rdp", "prv", "gdp"])
def test_accountants_of_gaussian_noise_are_refused(accountant):
    model = classifier().eval()
    with pytest.raises(
        ValueError, match=r"mechanism='laplace' does not work with accountant='.*no bound for Laplace noise"
    ):
        PrivacyEngine(accountant=accountant).make_private(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(), noise_multiplier=1.0,
            zeroth_order=ZerothOrderSettings(mechanism="laplace"),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"zeroth_order": "aggzo"}, "accounts for Laplace noise only"),
        ({"clipping": "flat", "zeroth_order": None}, "accounts for Laplace noise only"),
        ({"clip_policy": "percentile"}, "needs a norm histogram"),
        ({"loss_bound": 3.0}, "no norm histogram and no loss"),
        ({"sampling": "fixed_size"}, "has no bound in the accountant 'pure'"),
    ],
)
def test_what_pure_privacy_cannot_cover_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        engine_run(**kwargs)
