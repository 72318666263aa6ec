"""The one step: equal to plain training without noise, to Opacus when flat, and to itself however it is split."""

import copy
import math

import numpy as np
import pytest
import torch
from helpers import by_hand, classifier, dataset, loader, loss_of, train
from opacus import PrivacyEngine as OpacusEngine
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.clipping import POLICIES
from opacus_ac.optimizer import AdaptiveClipDPOptimizer, WeightEMA
from opacus_ac.release import StepStatistics
from opacus_ac.testing import per_sample_gradients

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")
PLAIN = {"lr_control": False, "ema_decay": None}


def private(model, *, batch_size=16, records=64, lr=1e-2, seed=7, engine=None, **kwargs):
    engine = engine or PrivacyEngine()
    arguments = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1.0,
        "noise_generator": torch.Generator().manual_seed(seed),
        **kwargs,
    }
    made = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
        data_loader=loader(records, batch_size),
        **arguments,
    )
    return (engine, *made)


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def clone(model):
    other = classifier()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
def test_without_noise_and_clipping_it_is_the_inner_adamw(mode):
    model = classifier()
    reference = clone(model)
    _, wrapped, optimizer, _ = private(model, clipping="flat", max_grad_norm=1e9, grad_sample_mode=mode, **PLAIN)
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, weight_decay=0.0)
    optimizer.plan = None  # batches by hand
    batches = list(loader(64, 16))
    train(wrapped, optimizer, batches * 3)
    for batch in batches * 3:
        plain.zero_grad()
        loss_of(reference, batch).backward()
        plain.step()
    np.testing.assert_allclose(weights(model), weights(reference), rtol=0, atol=1e-12)


def test_flat_clipping_is_opacus():
    """Same batches, no noise: the trajectory of Opacus's own flat clipping (which adds 1e-6 to every norm)."""
    ours, theirs = classifier(), classifier()
    batches = list(loader(64, 16))
    _, wrapped, optimizer, _ = private(ours, clipping="flat", max_grad_norm=0.3, **PLAIN)
    optimizer.plan = None
    train(wrapped, optimizer, batches)
    opacus_model, opacus_optimizer, _ = OpacusEngine(accountant="rdp").make_private(
        module=theirs,
        optimizer=torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0),
        data_loader=loader(64, 16),
        noise_multiplier=0.0,
        max_grad_norm=0.3,
    )
    train(opacus_model, opacus_optimizer, batches)
    np.testing.assert_allclose(weights(ours), weights(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("split", [None, 5])
def test_released_gradient_equals_the_loop_of_single_records(policy, mode, reduction, split):
    """One step of every policy, mode, reduction and split against clipping a loop of batch size 1 (float64)."""
    model = classifier()
    expected_model = clone(model)
    _, wrapped, optimizer, private_loader = private(
        model, clip_policy=policy, grad_sample_mode=mode, loss_reduction=reduction, max_grad_norm=0.4,
        max_physical_batch_size=split, normalize=False, **PLAIN,
    )  # fmt: skip
    seen = []
    for batch in private_loader:
        seen.append(batch)
        optimizer.zero_grad()
        loss_of(wrapped, batch, reduction).backward()
        optimizer.step()
        if optimizer.steps_taken:
            break
    whole = tuple(torch.cat(parts) for parts in zip(*seen, strict=True))
    gradients = per_sample_gradients(expected_model, whole, loss_of)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    factors = 0.4 / (norms + 0.01) if policy == "automatic" else (0.4 / norms).clamp(max=1)
    denominator = 16 if reduction == "mean" else 1
    for name, parameter in model.named_parameters():
        wanted = torch.einsum("i,i...->...", factors, gradients[name]) / denominator
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("poisson", [True, False])
def test_physical_batches_change_nothing(policy, poisson):
    """Several steps, any split: weights, C and clip rates agree to 1e-12 (float64)."""
    results = []
    for split in (None, 1, 3, 7):
        model = classifier()
        torch.manual_seed(0)
        engine, wrapped, optimizer, batches = private(
            model, clip_policy=policy, max_physical_batch_size=split, poisson_sampling=poisson
        )
        train(wrapped, optimizer, batches)
        results.append(torch.cat([weights(model), torch.tensor([optimizer.max_grad_norm, engine.get_epsilon(1e-3)])]))
        assert optimizer.steps_taken == 4
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-12)


@pytest.mark.statistical
@pytest.mark.parametrize(("clipping", "sensitivity"), [("flat", 1.0), ("adaptive", math.sqrt(1 + 0.0412))])
def test_noise_has_the_stated_std_on_every_coordinate(clipping, sensitivity):
    """One parameter of 200,000 coordinates that the batch does not use: pure noise; |z| < 4.5 for mean and variance."""

    class WithUnused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(400, 500)

        def forward(self, x):
            return self.used(x)

    model = WithUnused()
    data = dataset(64, torch.float32)
    _, optimizer, batches = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), data_loader=DataLoader(data, batch_size=16),
        noise_multiplier=1.3, max_grad_norm=0.5, clipping=clipping,
    )  # fmt: skip
    wrapped = _
    train(wrapped, optimizer, [next(iter(batches))])
    noise = model.unused.weight.grad.double().reshape(-1) * 16
    std = 1.3 * sensitivity * 0.5
    assert abs(float(noise.mean())) < 4.5 * std / math.sqrt(noise.numel())
    assert abs(float(noise.var()) / std**2 - 1) < 4.5 * math.sqrt(2 / noise.numel())
    assert optimizer.released.gradient_noise_multiplier == pytest.approx(1.3 * sensitivity)


