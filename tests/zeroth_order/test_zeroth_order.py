"""The zeroth-order step: what it measures, clips, noises and releases, and how the weights move."""

import math

import pytest
import torch
from helpers import classifier, dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from zeroth import Scripted, by_hand, direction, flat, measured, release_vector, released, weights

from opacus_ac.clipping import POLICIES
from opacus_ac.noise import SecretStream
from opacus_ac.optimizer.private_side import PrivateSide
from opacus_ac.release import StepStatistics
from opacus_ac.zeroth_order.directions import Directions, derived_seed
from opacus_ac.zeroth_order.settings import DIRECTIONS
from opacus_ac.zeroth_order.source import DifferenceSource

K = 4
STATISTICS = {
    "flat": {"histogram": False},
    "default": {"histogram": True},
    "loss": {"histogram": True, "loss_bound": 10.0},
}
CASES = [
    (policy, name)
    for policy in POLICIES
    for name, statistics in STATISTICS.items()
    if statistics["histogram"] or not POLICIES[policy].needs_histogram
]
finite = st.floats(-1e6, 1e6)
extreme = st.one_of(finite, st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e-30, 1e200]))


def moved(policy, statistics, bound, batch, extra, loss):
    def release(rows, losses):
        optimizer = by_hand(
            clip_policy=policy, max_grad_norm=bound, statistics=StepStatistics(**statistics), target_clip_rate=0.5
        )
        deltas = torch.tensor(rows, dtype=torch.float64).reshape(-1, K)
        return release_vector(optimizer, deltas, torch.tensor(losses, dtype=torch.float64))

    before = release([[0.0] * K, *batch], [1.0] * (len(batch) + 1))
    return float((release([[0.0] * K, *batch, extra], [*[1.0] * (len(batch) + 1), loss]) - before).norm())


@pytest.mark.parametrize(("policy", "name"), CASES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.lists(finite, min_size=K, max_size=K), max_size=3),
    extra=st.lists(extreme, min_size=K, max_size=K),
    bound=st.floats(1e-4, 1e4),
    loss=st.one_of(finite, st.sampled_from([math.nan, math.inf])),
)
def test_one_record_moves_the_release_by_at_most_the_sensitivity(policy, name, batch, extra, bound, loss):
    distance = moved(policy, STATISTICS[name], bound, batch, extra, loss)
    assert distance <= StepStatistics(**STATISTICS[name]).sensitivity * (1 + 1e-6)


def test_the_bound_is_attained_by_the_whole_vector_not_by_each_number():
    assert moved("fixed", {"histogram": False}, 3.0, [], [1e6] * K, 0.0) == pytest.approx(1.0, rel=1e-9)


def test_clipping_each_number_by_itself_would_be_caught(monkeypatch):
    """The planted bug: K numbers, each clipped to C, noised with sigma C and charged as one release of multiplier sigma."""

    def per_number(self, factors):
        clipped = self._deltas.clamp(-self.bound, self.bound)
        self.coefficients.summed_grad = clipped.nan_to_num().sum(0)

    monkeypatch.setattr(DifferenceSource, "accumulate", per_number)
    assert moved("fixed", {"histogram": False}, 1.0, [], [1e6] * K, 0.0) == pytest.approx(math.sqrt(K))


def test_differences_are_directional_derivatives():
    model, (inputs, targets) = classifier().eval(), dataset(6).tensors
    optimizer = by_hand(model, smoothing=1e-5, num_directions=3)
    losses = lambda: nn.functional.cross_entropy(model(inputs), targets, reduction="none")  # noqa: E731
    optimizer.differences.measure(losses, optimizer.direction_seeds, optimizer.smoothing)
    directions = torch.stack([direction(optimizer, seed) for seed in optimizer.direction_seeds])
    gradients = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(x, list(model.parameters()), retain_graph=True)])
        for x in losses()
    ]
    # Central differences are off by lambda^2 times a third derivative, here of order 10, and by rounding / lambda.
    torch.testing.assert_close(
        optimizer.differences._deltas, torch.stack(gradients) @ directions.T, rtol=1e-6, atol=1e-7
    )


