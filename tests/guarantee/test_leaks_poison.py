"""One poisonous record in ternary and replayed layers: the step is taken, and is that of the other records."""

import math

import pytest
import torch
from bit_layers import DetachBitLinear
from noiseless import engine_for, released
from torch import nn

from opacus_ac.grad_sample import register_ste_linear
from opacus_ac.grad_sample.rules import bitlinear

pytestmark = pytest.mark.filterwarnings("ignore")

VALUES = {
    "NaN": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "1e30": 1e30,
    "1e38": 3e38,
    "-1e25": -1e25,
    "1e16": 1e16,
}


class Gate(nn.Module):
    """Has parameters of its own and no rule: it is run again, record by record."""

    def __init__(self, width):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)  # of huge numbers: rounding only
        return torch.sigmoid(centred * self.scale + self.shift) * x


class Half(nn.Linear):
    def forward(self, x):
        w = self.weight
        return nn.functional.linear(x, w + (w.half().to(w) - w).detach(), self.bias)


LAYERS = {
    "ternary": lambda: DetachBitLinear(6, 6),
    "ternary without bias": lambda: DetachBitLinear(6, 6, bias=False),
    "half": lambda: Half(6, 6),
    "replayed": lambda: Gate(6),
}


class Model(nn.Module):
    """A layer between two others; rows ``[B, 3, 6]``."""

    def __init__(self, layer, first):
        super().__init__()
        self.first = nn.Identity() if first else nn.Linear(6, 6)
        self.layer, self.last = LAYERS[layer](), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(self.layer(self.first(x))).mean((1, 2))


def made(layer, mode, dtype, first=True):
    for cls in (DetachBitLinear, Half):
        register_ste_linear(cls)
    torch.manual_seed(3)
    return engine_for(Model(layer, first).to(dtype), 5, mode)


def rows(dtype, value=None, where=(2, 1, 4)):
    x = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    if value is not None:
        x[where] = value
    return x


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["bk", "hooks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_poisonous_record_neither_stops_nor_changes_the_others(value, layer, mode, dtype, fresh):
    """In the first batch, when the structure of a layer is looked at, and in a later one."""
    model, optimizer = made(layer, mode, dtype)
    others_rows = rows(dtype)[[0, 1, 3, 4]]
    if not fresh:
        released(optimizer, model(rows(dtype)))
    everybody = released(optimizer, model(rows(dtype, VALUES[value])))
    others = released(optimizer, model(others_rows))
    assert bool(torch.isfinite(everybody).all())
    assert float((everybody - others).norm()) <= optimizer.statistics.sensitivity * (1 + 1e-4)
    if not math.isfinite(VALUES[value]):
        gradients = sum(p.numel() for p in optimizer.params)
        torch.testing.assert_close(everybody[:gradients], others[:gradients], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_a_batch_of_poison_alone(layer, mode):
    model, optimizer = made(layer, mode, torch.float32)
    x = torch.full((2, 3, 6), math.nan)
    x[1] = 1e30 * torch.randn(3, 6)
    assert bool(torch.isfinite(released(optimizer, model(x))).all())
    assert float(released(optimizer, model(rows(torch.float32))).norm()) > 0.1


class Clipped(nn.Linear):
    """Lets no gradient through where a weight is large: no straight-through layer."""

    def forward(self, x):
        w = self.weight
        passed = w * (w.abs() < 0.3)
        return nn.functional.linear(x, passed + (w.sign() - passed).detach(), self.bias)


@pytest.mark.parametrize("value", [None, *VALUES])
def test_a_layer_that_is_none_is_found_beside_poison(value, monkeypatch):
    """The check looks at the other records: poison does not switch it off."""
    monkeypatch.setitem(LAYERS, "clipped", lambda: Clipped(6, 6))
    register_ste_linear(Clipped)
    monkeypatch.setattr("opacus_ac.grad_sample.checks.exactness._Examiner._sampler_problem", lambda *args: None)
    model, optimizer = made("clipped", "bk", torch.float32)
    with pytest.raises(ValueError, match="not a straight-through linear layer"):
        released(optimizer, model(rows(torch.float32, None if value is None else VALUES[value])))


class Noisy(Gate):
    """Random: run again, it returns something else."""

    def forward(self, x):
        return super().forward(x) * (1 + 0.1 * torch.rand(x.shape[:1] + (1,) * (x.dim() - 1)))


@pytest.mark.parametrize("value", [None, *VALUES])
def test_a_random_layer_is_found_beside_poison(value, monkeypatch):
    """Large outputs of one record excuse no other."""
    monkeypatch.setitem(LAYERS, "noisy", lambda: Noisy(6))
    monkeypatch.setattr("opacus_ac.grad_sample.checks.exactness._Examiner._functorch_problem", lambda *args: None)
    model, optimizer = made("noisy", "bk", torch.float32)
    with pytest.raises(ValueError, match="does not return what it returned on the batch"):
        released(optimizer, model(rows(torch.float32, None if value is None else VALUES[value])))


def test_the_guard_against_poison_is_needed(monkeypatch):
    """With every record taken as ordinary, the run stops."""
    monkeypatch.setattr(bitlinear, "_ordinary_records", lambda factors: torch.ones(5, dtype=torch.bool))
    model, optimizer = made("ternary", "bk", torch.float32)
    with pytest.raises(ValueError, match="not a straight-through"):
        released(optimizer, model(rows(torch.float32, math.nan)))