def test_noise_does_not_follow_the_training_seed():
    """Two runs with the same torch seed release different noise; with the test generator, the same."""

    def run(generator):
        torch.manual_seed(0)
        model = classifier()
        engine, wrapped, optimizer, batches = private(
            model, noise_multiplier=1.0, noise_generator=generator() if generator else None
        )
        train(wrapped, optimizer, batches)
        return weights(model), engine.privacy_report(1e-3)

    (first, report), (second, _) = run(None), run(None)
    assert not torch.equal(first, second)
    assert not any("seeded" in w for w in report.warnings)
    (first, report), (second, _) = (run(lambda: torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert any("seeded" in w for w in report.warnings)
    assert "SEEDED" in str(report)


def test_a_record_with_a_nonfinite_gradient_leaves_no_trace():
    clean = torch.randn(4, 5, dtype=torch.float64)
    dirty = torch.cat([clean, torch.tensor([[math.nan, 0, 0, 0, 0], [math.inf, 1, 1, 1, 1]], dtype=torch.float64)])
    results = []
    for rows in (clean, dirty):
        optimizer, _ = by_hand(rows)
        optimizer.step()
        results.append(torch.cat([p.detach() for p in optimizer.params]))
        assert torch.isfinite(results[-1]).all()
    assert torch.equal(*results)


def test_an_empty_batch_takes_a_noise_only_step_and_is_accounted():
    model = classifier()
    start = weights(model).clone()
    engine, wrapped, optimizer, batches = private(model, batch_size=1, records=400, noise_multiplier=0.5, lr=1e-3)
    empty = 0
    for batch in batches:
        draw = optimizer.plan.current()
        optimizer.zero_grad()
        loss_of(wrapped, batch).backward()
        optimizer.step()
        if draw.records == 0:
            empty += 1
            assert optimizer.released.histogram.counts.sum() == pytest.approx(0, abs=200)
        if empty == 3:
            break
    assert empty == 3
    assert engine.accountant.history[0][2] == optimizer.steps_taken
    assert not torch.equal(weights(model), start)


def test_the_stand_in_for_an_empty_batch_adds_nothing():
    """Without noise an empty batch leaves gradient and histogram exactly zero."""
    model = classifier()
    _, wrapped, optimizer, batches = private(model, batch_size=1, records=400)
    for batch in batches:
        draw = optimizer.plan.current()
        optimizer.zero_grad()
        loss_of(wrapped, batch).backward()
        optimizer.step()
        if draw.records == 0:
            break
    assert draw.records == 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters())
    assert float(np.abs(optimizer.released.histogram.counts).max()) == 0


def test_normalizing_keeps_the_scale_that_adam_sees():
    gradients = torch.randn(8, 5, dtype=torch.float64) * 100
    sums = []
    for bound in (1.0, 0.01):
        optimizer, _ = by_hand(gradients, max_grad_norm=1.0, clip_policy="fixed", expected_batch_size=8)
        optimizer.max_grad_norm = bound  # as if the policy had moved there from C0 = 1
        optimizer.step()
        sums.append(torch.cat([p.grad for p in optimizer.params]))
    torch.testing.assert_close(*sums)


def test_learning_rate_control_acts_on_the_learning_rate_and_leaves_the_schedule_alone():
    optimizer, _ = by_hand(torch.ones(2, 5, dtype=torch.float64), expected_batch_size=2)
    optimizer.control.multiplier = 0.5
    before = torch.cat([p.detach().clone() for p in optimizer.params])
    optimizer.step()
    after = torch.cat([p.detach() for p in optimizer.params])
    grad = torch.cat([p.grad for p in optimizer.params])
    torch.testing.assert_close(before - after, 0.5 * grad)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.released.lr_multiplier == 0.5


def test_learning_rate_scheduler_of_torch_works():
    model = classifier()
    _, wrapped, optimizer, batches = private(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for batch in batches:
        train(wrapped, optimizer, [batch])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**4)


def test_ema_warms_up_and_is_put_back():
    parameter = nn.Parameter(torch.zeros(3))
    ema = WeightEMA([parameter], decay=0.9)
    expected = torch.zeros(3)
    for t in range(30):
        with torch.no_grad():
            parameter.fill_(float(t))
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * t
        ema.update()
    with ema.applied():
        torch.testing.assert_close(parameter.detach(), expected)
    assert parameter.detach().tolist() == [29.0] * 3
    with pytest.raises(RuntimeError, match="planted"), ema.applied():
        raise RuntimeError("planted")
    assert parameter.detach().tolist() == [29.0] * 3
    with pytest.raises(ValueError, match="ema_decay"):
        WeightEMA([parameter], decay=1.0)


def test_a_bound_that_moves_within_a_logical_batch_is_refused():
    """Opacus's GradClipScheduler stepped between physical batches would leave the first under-noised."""
    optimizer, _ = by_hand(torch.ones(2, 5, dtype=torch.float64))
    optimizer.signal_skip_step(True)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.max_grad_norm = 0.1
    optimizer.params[0].grad_sample = torch.ones(2, 2, dtype=torch.float64)
    optimizer.params[1].grad_sample = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="max_grad_norm changed"):
        optimizer.step()


