"""A private step waits for the device a few times for each physical batch, however many parameters there are.

``OPACUS_AC_TEST_DEVICE=cuda pytest tests/grad_sample/test_host_syncs.py`` counts what torch itself reports on a GPU.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import operations_table
import pytest
import tiny_models
import torch
from bit_layers import DetachBitLinear
from operations_table import Operations
from tiny_models import DEVICE
from tiny_trainer import rows
from torch import Tensor, nn
from torch.utils.data import DataLoader
from waits import Waits

from opacus_ac import PrivacyEngine
from opacus_ac.clipping import POLICIES
from opacus_ac.grad_sample import register_ste_linear
from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.loss import fused_causal_lm_loss, per_record_causal_lm_loss

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning", "ignore::UserWarning")
WIDTH, RECORDS = 12, 8

ON_THE_HOST = {
    "grad_sample/one_backward/certified.py certified",
    "grad_sample/one_backward/weighted_sums.py __init__",
    "grad_sample/one_backward/source.py accumulate",
    "grad_sample/late_checks.py verify",
    "optimizer/records.py _add_records",
    "optimizer/records.py _factors",
    "clipping/paper.py observe_private",
    "noise/forward_randomness.py _close",
    "loss.py _overwrite",
}
"""Functions that look at values which are on the host in any case: norms and masks after one transfer, generators."""

EACH_ONCE = {
    "grad_sample/transfers.py on_host",
    "optimizer/model_watch.py _compare",  # before the charge and after the update, by type of the buffers
    "loss.py _check_labels",
    "loss.py backward",
}
"""Functions that wait for the device, some times for each physical batch."""


class Layers(nn.Module):
    """A table, tied to the head or not, and blocks of a dense layer with a bias and a norm."""

    def __init__(self, layers: int, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(tiny_models.VOCAB, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH)]) for _ in range(layers))
        self.head = nn.Linear(WIDTH, tiny_models.VOCAB, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.table(input_ids)
        for dense, norm in self.blocks:
            x = x + torch.tanh(dense(norm(x)))
        return self.head(x)


class Positions(nn.Embedding):
    """Makes its ids itself."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward(mask.cumsum(1) % self.num_embeddings)


class Gain(nn.Module):
    """Without a rule: it is run again on single records."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.gain)


class OwnLayers(nn.Module):
    """Blocks of layers whose rules check their second run: straight-through, own lookups, without a rule."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tiny_models.VOCAB, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleList([DetachBitLinear(WIDTH, WIDTH), Positions(5, WIDTH), Gain()]) for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, tiny_models.VOCAB)
        register_ste_linear(DetachBitLinear)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        for dense, positions, gain in self.blocks:
            x = x + gain(dense(x) + positions(attention_mask))
        return self.head(x)


