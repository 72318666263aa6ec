"""Modules without a rule are run again on single records: parameters in containers, operations that vmap does not know."""

import copy

import pytest
import torch
from torch import nn

from opacus_ac.grad_sample import check_model, explain
from opacus_ac.grad_sample.one_backward import replay
from opacus_ac.testing import check_norms, one_backward, per_sample_gradients, worst_error


class Scales(nn.Module):
    """Computes with the parameters of containers that are never called, one of them inside of another."""

    def __init__(self):
        super().__init__()
        self.factors = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.by_name = nn.ModuleDict({"inner": nn.ParameterDict({"shift": nn.Parameter(torch.randn(4))})})
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        for factor in self.factors:
            x = self.mix(x * factor)
        return x + self.by_name["inner"]["shift"]


class Bank(nn.Module):
    """Hands its container to the layers inside, which are all that uses it."""

    class Layer(nn.Module):
        def __init__(self, bank):
            super().__init__()
            self.bank = bank

        def forward(self, x):
            return torch.tanh(x @ self.bank["weight"])

    def __init__(self):
        super().__init__()
        self.bank = nn.ParameterDict({"weight": nn.Parameter(torch.randn(4, 4))})
        self.layers = nn.Sequential(self.Layer(self.bank), nn.Linear(4, 4), self.Layer(self.bank))

    def forward(self, x):
        return self.layers(x)


class Square(torch.autograd.Function):
    """Written the old way, which ``torch.func`` refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return Square.apply(x * self.scale)


class Choosy(nn.Module):
    """Asks for a value in the middle."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x * self.scale if float((x * self.scale).sum()) < 1e9 else x


CASES = {"containers": Scales, "bank": Bank, "old function": Opaque, "value": Choosy}


def case(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), CASES[name](), nn.Linear(4, 2)).double().train()
    return model, torch.randn(5, 6, 3, dtype=torch.float64)


def loss(model, batch):
    return model(batch).square().sum((1, 2)).mean()


@pytest.mark.parametrize("at_once", [1 << 28, 60], ids=["together", "in parts"])
@pytest.mark.parametrize("name", CASES)
def test_records_are_those_of_the_loop(name, at_once, monkeypatch):
    monkeypatch.setattr(replay, "_TOGETHER", at_once)
    model, batch = case(name)
    want = per_sample_gradients(copy.deepcopy(model), batch, loss)
    norms, sums = one_backward(model, batch, loss)
    check_norms(norms, want, rtol=1e-9)
    assert worst_error(sums, {n: w.sum(0) for n, w in want.items()})[0] < 1e-9


@pytest.mark.parametrize(("name", "apart"), [("containers", False), ("old function", True), ("value", True)])
def test_only_what_vmap_cannot_run_is_run_one_record_after_the_other(name, apart, monkeypatch):
    calls = []
    original = replay._one_by_one
    monkeypatch.setattr(replay, "_one_by_one", lambda *args: calls.append(1) or original(*args))
    model, batch = case(name)
    one_backward(model, batch, loss)
    assert bool(calls) is apart
    assert (model[1] in replay._NOT_TOGETHER) is apart


def test_a_container_on_a_layer_with_a_rule_is_refused():
    model, _ = case("bank")
    model[0].extra = nn.ParameterDict({"unused": nn.Parameter(torch.randn(3))})
    with pytest.raises(
        ValueError, match=r"0\.extra \(ParameterDict\): it is a container whose forward is never called"
    ):
        check_model(model, mode="bk")


@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_hooks_on_gradients_of_parameters_are_refused(mode):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    handle = model[1].weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(ValueError, match=r"1\.weight: Tensor\.register_hook was called on it"):
        check_model(model, mode=mode)
    handle.remove()
    check_model(model, mode=mode)


def test_explain_says_what_is_run_again():
    rows = {row.parameter: row for row in explain(case("containers")[0])}
    for name in ("1.factors.0", "1.by_name.inner.shift", "1.mix.weight"):
        assert rows[name].route == "replay"
        assert "replayed as part of 1" in rows[name].note
    assert rows["0.weight"].route != "replay"
