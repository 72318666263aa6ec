"""Private steps on a device beside those on the processor, with the same seeded noise: every policy, mode, setting, method.

``OPACUS_AC_TEST_DEVICE=cuda pytest tests/engine/test_devices.py tests/engine/test_device_routes.py tests/grad_sample/test_book_keeping.py``
runs them on a GPU; without it they show that runs repeat. ``examples/benchmarks/device_check.py`` does so, and measures.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import tiny_trainer
import torch
from allocation_runs import HISTORY, PAID, UNEVEN
from device_runs import CPU, adamw, lm_run, moved, outcome, private
from helpers import classifier, loader, loss_of
from tiny_models import DEVICE
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zeroth import by_hand, direction, flat

from opacus_ac import PrivacyEngine
from opacus_ac.clipping import POLICIES
from opacus_ac.grad_sample import expand_broadcast_embeddings, register_rules
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.loss import fused_causal_lm_loss, per_record_causal_lm_loss

ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")


def run(device: torch.device, optimizer: Callable[[nn.Module], Any] = adamw, **settings: Any) -> Tensor:
    """Two passes over the small classification task, float64."""
    _, model, private_optimizer, batches = private(classifier().to(device), optimizer, **settings)
    for _ in range(2):
        for batch in batches:
            private_optimizer.zero_grad()
            inputs, targets = moved(batch, device)
            losses = nn.functional.cross_entropy(model(inputs), targets, reduction="none")
            private_optimizer.record_losses(losses)
            losses.mean().backward()
            private_optimizer.step()
    return outcome(model, private_optimizer)


#: Name -> settings. A new policy, mode or method gets its run on every device by a row.
RUNS: dict[str, dict[str, Any]] = {
    **{f"policy {name}": {"clip_policy": name, "loss_bound": 3.0} for name in POLICIES},
    **{f"mode {mode}": {"grad_sample_mode": mode, "loss_bound": 3.0} for mode in ("bk", "hooks", "functorch")},
    "flat": {"clipping": "flat", "loss_bound": 3.0},
    "physical batches": {"max_physical_batch_size": 5, "loss_bound": 3.0},
    "fused step": {"fused_step": True, "loss_bound": 3.0},
    "fused AdamW": {"optimizer": lambda m: adamw(m, fused=True), "loss_bound": 3.0},
    "fused step of fused AdamW": {
        "optimizer": lambda m: adamw(m, fused=True), "fused_step": True, "max_physical_batch_size": 5, "loss_bound": 3.0,
    },
    "foreach AdamW": {"optimizer": lambda m: adamw(m, foreach=True), "loss_bound": 3.0},
    "sgd": {"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), "loss_bound": 3.0},
    "shuffled": {"poisson_sampling": False, "loss_bound": 3.0},
    "uneven allocation": {"noise_allocation": UNEVEN, "loss_bound": 3.0},
    "allocation from history": {"noise_allocation": HISTORY, "loss_bound": 3.0},
    "paid allocation": {"noise_allocation": PAID, "loss_bound": 3.0},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_on_every_device(name: str) -> None:
    """Weights, averages, C and multiplier after 8 noisy steps: to 1e-9."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [run(device, **RUNS[name]) for device in (CPU, DEVICE)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", [per_record_causal_lm_loss, fused_causal_lm_loss])
