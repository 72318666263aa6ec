"""Registration is explicit and idempotent, and ``check_model`` refuses what would not be exact."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks, GradSampleModule, register_grad_sampler
from opacus.grad_sample.linear import compute_linear_grad_sample
from torch import Tensor, nn

from opacus_ac.grad_sample import (
    check_model,
    constant_buffers_ok,
    explain,
    register_rule,
    register_rules,
    register_ste_linear,
)
from opacus_ac.grad_sample.checks import probe as probe_module
from opacus_ac.testing import per_sample_gradients


def table() -> dict[type[nn.Module], object]:
    return dict(GradSampleHooks.GRAD_SAMPLERS)


# ---- registration ------------------------------------------------------------------------------------------------

IMPORT_HAS_NO_EFFECT = """
import sys, opacus
from opacus.grad_sample import GradSampleHooks
before = dict(GradSampleHooks.GRAD_SAMPLERS)
import opacus_ac.grad_sample, opacus_ac.testing
assert dict(GradSampleHooks.GRAD_SAMPLERS) == before
sys.modules["transformers"] = None          # importing it is an error from here on
opacus_ac.grad_sample.register_rules()
added = {c.__name__ for c, s in GradSampleHooks.GRAD_SAMPLERS.items() if before.get(c) is not s}
assert added == {"Conv1d", "Conv2d", "Conv3d", "Embedding", "EmbeddingBag", "LayerNorm"}, added
import torch
model = torch.nn.Sequential(torch.nn.Embedding(5, 4, padding_idx=0), torch.nn.Linear(4, 2)).train()
opacus_ac.grad_sample.register_rules(model)
opacus_ac.grad_sample.check_model(model)
print("fine")
"""


def test_import_registers_nothing_and_transformers_is_optional() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_HAS_NO_EFFECT], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr


@pytest.mark.parametrize("name", ["bitnet-rms-norm", "gemma3", "gpt2"])
def test_registration_is_idempotent(name: str) -> None:
    model = tiny_models.build(name)
    untouched = table()
    register_rules(model)
    once = table()
    register_rules(model)
    register_rules()
    assert table() == once
    assert len(once) > len(untouched)


def test_a_rule_of_the_user_is_kept() -> None:
    def rule(module: nn.Embedding, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        raise NotImplementedError

    register_rule(nn.Embedding, rule)
    register_rules(nn.Embedding(3, 2))
    row = explain(nn.Embedding(3, 2))[0]
    assert row.rule == "user: rule"


def test_registration_checks_its_arguments() -> None:
    with pytest.raises(TypeError, match="Module"):
        register_ste_linear(int)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="Module"):
        register_rule(nn.Linear(2, 2), compute_linear_grad_sample)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callable"):
        register_rule(nn.Linear, None)  # type: ignore[arg-type]


# ---- wrong rules ---------------------------------------------------------------------------------------------------


class HalfLinear(nn.Linear):
    """Rounds its input to half precision: close to nn.Linear, and not the same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x + (x.half().to(x) - x).detach(), self.weight.sign() + self.weight - self.weight.detach())