@pytest.mark.statistical
@pytest.mark.parametrize(("count", "n"), [(1, 1200), (16, 9600)])
def test_noise_has_the_std_of_the_joint_bound_whatever_the_number_of_directions(count, n):
    """n draws; their empirical std is off by 1 / sqrt(2 n) (one sigma), and 6 sigma mean a false alarm of 2e-9."""
    optimizer = by_hand(num_directions=count, noise_multiplier=1.5, max_grad_norm=0.2, loss_reduction="sum")
    draws = torch.cat([released(optimizer, torch.zeros(1, count)) for _ in range(n // count)])
    assert draws.numel() == n
    assert float(draws.std()) == pytest.approx(1.5 * 0.2, rel=6 / math.sqrt(2 * n))
    assert abs(float(draws.mean())) < 6 * 1.5 * 0.2 / math.sqrt(n)


def test_statistics_raise_the_noise_by_their_share():
    statistics = StepStatistics(histogram=True)
    optimizer = by_hand(clip_policy="percentile", statistics=statistics, noise_multiplier=1.5)
    released(optimizer, torch.zeros(1, K))
    assert optimizer.released.gradient_noise_multiplier == pytest.approx(1.5 * statistics.sensitivity)
    assert optimizer.released.noise_multiplier == 1.5


# ---------------------------------------------------------------- three streams


def noise(**kwargs):
    return released(by_hand(noise_multiplier=1.0, **kwargs), torch.zeros(1, K))


def test_noise_and_directions_do_not_know_each_others_seed():
    assert torch.equal(noise(seed=3, direction_seed=1), noise(seed=3, direction_seed=2))
    one, other = by_hand(seed=3), by_hand(seed=4)
    assert one.direction_seeds == other.direction_seeds
    assert torch.equal(direction(one, one.direction_seeds[0]), direction(other, one.direction_seeds[0]))
    assert not torch.equal(noise(seed=3), noise(seed=4))


def check_that_noise_is_secret(make):
    """The public direction seed and torch's global seed are known to everybody: the noise must not follow from them."""
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        draws.append(released(make(), torch.zeros(1, K)))
    assert not torch.equal(*draws)


def test_secret_noise_does_not_follow_from_public_seeds():
    check_that_noise_is_secret(lambda: by_hand(noise_multiplier=1.0, seed=None))


def test_noise_from_the_generator_of_the_directions_would_be_caught(monkeypatch):
    """The planted bug is that of public code: noise drawn from the generator that the direction's seed was given to."""

    def public(self, targets, std, scale=1.0):
        for target in targets:
            target.add_(torch.randn(target.shape, dtype=target.dtype), alpha=std).mul_(scale)

    monkeypatch.setattr(SecretStream, "add_normal", public)
    with pytest.raises(AssertionError):
        check_that_noise_is_secret(lambda: by_hand(noise_multiplier=1.0, seed=None))


def test_drawing_directions_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    by_hand(num_directions=2).step(Scripted(torch.ones(2, 2), 1e-3))
    assert torch.equal(before, torch.get_rng_state())


def test_fresh_direction_seeds_have_63_bits_and_differ():
    seeds = {by_hand(direction_seed=None).directions.seed for _ in range(16)}
    assert len(seeds) == 16
    assert max(seeds).bit_length() > 50  # 16 seeds below 2^50: probability 2^-208
    assert all(0 <= derived_seed(seed, 1, 2) < 2**63 for seed in seeds)


def test_every_step_has_its_own_directions_and_a_repeated_seed_repeats_them():
    a, b = Directions("gaussian", 5), Directions("gaussian", 5)
    assert a.seeds(0, 3) == b.seeds(0, 3)
    assert len({*a.seeds(0, 64), *a.seeds(1, 64), *Directions("gaussian", 6).seeds(0, 64)}) == 192


# ---------------------------------------------------------------- directions


@pytest.mark.statistical
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_directions_are_uncorrelated_with_variance_one(kind):
    """d = 300,050 coordinates over three blocks; means of products have std below 1.5 / sqrt(d), and 7 sigma mean 3e-12."""
    module = weights((1000, 300), (50,), dtype=torch.float32)
    optimizer = by_hand(module, direction=kind, num_directions=3)
    z = torch.stack([direction(optimizer, seed) for seed in optimizer.direction_seeds]).double()
    d = z.shape[1]
    limit = 7 * 1.5 / math.sqrt(d)
    assert float((z @ z.T / d - torch.eye(3)).abs().max()) < limit
    assert abs(float((z[0, :-1] * z[0, 1:]).mean())) < limit
    assert abs(float((z[0, : 1 << 17] * z[0, 1 << 17 : 2 << 17]).mean())) < 7 * 1.5 / math.sqrt(1 << 17)
    if kind == "sphere":
        assert float(z[0].norm()) == pytest.approx(math.sqrt(d), rel=1e-6)
    if kind == "rademacher":
        assert set(z.unique().tolist()) == {-1.0, 1.0}


def test_both_precisions_see_the_same_directions():
    one, other = (by_hand(weights(dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert torch.equal(direction(one, 11).double(), direction(other, 11))


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_weights_are_restored_up_to_rounding_even_when_the_closure_fails(kind):
    module = weights((1000, 200), dtype=torch.float32)
    before = flat(module).clone()
    optimizer = by_hand(module, direction=kind)

    class Interrupted(Scripted):
        def __call__(self):
            if self.calls == self.fail_at:
                raise KeyboardInterrupt
            return super().__call__()

    for fail_at in range(4):
        closure = Interrupted(torch.ones(1, 4), 1e-3)
        closure.fail_at = fail_at
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure)
    torch.testing.assert_close(flat(module), before, rtol=0, atol=2e-6)
    assert optimizer.steps_taken == 0
    assert optimizer.differences.coefficients.grad is None


# ---------------------------------------------------------------- the update


class NotPlain(torch.optim.SGD):
    """SGD under another type, so that it gets gradients instead of updates in place."""


@pytest.mark.parametrize("inner", [torch.optim.SGD, NotPlain])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_weights_move_along_the_directions_by_the_released_numbers(inner, kind):
    module = weights()
    before = flat(module).clone()
    sgd = inner(module.parameters(), lr=0.3, weight_decay=0.1)
    optimizer = by_hand(module, sgd, direction=kind, max_grad_norm=100.0, expected_batch_size=5)
    seeds = optimizer.direction_seeds
    deltas = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    assert optimizer.step(Scripted(deltas, optimizer.smoothing)) is None
    z = torch.stack([direction(optimizer, seed) for seed in seeds])
    expected = before - 0.3 * (deltas.sum(0) / 5 / 4 @ z + 0.1 * before)
    torch.testing.assert_close(flat(module), expected, rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for p in module.parameters())
    assert optimizer.released.step == optimizer.steps_taken == 1


def check_public_denominator():
    """A record moves the weights by the same amount whichever number of others is in the batch: both see B = 8."""
    moves = []
    for records in (1, 3):
        module = weights()
        before = flat(module).clone()
        deltas = torch.zeros(records, K, dtype=torch.float64)
        deltas[0] = 0.1
        by_hand(module, expected_batch_size=8).step(Scripted(deltas, 1e-3))
        moves.append(flat(module) - before)
    torch.testing.assert_close(*moves, rtol=1e-9, atol=1e-12)


def test_sums_are_divided_by_the_expected_batch_size():
    check_public_denominator()


def test_a_mean_over_the_realised_batch_would_be_caught(monkeypatch):
    monkeypatch.setattr(PrivateSide, "_denominator", lambda self: float(len(self.source._deltas)))
    with pytest.raises(AssertionError):
        check_public_denominator()


def test_adam_works_as_inner_optimizer_and_learning_rates_belong_to_groups():
    module = weights((4,), (4,))
    first, second = module.parameters()
    inner = torch.optim.Adam([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.0}])
    kept = second.detach().clone()
    before = first.detach().clone()
    by_hand(module, inner).step(Scripted(torch.ones(1, 4), 1e-3))
    torch.testing.assert_close(second.detach(), kept, rtol=0, atol=1e-12)
    torch.testing.assert_close((first - before).abs(), torch.full((4,), 0.1).double(), rtol=1e-4, atol=0)


def test_it_learns_and_the_average_follows():
    model, (inputs, targets) = classifier().eval(), dataset(64).tensors
    targets = (inputs[:, 0] > 0).long()
    optimizer = by_hand(
        model, torch.optim.SGD(model.parameters(), lr=2.0), num_directions=16, expected_batch_size=64, ema_decay=0.9
    )
    losses = lambda: nn.functional.cross_entropy(model(inputs), targets, reduction="none")  # noqa: E731
    before = losses().mean().item()
    for _ in range(60):
        optimizer.step(losses)
    assert losses().mean().item() < 0.5 * before
    with optimizer.ema_weights():
        assert losses().mean().item() < before


def test_physical_batches_add_up_to_their_logical_batch():
    deltas = torch.randn(10, K, dtype=torch.float64)
    whole, parts = by_hand(noise_multiplier=1.0), by_hand(noise_multiplier=1.0)
    whole.step(Scripted(deltas, 1e-3))
    for chunk, skip in zip(deltas.split(4), (True, True, False), strict=True):
        parts.signal_skip_step(skip)
        parts.step(Scripted(chunk, 1e-3))
    assert parts.steps_taken == 1
    torch.testing.assert_close(flat(parts.module), flat(whole.module), rtol=1e-12, atol=1e-12)


def test_a_clipping_norm_that_changes_within_a_logical_batch_is_refused():
    optimizer = by_hand()
    optimizer.signal_skip_step(True)
    optimizer.step(Scripted(torch.ones(2, K), 1e-3))
    optimizer.max_grad_norm = 2.0
    optimizer.signal_skip_step(False)
    with pytest.raises(ValueError, match="changed from 1 to 2 within a logical batch"):
        optimizer.step(Scripted(torch.ones(2, K), 1e-3))


def test_a_record_that_is_not_finite_leaves_no_trace():
    bad = torch.tensor(
        [[math.nan, 1.0, 1.0, 1.0], [math.inf, 0.0, 0.0, 0.0], [0.3, 0.1, 0.0, 0.2]], dtype=torch.float64
    )
    with_bad, alone = by_hand(), by_hand()
    measured(with_bad, bad)
    measured(alone, bad[2:])
    assert torch.equal(with_bad.coefficients.summed_grad, alone.coefficients.summed_grad)
    assert with_bad.private_nonfinite_records == 2


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (None, "needs optimizer.step"),
        (lambda: torch.tensor(1.0), "one loss per record"),
        (lambda: torch.ones(2, 1), "one loss per record"),
        (lambda: [1.0], "got list"),
        (lambda: torch.ones(0), "one loss per record"),
    ],
)
def test_closures_that_give_no_losses_per_record_are_refused(closure, message):
    module = weights()
    before = flat(module).clone()
    with pytest.raises(ValueError, match=message):
        by_hand(module).step(closure)
    torch.testing.assert_close(flat(module), before, rtol=0, atol=1e-12)


def test_a_closure_that_changes_its_records_is_refused():
    sizes = iter([2, 2, 2, 3])
    with pytest.raises(ValueError, match="another number of losses than in its first call"):
        by_hand().step(lambda: torch.ones(next(sizes)))