def test_gradients_that_were_not_cleared_are_refused():
    optimizer, _ = by_hand(torch.ones(2, 5, dtype=torch.float64))
    optimizer.step()
    with pytest.raises(ValueError, match="zero_grad"):
        optimizer.step()


def test_a_gradient_without_per_sample_gradient_is_refused():
    optimizer, _ = by_hand(torch.ones(2, 5, dtype=torch.float64))
    optimizer.params[1].grad_sample = None
    optimizer.params[1].grad = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be clipped"):
        optimizer.step()


def test_batch_sizes_that_differ_are_refused():
    optimizer, _ = by_hand(torch.ones(2, 5, dtype=torch.float64))
    optimizer.params[1].grad_sample = torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="first dimension"):
        optimizer.step()


def test_step_without_backward_is_refused():
    with pytest.raises(ValueError, match="Per sample gradient is not initialized"):
        private(classifier())[2].step()


def test_it_is_a_dp_optimizer_built_by_hand_with_opacus_accounting():
    """The loop of Opacus's tutorials: optimizer built by hand, accountant attached as a step hook."""
    from opacus import GradSampleModule

    from opacus_ac.accounting import VariableRateRDPAccountant

    model = GradSampleModule(classifier())
    accountant = VariableRateRDPAccountant()
    optimizer = AdaptiveClipDPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=16
    )
    optimizer.attach_step_hook(accountant.get_optimizer_hook_fn(sample_rate=0.25))
    train(model, optimizer, list(loader(64, 16)))
    assert accountant.history == [(1.0, 0.25, 4)]


def test_schedulers_of_opacus_read_and_write_the_one_owner():
    optimizer, _ = by_hand(torch.ones(2, 5, dtype=torch.float64), noise_multiplier=1.0)
    optimizer.noise_multiplier = 2.0
    optimizer.max_grad_norm = 0.5
    assert (optimizer.mechanism.noise_multiplier, optimizer.policy.bound) == (2.0, 0.5)
    with pytest.raises(ValueError, match="noise_multiplier"):
        optimizer.noise_multiplier = -1.0