class PlainLinear(nn.Linear):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("size", [8, 3000], ids=["small", "large"])
def test_subclass_of_linear_with_linears_sampler(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large layers are probed on a shrunken copy: same verdict."""
    monkeypatch.setattr(probe_module, "LARGE", 10_000)
    register_grad_sampler([HalfLinear, PlainLinear])(compute_linear_grad_sample)
    check_model(nn.Sequential(PlainLinear(size, 16)).train())
    wrong = nn.Sequential(nn.Linear(4, size), HalfLinear(size, 16, bias=False)).train()
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(ValueError, match=r"1 \(HalfLinear\).*register_ste_linear\(HalfLinear\)"):
        check_model(wrong)
    assert all(torch.equal(before[k], v) for k, v in wrong.state_dict().items())
    for parameter in wrong[1].parameters():
        parameter.requires_grad_(False)
    check_model(wrong)  # what is frozen is nobody's business


def test_probe_leaves_the_random_state_alone() -> None:
    register_grad_sampler(PlainLinear)(compute_linear_grad_sample)
    model = PlainLinear(3, 2).train()
    state = torch.get_rng_state()
    check_model(model)
    assert torch.equal(state, torch.get_rng_state())


class Affine(nn.Module):
    """Its input cannot be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def affine_rule(module: Affine, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {module.scale: activations[0] * backprops}


def affine_rule_off(module: Affine, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {module.scale: 1.01 * activations[0] * backprops}


def affine_rule_empty(module: Affine, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    return {}


def test_rules_of_the_user_are_probed_where_an_input_is_given() -> None:
    model = nn.Sequential(Affine()).train()
    make = {"probe_input": lambda module: torch.randn(3, *module.scale.shape)}
    register_rule(Affine, affine_rule, **make)
    check_model(model)
    assert explain(model)[0].note == ""
    register_rule(Affine, affine_rule_off, **make)
    with pytest.raises(ValueError, match=r"affine_rule_off.*off by 1.*scale"):
        check_model(model)
    register_rule(Affine, affine_rule_empty, **make)
    with pytest.raises(ValueError, match=r"returns nothing.*scale"):
        check_model(model)
    register_rule(Affine, affine_rule)
    check_model(model)  # nobody can check it: trusted, and said so
    assert "not verified" in explain(model)[0].note
    register_grad_sampler(Affine)(compute_linear_grad_sample)  # somebody else's rule is not trusted
    with pytest.raises(ValueError, match="another class"):
        check_model(model)


def test_forward_replaced_on_the_instance() -> None:
    layer = nn.Linear(4, 2)
    layer.forward = lambda x: F.linear(x.round(), layer.weight, layer.bias)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"0 \(Linear\).*off by"):
        check_model(nn.Sequential(layer).train())
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias)  # type: ignore[method-assign]
    check_model(nn.Sequential(layer).train())


# ---- buffers, inputs, containers ------------------------------------------------------------------------------------


class Counting(nn.Linear):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.copy_(x.detach().abs().max())
        return super().forward(x)


def test_buffers() -> None:
    model = nn.Sequential(Counting(4, 2)).train()
    assert not constant_buffers_ok(model[0])
    with pytest.raises(ValueError, match=r"0 \(Counting\).*trainable layer with buffers"):
        check_model(model)
    register_ste_linear(Counting)  # its rule would be exact, but the buffer leaks
    assert constant_buffers_ok(model[0])
    with pytest.raises(ValueError, match="changes its buffers"):
        check_model(model)
    model.requires_grad_(False)
    check_model(model)


def test_packed_bitlinear_has_nothing_to_train() -> None:
    from transformers.integrations.bitnet import BitLinear

    model = nn.Sequential(BitLinear(8, 8, bias=True), nn.Linear(8, 2)).train()
    check_model(model)
    assert [row.parameter for row in explain(model)] == ["1.weight", "1.bias"]


def test_offline_weight_scale_is_a_constant() -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(4, 2)
    assert not constant_buffers_ok(layer)
    register_rules()
    assert constant_buffers_ok(layer)


def test_layers_that_functorch_cannot_replay() -> None:
    for layer in (nn.Bilinear(2, 2, 2), nn.MultiheadAttention(4, 2)):
        with pytest.raises(ValueError, match=r"one input.*requires [23].*register_rule"):
            check_model(nn.Sequential(layer).train())
    with pytest.raises(ValueError, match=r"ParameterList.*never called"):
        check_model(nn.ParameterList([nn.Parameter(torch.ones(2))]))


class Wrapper(nn.Module):
    """Own parameter, no rule: functorch replays it whole, with the ternary layer inside."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 4))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.gain)


def test_a_rule_does_not_reach_into_a_functorch_block() -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    model = nn.Sequential(Wrapper(nn.Linear(4, 2))).train()
    check_model(model)
    rows = {row.parameter: row for row in explain(model)}
    assert rows["0.inner.weight"].rule == "functorch"
    assert rows["0.inner.weight"].note == "replayed as part of 0"
    model = nn.Sequential(Wrapper(AutoBitLinear(4, 2, online_quant=True))).train()
    register_rules(model)
    with pytest.raises(ValueError, match=r"0 \(Wrapper\).*inside it: AutoBitLinear.*setup_context"):
        check_model(model)


class TwoPlaces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(3, 3)
        self.left = nn.Sequential(shared)
        self.right = nn.Sequential(shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x).tanh())


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(2).flatten(1).sum(1).mean()


def test_one_module_in_two_places_is_doubled_by_opacus() -> None:
    model, batch = TwoPlaces().double().train(), torch.randn(3, 3, dtype=torch.float64)
    want = per_sample_gradients(model, batch, squares)["left.0.weight"]
    got = tiny_models.hooks_gradients(model, batch, squares)["left.0.weight"]
    assert not torch.allclose(got, want, rtol=0.1)  # the hazard
    with pytest.raises(ValueError, match=r"left\.0 and right\.0 \(Linear\).*twice"):
        check_model(model)


def test_weight_norm_is_refused() -> None:
    layer = nn.utils.weight_norm(nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"weight_g, weight_v.*weight_norm"):
        check_model(nn.Sequential(layer).train())


def test_opt_positions_are_refused() -> None:
    from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

    model = nn.ModuleDict({"positions": OPTLearnedPositionalEmbedding(16, 4)}).train()
    register_rules(model)
    with pytest.raises(ValueError, match=r"positions \(OPTLearnedPositionalEmbedding\).*register_rule"):
        check_model(model)


# ---- mode "functorch" ------------------------------------------------------------------------------------------------


def test_mode_functorch() -> None:
    from transformers.integrations.bitnet import AutoBitLinear

    check_model(tiny_models.build("qwen2-tied"), mode="functorch")
    register_rules()
    model = nn.Sequential(AutoBitLinear(4, 2, online_quant=True)).train()
    check_model(model)
    with pytest.raises(ValueError, match="setup_context"):
        check_model(model, mode="functorch")
    model = nn.Sequential(AutoBitLinear(4, 2, online_quant=True, use_rms_norm=True)).train()
    with pytest.raises(ValueError, match="count twice"):
        check_model(model, mode="functorch")
    with pytest.raises(ValueError, match="buffers"):
        check_model(nn.Sequential(AutoBitLinear(4, 2)).train(), mode="functorch")


def test_several_problems_are_named_at_once() -> None:
    model = nn.Sequential(nn.Bilinear(2, 2, 2), nn.Linear(2, 2), Counting(2, 2), Counting(2, 2)).train()
    with pytest.raises(ValueError, match=r"(?s)0 \(Bilinear\).*2 and 1 more \(Counting\)"):
        check_model(model)
    GradSampleModule(nn.Sequential(nn.Linear(2, 2)))  # the table itself is still Opacus's
