"""fused_step: the same numbers as the ordinary private step, in the gradient memory of the largest parameter."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import tiny_models
import torch
from helpers import classifier, loader, loss_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.release import GaussianMechanism

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}


def run(model: nn.Module, make_optimizer: Any, fused: bool, **kwargs: Any) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(5)
    arguments = {"noise_multiplier": 0.7, "max_grad_norm": 0.5, "ema_decay": 0.9, **kwargs}
    model, optimizer, batches = PrivacyEngine().make_private(
        module=model, optimizer=make_optimizer(model), data_loader=loader(64, 16), fused_step=fused,
        noise_generator=torch.Generator().manual_seed(3), **arguments,
    )  # fmt: skip
    for _ in range(2):
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    assert all((p.grad is None) == fused for p in model.parameters())
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), optimizer


@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("split", [None, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_numbers_are_the_same(name: str, split: int | None, mode: str) -> None:
    """Weights, EMA, C and the inner optimizer's state, to the last bit, over 8 steps with seeded noise."""
    results = [
        run(
            classifier(),
            lambda m: OPTIMIZERS[name](m.parameters()),
            fused,
            max_physical_batch_size=split,
            grad_sample_mode=mode,
        )
        for fused in (False, True)
    ]
    (plain, first), (fused, second) = results
    assert torch.equal(plain, fused)
    assert first.max_grad_norm == second.max_grad_norm
    assert all(torch.equal(a, b) for a, b in zip(first.ema._average, second.ema._average, strict=True))
    states = [o.original_optimizer.state_dict()["state"] for o in (first, second)]
    for index, values in states[0].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(states[1][index][k]))
            for k, v in values.items()
            if v is not None
        )
    assert first.released.histogram.counts.tolist() == second.released.histogram.counts.tolist()


def test_parameter_groups_keep_their_settings_and_schedulers_theirs() -> None:
    def groups(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "weight_decay": 0.5}],
            lr=0.01,
        )

    (plain, first), (fused, second) = (run(classifier(), groups, fused) for fused in (False, True))
    assert torch.equal(plain, fused)
    assert [g["lr"] for g in second.param_groups] == [0.1, 0.01]
    assert [len(g["params"]) for g in second.original_optimizer.param_groups] == [2, 2]
    schedule = torch.optim.lr_scheduler.StepLR(second, 1, gamma=0.5)
    schedule.step()
    assert [g["lr"] for g in second.param_groups] == [0.05, 0.005]
    assert len(first.param_groups) == 2


def test_tied_weights_of_a_language_model() -> None:
    weights = []
    for fused in (False, True):
        model, optimizer, _ = PrivacyEngine().make_private(
            module=(model := tiny_models.build("qwen2-tied", dtype=torch.float32)),
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
            data_loader=DataLoader(TensorDataset(torch.zeros(32)), batch_size=4),
            noise_multiplier=1.0, max_grad_norm=1.0, fused_step=fused, noise_generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        optimizer.plan = None
        for _ in range(3):
            optimizer.zero_grad()
            model(**tiny_models.token_batch()).loss.backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*weights)


def test_other_optimizers_are_refused() -> None:
    model = classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"fused_step=True.*Adagrad"):
        run(model, lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1), True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failure_inside_leaves_the_optimizer_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, _ = PrivacyEngine().make_private(
        module=(model := classifier()), optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        data_loader=loader(64, 16), noise_multiplier=1.0, max_grad_norm=1.0, clipping="flat", fused_step=True,
    )  # fmt: skip
    optimizer.plan = None
    batch = next(iter(loader(64, 16)))
    whole = GaussianMechanism.noise_in_place
    calls: list[int] = []

    def fail(self: Any, *args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("planted")
        whole(self, *args)

    monkeypatch.setattr(GaussianMechanism, "noise_in_place", fail)
    loss_of(model, batch).backward()
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step()
    monkeypatch.undo()
    assert sum(len(g["params"]) for g in optimizer.original_optimizer.param_groups) == 4
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def test_no_more_gradients_at_once_than_the_largest_takes() -> None:
    """What is alive when the inner optimizer steps: the reused buffer, and only the records that are still needed."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=i % 2 == 0) for i in range(6))).train()
    model, optimizer, _ = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(64, 16),
        noise_multiplier=1.0, max_grad_norm=1.0, clipping="flat", fused_step=True, ema_decay=None,
    )  # fmt: skip
    optimizer.plan = None
    seen: list[Any] = []
    alive: list[int] = []
    storages: dict[int, int] = {}
    stepped: list[int] = []
    inner = optimizer.original_optimizer.step

    def step() -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        stepped.append(len(gradients))
        storages.update({g.untyped_storage().data_ptr(): g.untyped_storage().nbytes() for g in gradients})
        gc.collect()
        alive.append(sum(1 for reference in seen if reference() is not None))
        inner()

    optimizer.original_optimizer.step = step
    deliver = optimizer.source._capture._deliver

    def noted(use: Any, gradient: torch.Tensor) -> None:
        seen.append(weakref.ref(gradient))
        deliver(use, gradient)

    optimizer.source._capture._deliver = noted
    model(torch.randn(4, 2, 32)).square().flatten(1).sum(1).mean().backward()
    optimizer.step()
    assert sum(stepped) == 9
    assert max(stepped) <= 2
    assert list(storages.values()) == [4 * 32 * 32]
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] <= 1