def test_no_private_value_is_kept_where_people_look():
    """The release of a step holds noisy values: two releases of the same data differ in every data-dependent field."""
    releases = []
    for _ in range(2):
        optimizer, _unused = by_hand(
            torch.ones(2, 5, dtype=torch.float64), noise_multiplier=1.0, losses=torch.ones(2, dtype=torch.float64),
            statistics=copy.deepcopy(private_statistics()),
        )  # fmt: skip
        optimizer.step()
        releases.append(optimizer.released)
    first, second = releases
    assert first.loss != second.loss
    assert not np.any(first.histogram.counts == second.histogram.counts)


def private_statistics():
    return StepStatistics(loss_bound=4.0)


class Borrowed(nn.Module):
    """Uses the weight of one of its layers a second time, where no hook sees it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(nn.functional.linear(self.first(x), self.first.weight))


@pytest.mark.parametrize("mode", ["hooks", "functorch"])  # mode "bk" follows it: tests/grad_sample/test_shared.py
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_weight_used_behind_the_hooks_is_found_at_the_first_step(mode, reduction):
    torch.manual_seed(0)
    _, wrapped, optimizer, batches = private(Borrowed().double(), grad_sample_mode=mode, loss_reduction=reduction)
    loss_of(wrapped, next(iter(batches)), reduction).backward()
    with pytest.raises(ValueError, match=r"first.weight (do not add up|has an ordinary gradient)"):
        optimizer.step()
    assert optimizer.steps_taken == 0


def test_a_first_step_at_a_far_too_large_bound_finds_the_bound_and_moves_nothing():
    """Charged and released like any other, but Adam starts with the first gradient at a fitting C."""
    model = classifier()
    start = weights(model).clone()
    engine, wrapped, optimizer, batches = private(
        model, max_grad_norm=1e4, noise_multiplier=0.5, batch_size=60, noise_generator=None
    )
    train(wrapped, optimizer, [next(iter(batches))])
    assert torch.equal(weights(model), start)
    assert engine.accountant.history == [(0.5, 60 / 64, 1)]
    assert optimizer.released.max_grad_norm == 1e4
    assert optimizer.max_grad_norm == pytest.approx(1e2, rel=0.6)  # the edge of its window
    for _ in range(3):
        train(wrapped, optimizer, [next(iter(batches))])
    assert optimizer.max_grad_norm < 5
    assert not torch.equal(weights(model), start)


@pytest.mark.parametrize("bound", [1e-4, 1.0])
def test_a_small_bound_never_holds_a_step_back(bound):
    model = classifier()
    start = weights(model).clone()
    _, wrapped, optimizer, batches = private(
        model, max_grad_norm=bound, noise_multiplier=0.5, batch_size=60, target_clip_rate=0.5, noise_generator=None
    )
    train(wrapped, optimizer, [next(iter(batches))])
    assert optimizer.max_grad_norm > 0.3 * bound
    assert not torch.equal(weights(model), start)


@pytest.mark.parametrize("chunks_before", [0, 1])
def test_a_physical_batch_that_failed_half_way_is_not_counted_twice_when_retried(chunks_before):
    """Out of memory after the first parameter, caught by the loop, and the same batch stepped again."""
    rows = torch.randn(3, 5, dtype=torch.float64)
    optimizer, _ = by_hand(rows, statistics=StepStatistics(), clip_policy="fixed")

    def backward():
        optimizer.zero_grad()
        optimizer.params[0].grad_sample = rows[:, :2].clone()
        optimizer.params[1].grad_sample = rows[:, 2:].clone()

    for _ in range(chunks_before):
        optimizer.signal_skip_step(True)
        optimizer.step()
        backward()
    accumulate = optimizer.source.accumulate

    def fail(factors):
        accumulate(factors)
        raise RuntimeError("planted: out of memory")

    optimizer.source.accumulate = fail
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step()
    optimizer.source.accumulate = accumulate
    backward()
    optimizer.step()
    once, _ = by_hand(rows, statistics=StepStatistics(), clip_policy="fixed")
    once.step()
    for mine, expected in zip(optimizer.params, once.params, strict=True):
        torch.testing.assert_close(mine.grad, (chunks_before + 1) * expected.grad)
    assert optimizer.released.histogram.counts.sum() == pytest.approx(3 * (chunks_before + 1))
