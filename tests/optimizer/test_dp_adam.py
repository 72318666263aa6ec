"""DPAdamW: AdamW to the last bit without noise, an unbiased second moment with it, told the noise by the private step."""

import copy
import math

import pytest
import torch
from helpers import classifier, loader, loss_of, train
from torch import nn

from opacus_ac import PrivacyEngine
from opacus_ac.allocation import NoiseAllocation
from opacus_ac.optimizer import DPAdamW
from opacus_ac.optimizer.dp_adamw import second_moment

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning", "ignore::UserWarning")
SETTINGS = [
    {},
    {"weight_decay": 0.0},
    {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    {"betas": (0.0, 0.0)},
]


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in ((3, 4), (5,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_without_noise_it_is_adamw_to_the_last_bit(settings, dtype, gamma):
    mine, theirs = parameters(dtype), parameters(dtype)
    ours, reference = DPAdamW(mine, lr=0.01, gamma=gamma, **settings), torch.optim.AdamW(theirs, lr=0.01, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64).to(dtype)
            b.grad = a.grad.clone()
            ours.noise_std(a, 0.0)
        ours.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.statistical
def test_the_corrected_second_moment_is_unbiased_under_noise_that_changes():
    """n = 200,000 coordinates with E[g] = 0.3 and a std that moves from step to step; 6 sigma: 2e-9 false alarms."""
    n, mean, second = 200_000, 0.3, 0.99
    weight = nn.Parameter(torch.zeros(n, dtype=torch.float64))
    optimizer = DPAdamW([weight], lr=0.0, betas=(0.9, second), gamma=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        std = 0.5 + 0.4 * math.sin(step)
        weight.grad = mean + std * torch.randn(n, generator=generator, dtype=torch.float64)
        optimizer.noise_std(weight, std)
        optimizer.step()
    state = optimizer.state[weight]
    correction = 1 - second**60
    corrected = (state["exp_avg_sq"] - state["noise"]) / correction
    error = 6 * float(corrected.std()) / math.sqrt(n)
    assert float(corrected.mean()) == pytest.approx(mean**2, abs=error)
    assert float(state["exp_avg_sq"].mean() / correction) > 2 * mean**2  # what AdamW would divide by


def test_the_floor_is_a_share_of_the_noise():
    average = torch.tensor([0.5, 1.0, 1.05, 3.0])
    assert second_moment(average, 1.0, 0.1).tolist() == pytest.approx([0.1, 0.1, 0.1, 2.0])
    assert second_moment(average, 0.0, 0.1) is average


def private(inner, **kwargs):
    torch.manual_seed(5)
    arguments = {"noise_multiplier": 0.7, "max_grad_norm": 0.5, "ema_decay": 0.9, **kwargs}
    return PrivacyEngine().make_private(
        module=(model := classifier()),
        optimizer=inner(model.parameters()),
        data_loader=loader(64, 16),
        noise_generator=torch.Generator().manual_seed(3),
        **arguments,
    )


def dp_adamw(params):
    return DPAdamW(params, lr=0.01)


ALLOCATIONS = [None, NoiseAllocation("constant", weights={"0.*": 2.0, "*": 0.5}), NoiseAllocation(warmup=1, decay=0.5)]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {"normalize": True},
        {"normalize": False},
        {"batch_size_schedule": [8, 16, 24, 32] * 2},
        {"loss_reduction": "sum"},
    ],
)
def test_it_is_told_the_noise_of_each_parameter_and_step(allocation, settings, monkeypatch):
    """The std follows C_t, normalize, the expected batch size and the weights of the allocation."""
    told = []
    monkeypatch.setattr(DPAdamW, "noise_std", lambda self, p, std: (told.append(std), self._told.update({id(p): std})))
    model, optimizer, batches = private(dp_adamw, noise_allocation=allocation, clip_policy="geometric", **settings)
    reduction = settings.get("loss_reduction", "mean")
    seen = set()
    for _ in range(2):
        for batch in batches:
            weights = [1.0] * 4 if allocation is None else list(optimizer.allocation.weights)
            told.clear()
            optimizer.zero_grad()
            loss_of(model, batch, reduction).backward()
            optimizer.step()
            release = optimizer.released
            unit = 0.5 / release.max_grad_norm if settings.get("normalize", True) else 1.0
            size = release.expected_batch_size if reduction == "mean" else 1.0
            std = release.gradient_noise_multiplier * release.max_grad_norm * unit / size
            assert told == pytest.approx([std / w for w in weights], rel=1e-12)
            seen.add(round(std, 12))
    assert (len(seen) > 1) == (settings.get("normalize") is False or "batch_size_schedule" in settings)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("split", [None, 5])
def test_fused_steps_are_the_same(allocation, split):
    results = []
    for fused in (False, True):
        model, optimizer, batches = private(
            dp_adamw, fused_step=fused, noise_allocation=allocation, max_physical_batch_size=split
        )
        for _ in range(2):
            train(model, optimizer, batches)
        assert all((p.grad is None) == fused for p in model.parameters())
        results.append((torch.cat([p.detach().reshape(-1) for p in model.parameters()]), optimizer))
    assert torch.equal(results[0][0], results[1][0])
    noises = [[s["noise"] for s in o.original_optimizer.state_dict()["state"].values()] for _, o in results]
    assert noises[0] == noises[1]
    assert all(n > 0 for n in noises[0])


def test_a_private_run_without_noise_is_that_of_adamw():
    weights = []
    for inner in (dp_adamw, lambda params: torch.optim.AdamW(params, lr=0.01)):
        model, optimizer, batches = private(inner, noise_multiplier=0.0)
        train(model, optimizer, batches)
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    weights = []
    for interrupted in (False, True):
        torch.manual_seed(5)
        model, optimizer, batches = private(dp_adamw)
        engine_state = None
        train(model, optimizer, batches)
        if interrupted:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
            engine_state = torch.load(tmp_path / "state", weights_only=True)
            stream = copy.deepcopy(batches.batch_sampler.stream.state_dict())
            model, optimizer, batches = private(dp_adamw)
            model.load_state_dict(engine_state["model"])
            optimizer.load_state_dict(engine_state["optimizer"])
            batches.batch_sampler.stream.load_state_dict(stream)
        train(model, optimizer, batches)
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_gradient_whose_noise_nobody_stated_is_refused_before_anything_moves():
    first, second = parameters(torch.float64)
    optimizer = DPAdamW([first, second])
    before = [first.detach().clone(), second.detach().clone()]
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.noise_std(first, 1.0)
    with pytest.raises(ValueError, match="nobody stated the noise"):
        optimizer.step()
    assert torch.equal(first, before[0])
    optimizer.noise_std(second, 1.0)
    optimizer.step()
    with pytest.raises(ValueError, match="nobody stated the noise"):
        optimizer.step()  # stated once, for one step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"gamma": -0.1}, "gamma"),
        ({"eps": math.nan}, "eps"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        DPAdamW(parameters(torch.float64), **arguments)


def test_a_state_of_adamw_is_refused():
    """It does not know how much noise is in its second moment."""
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    reference = torch.optim.AdamW(theirs)
    for p in theirs:
        p.grad = torch.ones_like(p)
    reference.step()
    with pytest.raises(ValueError, match="noise is in its second moment"):
        DPAdamW(mine).load_state_dict(reference.state_dict())


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf])
def test_a_std_that_is_none_is_refused(std):
    weight = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="std of the noise"):
        DPAdamW([weight]).noise_std(weight, std)