class Pictures(nn.Module):
    """Convolutions over an embedding of the tokens, one after the other."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(tiny_models.VOCAB, WIDTH)
        self.layers = nn.Sequential(*(nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(layers)))
        self.head = nn.Linear(WIDTH, tiny_models.VOCAB)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.head(self.layers(self.table(input_ids).transpose(1, 2)).transpose(1, 2))


def lora(layers: int) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny_models.qwen2(num_hidden_layers=layers), config)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def transformer(layers: int) -> nn.Module:
    return tiny_models.qwen2(num_hidden_layers=layers)


FEW, MANY = (1, 4), (2, 8, 32)
#: Name -> numbers of layers, the model of each, and settings. A new way of computing gets its count by a row.
CASES: dict[str, tuple[tuple[int, ...], Callable[[int], nn.Module], dict[str, Any]]] = {
    "plain": (MANY, Layers, {}),
    "tied": (MANY, lambda n: Layers(n, tied=True), {}),
    "no average": (FEW, Layers, {"ema_decay": None}),
    "fused step": (MANY, Layers, {"fused_step": True}),
    "fused AdamW": (FEW, Layers, {"optimizer": lambda m: adamw(m, fused=True), "fused_step": True}),
    "sgd": (FEW, Layers, {"optimizer": lambda m: torch.optim.SGD(m.parameters(), lr=0.1)}),
    "secure": (FEW, Layers, {"secure": True}),
    "loss": (FEW, Layers, {"loss_bound": 3.0}),
    "physical batches": (FEW, Layers, {"max_physical_batch_size": RECORDS // 2}),
    "convolutions": (MANY, Pictures, {}),
    "own layers": (MANY, OwnLayers, {}),
    "transformer": (FEW, transformer, {}),
    "bfloat16": (FEW, transformer, {"autocast": True}),
    "fused loss": (FEW, transformer, {"loss": fused_causal_lm_loss}),
    "lora": (FEW, lora, {}),
    **{f"policy {name}": (FEW, Layers, {"clip_policy": name}) for name in POLICIES},
}


def waits(
    model: nn.Module,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    loss: Callable[..., Tensor] = per_record_causal_lm_loss,
    autocast: bool = False,
    secure: bool = False,
    change: Callable[[dict[str, Tensor]], None] = lambda batch: None,
    **settings: Any,
) -> Counter[str]:
    """Return what a physical batch waits for: the fourth one, since some checks are made at the beginning only."""
    model = model.to(DEVICE)
    settings = {"noise_multiplier": 0.7, "max_grad_norm": 0.5, "ema_decay": 0.9, "poisson_sampling": False, **settings}
    model, inner, loader = PrivacyEngine(secure_mode=secure).make_private(
        module=model, optimizer=optimizer(model), data_loader=DataLoader(rows(4 * RECORDS), RECORDS), **settings
    )
    for number, batch in enumerate(itertools.islice(loader, 4)):
        batch = {name: values.to(DEVICE) for name, values in batch.items()}
        if number == 3:
            change(batch)
        with Waits() as found:
            inner.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
                output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
                losses = loss(getattr(output, "logits", output), batch["labels"])
            inner.record_losses(losses)
            losses.mean().backward()
            inner.step()
    return found.found


def of_the_package(found: Counter[str]) -> Counter[str]:
    return Counter({place: count for place, count in found.items() if "/" in place or place.startswith("loss.py")})


@pytest.mark.parametrize("name", CASES)
def test_waits_do_not_grow_with_the_number_of_parameters(name):
    sizes, build, settings = CASES[name]
    fewest, *others = (waits(build(layers), **settings) for layers in sizes)
    assert others == [fewest] * len(others)
    own = of_the_package(fewest)
    assert set(own) <= ON_THE_HOST | EACH_ONCE, "a new place waits: can it wait once for all parameters?"
    assert sum(count for place, count in own.items() if place in EACH_ONCE) <= 6


def without_labels(batch: dict[str, Tensor]) -> None:
    """A record whose gradient is zero."""
    batch["labels"][1] = -100


@pytest.mark.parametrize("layers", [2, 32])
def test_a_record_without_a_gradient_costs_one_more(layers):
    found = waits(Layers(layers), change=without_labels)
    assert found["grad_sample/transfers.py on_host"] == 2
    assert set(of_the_package(found)) <= ON_THE_HOST | EACH_ONCE


@pytest.mark.parametrize("kind", ["item", "truth", "copy", "mask"])
def test_one_wait_for_each_parameter_is_found(kind, monkeypatch):
    asks = {
        "item": lambda squares: squares[0].item(),
        "truth": lambda squares: bool((squares >= 0).all()),
        "copy": lambda squares: squares.cpu(),
        "mask": lambda squares: squares[squares > 0],
    }
    certificate = ParameterBook.certificate

    def planted(book: ParameterBook, *squares: Any) -> Any:
        found = certificate(book, *squares)
        asks[kind](found.squares)
        return found

    before = waits(Layers(8))
    monkeypatch.setattr(ParameterBook, "certificate", planted)
    # Two weights and a bias in each block, a table and a head.
    assert sum(waits(Layers(8)).values()) - sum(before.values()) == 3 * 8 + 2


ASKS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.argmax()),
    "truth": lambda x: bool(x.any()),
    "list": lambda x: x.tolist(),
    "copy to the host": lambda x: x.cpu(),
    "moved to the host": lambda x: x.to("cpu"),
    "moved to the host with a type": lambda x: x.to(device="cpu", dtype=torch.float64),
    "places": lambda x: x.nonzero(),
    "places of a condition": lambda x: torch.where(x > 0),
    "by mask": lambda x: x[x > 0],
    "written by mask": lambda x: x.clone().__setitem__(x > 0, x[x > 0] * 2),
    "selected": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x.clone()),
    "close": lambda x: torch.allclose(x, x),
    "unique": lambda x: x.unique(),
    "repeated": lambda x: x.repeat_interleave(torch.ones_like(x, dtype=torch.long)),
    "counted": lambda x: x.long().bincount(),
}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there torch reports waits itself")
@pytest.mark.parametrize("name", ASKS)
def test_the_counter_sees(name):
    x = torch.arange(5.0)
    with Waits() as found:
        ASKS[name](x)
    assert sum(found.found.values()) >= 1
    assert set(found.found) == {"test_host_syncs.py <lambda>"}


def test_the_counter_sees_nothing_else():
    x = torch.arange(5.0, device=DEVICE)
    with Waits() as found:
        x.sum().add(torch.where(x > 0, x, 0).masked_fill(x > 2, 1)[:2].sum())
        x[torch.zeros(3, dtype=torch.long, device=DEVICE)].clone().copy_(x[:3])
        torch.stack([x, x]).to(torch.float64).unbind()
    assert not found.found


def test_small_parameters_are_one_computation(monkeypatch):
    """What is asked of the device after the backward pass, for the norms, does not grow with the number of layers."""

    def operations(layers: int) -> int:
        counts = []
        finish = BookKeepingSource.finish_batch

        def counted(source: BookKeepingSource, *weights: Any) -> Tensor:
            with Operations() as found:
                norms = finish(source, *weights)
            counts.append(found.count)
            return norms

        with monkeypatch.context() as patch:
            patch.setattr(BookKeepingSource, "finish_batch", counted)
            waits(Layers(layers))
        return counts[-1]

    assert operations(2) == operations(16)


def test_the_counter_of_operations_sees_no_views_and_no_new_memory():
    x = torch.ones(2, 3, device=DEVICE)
    with Operations() as found:
        torch.empty_like(x).view(6).unsqueeze(0).transpose(0, 1)
    assert found.count == 0
    with Operations() as found:
        x.t().double().sum(0)
    assert found.count == 2


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counted on the CPU")
@pytest.mark.parametrize("length", [16, 512], ids=["by Gram matrices", "written down"])
def test_a_private_step_asks_for_few_more_operations_in_each_layer(length):
    """Small models wait for the processor to ask, not for the device."""
    ordinary, own = (operations_table.of_a_layer(length, private=private) for private in (False, True))
    assert own - ordinary <= 50