@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-rms-norm", "gpt2", "gemma3", "mamba"])
def test_language_models(name: str, loss: Callable[..., Tensor]) -> None:
    """Four noisy steps, physical batches of 6; transformers' norms compute in float32, and quantisers round."""
    results = [lm_run(name, device, loss, max_physical_batch_size=6) for device in (CPU, DEVICE)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-tied", "gpt2"])
def test_bfloat16_autocast(name: str) -> None:
    """No clipped record is longer than C by more than 1e-4 of it: one backward pass a record, of what the batch was made of."""
    model = tiny_models.build(name, dtype=torch.float32)
    batch, bound = tiny_models.token_batch(), 0.1
    register_rules(model)
    named = dict(model.named_parameters())
    source = BookKeepingSource(model, list(named.values()), list(named), "mean")

    def backward() -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = tiny_models.mean_loss(model, batch)
        loss.backward()
        return source.finish_batch()

    with expand_broadcast_embeddings(model):
        detach = source.attach()
        for record in range(4):
            norms = backward()
            chosen = torch.zeros_like(norms)
            chosen[record] = bound / norms[record]
            source.accumulate(chosen)
            squares = [float(s.double().square().sum()) for s in source.sums() if s is not None]
            assert math.sqrt(sum(squares)) <= bound * (1 + 1e-4)
            assert math.sqrt(sum(squares)) >= bound * 0.99
            source.clear(sums=True)
        detach()


@pytest.mark.parametrize("kind", ["gaussian", "sphere", "rademacher"])
def test_zeroth_order(kind: str) -> None:
    """Without noise a step goes along its directions by what was measured, and leaves nothing else behind."""
    model = classifier().to(DEVICE).eval()
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = by_hand(model, inner, direction=kind, smoothing=1e-4, max_grad_norm=1e6, expected_batch_size=16)
    inputs, targets = moved(next(iter(loader(64, 16))), DEVICE)

    def losses() -> Tensor:
        return nn.functional.cross_entropy(model(inputs), targets, reduction="none")

    before = flat(model).clone()
    seeds = list(optimizer.direction_seeds)
    directions = torch.stack([direction(optimizer, seed) for seed in seeds])
    gradient = torch.autograd.grad(losses().mean(), list(model.parameters()))
    slopes = directions @ torch.cat([g.reshape(-1) for g in gradient])
    optimizer.step(losses)
    expected = before - 0.5 * (slopes[:, None] * directions).mean(0)
    torch.testing.assert_close(flat(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer(bf16: bool, tmp_path: Any) -> None:
    """Three steps on the processor and on the device."""
    results = []
    for device in (CPU, DEVICE):
        trainer = tiny_trainer.trainer(
            tmp_path / device.type, use_cpu=device == CPU, bf16=bf16, options={"noise_generator": tiny_trainer.generator()},
            dataloader_pin_memory=True,
        )  # fmt: skip
        trainer.train()
        assert next(trainer.model.parameters()).device.type == device.type
        results.append(tiny_trainer.weights(trainer.model).cpu())
    tolerance = 2e-2 if bf16 else 1e-4
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


def test_a_run_goes_on_on_another_device(tmp_path: Any) -> None:
    """Half on the device, half on the processor: as the whole on the processor."""

    def half(model: nn.Module, optimizer: Any, batches: Any, device: torch.device) -> None:
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, moved(batch, device)).backward()
            optimizer.step()

    engine, model, optimizer, batches = private(classifier().to(DEVICE))
    half(model, optimizer, batches, DEVICE)
    engine.save_checkpoint(path=tmp_path / "half.pt", module=model, optimizer=optimizer)
    other, fresh, second, again = private(classifier(seed=9))
    other.load_checkpoint(path=tmp_path / "half.pt", module=fresh, optimizer=second)
    half(fresh, second, again, CPU)
    _, whole, third, batches = private(classifier())
    half(whole, third, batches, CPU)
    half(whole, third, batches, CPU)
    torch.testing.assert_close(outcome(fresh, second), outcome(whole, third), rtol=1e-9, atol=1e-9)


@pytest.mark.statistical
@pytest.mark.parametrize("fused", [False, True])
def test_secret_noise_reaches_every_weight(fused: bool) -> None:
    """SGD on 300,000 weights that the batch does not use: std and mean of the step within 5.5 standard errors."""

    class WithUnused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Parameter(torch.zeros(300_000))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = WithUnused().to(DEVICE)
    data = DataLoader(TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,))), batch_size=16)
    engine = PrivacyEngine()
    model, optimizer, batches = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), data_loader=data, noise_multiplier=2.0,
        max_grad_norm=1.0, clipping="flat", fused_step=fused, lr_control=False, ema_decay=None,
    )  # fmt: skip
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, moved(batch, DEVICE)).backward()
        optimizer.step()
        break
    values = model.unused.detach().double().cpu()
    std = 2.0 / 16
    assert abs(float(values.mean())) < 5.5 * std / math.sqrt(values.numel())
    assert abs(float(values.var()) / std**2 - 1) < 5.5 * math.sqrt(2 / values.numel())
    assert ("ChaCha20" in str(engine.privacy_report(1e-5))) == ON_GPU
