"""Mode "bk" against a loop of batch size one: norms and weighted sums, on layers, on whole models, in every setting."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from tiny_models import DEVICE, one_backward, worst_error
from torch import Tensor, nn

from opacus_ac.grad_sample import check_model, expand_broadcast_embeddings, explain, register_rules, register_ste_linear
from opacus_ac.grad_sample.one_backward import layer_terms as term_rules
from opacus_ac.grad_sample.one_backward import outer_products as terms
from opacus_ac.grad_sample.one_backward import parameter_book
from opacus_ac.grad_sample.rules import bitlinear, embedding, normalization
from opacus_ac.testing import check_norms, per_sample_gradients

LossFn = Callable[[nn.Module, Any], Tensor]
EXPERTS = [name for name in tiny_models.EXPERTS if name in tiny_models.MORE_MODELS]
ALL = [*tiny_models.MODELS, *tiny_models.MORE_MODELS]


def compare(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    *,
    norm_tolerance: float = 1e-7,
    tolerance: float | None = None,
    reduction: str = "mean",
) -> None:
    """Norms of all records and weighted sums of all parameters against the oracle."""
    model.to(DEVICE)
    batch = (
        batch.to(DEVICE) if isinstance(batch, Tensor) else {name: values.to(DEVICE) for name, values in batch.items()}
    )
    want = per_sample_gradients(model, batch, loss_fn)
    records = next(iter(want.values())).shape[0]
    weights = torch.linspace(0.2, 1.0, records, dtype=torch.float64)
    loss = (lambda m, b: loss_fn(m, b) * records) if reduction == "sum" else loss_fn
    norms, sums = one_backward(model, batch, loss, weights, reduction=reduction)
    check_norms(norms, want, rtol=norm_tolerance)
    expected = {n: torch.einsum("i,i...->...", weights.to(g.device, g.dtype), g) for n, g in want.items()}
    error, name = worst_error(sums, expected, floor=1e-5)
    assert error <= (norm_tolerance if tolerance is None else tolerance), name


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("name", ALL)
def test_models_in_float64(name: str) -> None:
    """transformers' norms compute in float32 even in a float64 model: that is the floor, at 1e-7."""
    compare(tiny_models.build(name), tiny_models.token_batch(), tiny_models.mean_loss, tolerance=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_models_in_float32(name: str, library: str) -> None:
    model = tiny_models.build(name, dtype=torch.float32)
    compare(model, tiny_models.token_batch(), tiny_models.mean_loss, norm_tolerance=2e-5, tolerance=2e-4)


@pytest.mark.parametrize("factor", [0.0, 1e9], ids=["gram", "kept"])
@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-rms-norm", "gpt2", "gemma3", "opt"])
def test_both_routes_of_the_norm(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "KEEP_FACTOR", factor)
    compare(tiny_models.build(name), tiny_models.token_batch(), tiny_models.mean_loss, tolerance=2e-6)


def all_masked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = batch["labels"].clone()
    labels[1] = -100
    return {**batch, "labels": labels}


def safe_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As ``mean_loss``, with a loss of 0 for a record without labels."""
    from opacus_ac.loss import per_record_causal_lm_loss

    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return per_record_causal_lm_loss(logits, batch["labels"]).mean()


BATCHES = {
    "padded": tiny_models.token_batch(4, 9),
    "whole": tiny_models.token_batch(3, 8, padded=False),
    "one record": tiny_models.token_batch(1, 6),
    "two tokens": tiny_models.token_batch(3, 2, padded=False),
    "one label masked record": all_masked(tiny_models.token_batch(3, 7)),
    "long": tiny_models.token_batch(2, 16),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    "name", ["qwen2-tied", "qwen2-untied", "bitnet-tied", "gpt2", "gemma3", "opt", "mamba", *EXPERTS]
)
def test_batches(name: str, batch: str) -> None:
    compare(tiny_models.build(name), BATCHES[batch], safe_loss, tolerance=2e-6)


@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2"])
def test_one_token(name: str) -> None:
    """T = 1: nothing to predict, so the loss is one on the logits themselves."""
    batch = {"input_ids": torch.tensor([[5], [9], [5]]), "weight": torch.randn(3, 1, tiny_models.VOCAB).double()}
    compare(
        tiny_models.build(name),
        batch,
        lambda model, rows: (model(input_ids=rows["input_ids"]).logits * rows["weight"]).sum((1, 2)).mean(),
        tolerance=2e-6,
    )


@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-tied"])
def test_sum_of_losses(name: str) -> None:
    compare(tiny_models.build(name), tiny_models.token_batch(), tiny_models.mean_loss, tolerance=2e-6, reduction="sum")


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-rms-norm", "gpt2", "gemma3", "opt", "mamba", *EXPERTS])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = tiny_models.build(name)
    batch = tiny_models.token_batch()
    want = per_sample_gradients(model, batch, tiny_models.mean_loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    norms, sums = one_backward(model, batch, tiny_models.mean_loss)
    check_norms(norms, want, rtol=1e-7)
    assert worst_error(sums, {n: g.sum(0) for n, g in want.items()}, floor=1e-5)[0] <= 2e-6


def lora(name: str, targets: Any, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM", **options
    )
    model = peft.get_peft_model(tiny_models.build(name), config).double().to(DEVICE).train()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # zero at the start, which would hide lora_A's gradient
            parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], "all-linear"], ids=["some", "all"])
@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-tied", "llama", "qwen3", "gemma3", "gpt2", "opt"])
def test_lora(name: str, targets: Any) -> None:
    if name == "gpt2":
        targets = ["c_attn", "c_proj"] if targets != "all-linear" else targets
    elif name == "opt" and targets != "all-linear":
        targets = ["q_proj", "v_proj"]
    compare(lora(name, targets), tiny_models.token_batch(), tiny_models.mean_loss)


def test_lora_with_trained_biases_and_head() -> None:
    model = lora("qwen2-untied", ["q_proj", "v_proj"], bias="lora_only", modules_to_save=["lm_head"])
    compare(model, tiny_models.token_batch(), tiny_models.mean_loss, tolerance=2e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_with_checkpointing(reentrant: bool) -> None:
    model = lora("qwen2-tied", "all-linear")
    batch = tiny_models.token_batch()
    want = per_sample_gradients(model, batch, tiny_models.mean_loss)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check_norms(one_backward(model, batch, tiny_models.mean_loss)[0], want, rtol=1e-7)


@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-tied", "gpt2"])
@pytest.mark.parametrize("frozen", ["embed", "norm", "mlp", "all but norm"])
def test_frozen_parts(name: str, frozen: str) -> None:
    model = tiny_models.build(name)
    for parameter_name, parameter in model.named_parameters():
        norm = "norm" in parameter_name or "ln_" in parameter_name
        embed = "embed" in parameter_name or "wte" in parameter_name
        fixed = {"embed": embed, "norm": norm, "mlp": "mlp" in parameter_name, "all but norm": not norm}[frozen]
        parameter.requires_grad_(not fixed)
    compare(model, tiny_models.token_batch(), tiny_models.mean_loss, tolerance=2e-6)


# ---------------------------------------------------------------- what the parity is worth


def broken_parity(name: str, batch: dict[str, Tensor] | None = None) -> None:
    with pytest.raises(AssertionError, match="norm"):
        compare(tiny_models.build(name), batch or tiny_models.token_batch(), tiny_models.mean_loss, norm_tolerance=1e-4)


@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-tied", "gpt2", "gemma3"])
def test_without_the_tied_cross_term_parity_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "KEEP_FACTOR", 0.0)
    monkeypatch.setattr(
        parameter_book,
        "dense_lookup_cross",
        lambda dense, lookup: dense.left.new_zeros(dense.left.shape[0], dtype=torch.float64),
    )
    broken_parity(name)


@pytest.mark.parametrize("name", ["gemma3", "opt"])
def test_without_the_padding_mask_parity_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding id occurs as an ordinary, attended token; autograd gives its row no gradient."""
    batch = tiny_models.token_batch()
    batch["input_ids"][:, 0] = 0
    compare(tiny_models.build(name), batch, tiny_models.mean_loss, tolerance=2e-6)

    def forgetful(module: nn.Module, ids: Tensor, backprops: Tensor) -> Any:
        twin = copy.copy(module)
        twin.padding_idx = None
        return embedding.lookup_terms(twin, ids, backprops)

    monkeypatch.setattr(term_rules, "lookup_terms", forgetful)
    broken_parity(name, batch)


@pytest.mark.parametrize("kind", ["codes", "unquantised"])
def test_without_the_dequantisation_parity_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The codes without their scale, and ``nn.Linear``'s rule, which takes the input before quantisation."""

    def wrong(module: Any, x: Tensor, backprops: Tensor, shared: Any = None) -> Any:
        factors = bitlinear.auto_bitlinear_factors(module, x, backprops)
        scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        return bitlinear.Factors(factors.inputs * scale if kind == "codes" else x, factors.backprops)

    monkeypatch.setattr(term_rules, "auto_bitlinear_factors", wrong)
    broken_parity("bitnet-tied")


def test_without_the_output_scale_parity_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: Any, x: Tensor, backprops: Tensor, shared: Any = None) -> Any:
        return bitlinear.auto_bitlinear_factors(module, x, backprops)._replace(backprops=backprops)

    monkeypatch.setattr(term_rules, "auto_bitlinear_factors", wrong)
    broken_parity("bitnet-offline")


# ---------------------------------------------------------------- layers


class DetachBitLinear(nn.Linear):
    """A BitLinear as people write it, with a norm inside and an output scale."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, (self.in_features,))
        scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        quantised = x + ((x * scale).round() / scale - x).detach()
        mean = self.weight.abs().mean().clamp(min=1e-5)
        ternary = self.weight + ((self.weight / mean).round().clamp(-1, 1) * mean - self.weight).detach()
        return 0.5 * F.linear(quantised, ternary, self.bias)


class Normed(nn.Module):
    """The same norm at several places of one model, and a layer used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.loop, self.out = nn.RMSNorm(6), nn.Linear(6, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + torch.tanh(self.loop(self.norm(x)))
        return self.out(self.norm(x))


class InPlace(nn.Module):
    """Outputs that the next layer changes in place, with inputs that need no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU(inplace=True))
        self.positions = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        h = self.positions(torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1))
        h += y
        return h


class TwoPlaces(nn.Module):
    """One module object in two places, and one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second, self.third = self.first, nn.Linear(6, 6, bias=False)
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


class KeywordCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.dense = nn.Embedding(10, 6), nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dense(input=self.table(input=ids))


class Gain(nn.Module):
    """No rule: the fallback runs it again; with an optional argument that has the records first, and one that has not."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor, mask: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        y = torch.tanh(x * self.gain) + self.shift
        y = y if table is None else y * table
        return y if mask is None else y * mask.unsqueeze(-1)


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.out = Gain(), nn.Linear(6, 2)
        self.register_buffer("table", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gain(x, mask=(x[..., 0] > 0).to(x.dtype), table=self.table))


class ConvNet(nn.Module):
    """Layers that Opacus has samplers for and this package has no terms for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(6, 4, 2), nn.GroupNorm(2, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.conv(x.transpose(1, 2)))).mean(-1))


def conv1d(bias: bool = True) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(4, 6)
    layer.bias.requires_grad_(bias)
    return layer


def scaled_table() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    return Gemma3TextScaledWordEmbedding(10, 6, 0, embed_scale=2.5)


FLOATS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)
IDS = torch.tensor([[1, 2, 1, 0], [3, 0, 4, 9], [5, 5, 5, 5]], device=DEVICE)

#: Name -> (builder, batch). A new layer gets the whole battery by a row.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear 2-D": (lambda: nn.Linear(6, 4), FLOATS[:, 0]),
    "linear 3-D": (lambda: nn.Linear(6, 4), FLOATS),
    "linear 3-D without bias": (lambda: nn.Linear(6, 4, bias=False), FLOATS),
    "linear 4-D": (lambda: nn.Linear(6, 4), FLOATS.unsqueeze(1).repeat(1, 2, 1, 1) ** 2),
    "linear one position": (lambda: nn.Linear(6, 4), FLOATS[:, :1]),
    "conv1d": (conv1d, FLOATS),
    "conv1d 2-D": (conv1d, FLOATS[:, 0]),
    "conv1d frozen bias": (lambda: conv1d(bias=False), FLOATS),
    "embedding": (lambda: nn.Embedding(10, 6), IDS),
    "embedding with padding": (lambda: nn.Embedding(10, 6, padding_idx=0), IDS),
    "embedding, ids [B]": (lambda: nn.Embedding(10, 6), IDS[:, 0]),
    "embedding, ids 3-D": (lambda: nn.Embedding(10, 6), IDS.view(3, 2, 2)),
    "scaled embedding": (scaled_table, IDS),
    "layer norm": (lambda: nn.LayerNorm(6), FLOATS),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), FLOATS),
    "layer norm over two": (lambda: nn.LayerNorm((5, 6)), FLOATS),
    "rms norm": (lambda: nn.RMSNorm(6), FLOATS),
    "rms norm 4-D": (lambda: nn.RMSNorm(6), FLOATS.view(3, 5, 1, 6)),
    "own bitlinear": (lambda: DetachBitLinear(6, 4), FLOATS),
    "own bitlinear 2-D": (lambda: DetachBitLinear(6, 4), FLOATS[:, 0]),
    "several uses": (Normed, FLOATS),
    "in place": (InPlace, FLOATS),
    "two places": (TwoPlaces, FLOATS),
    "keyword calls": (KeywordCalls, IDS),
    "fallback": (Gained, FLOATS),
    "convolution": (ConvNet, FLOATS),
}


def quadratic(model: nn.Module, batch: Tensor) -> Tensor:
    output = model(batch)
    target = torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype, device=output.device).view(output.shape[1:])
    return (output - target).square().flatten(1).sum(1).mean()


@pytest.mark.parametrize("factor", [0.0, 2.0, 1e9], ids=["gram", "measured", "kept"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms, "KEEP_FACTOR", factor)
    register_ste_linear(DetachBitLinear)
    torch.manual_seed(0)
    build, batch = LAYERS[name]
    compare(nn.Sequential(build()).double().train(), batch, quadratic, norm_tolerance=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_float32(name: str, library: str) -> None:
    register_ste_linear(DetachBitLinear)
    torch.manual_seed(0)
    build, batch = LAYERS[name]
    batch = batch.float() if batch.is_floating_point() else batch
    compare(nn.Sequential(build()).train(), batch, quadratic, norm_tolerance=2e-5, tolerance=2e-5)


def test_what_others_do_to_a_layers_output_is_seen() -> None:
    """Hooks of the user: they change the input before the layer, and the output after it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double().train()
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    compare(model, FLOATS, quadratic, norm_tolerance=1e-10)


class Recurrent(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        import opacus.layers

        self.cells = getattr(opacus.layers, name)(6, 5, batch_first=True, num_layers=2)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.cells(x)[0])


@pytest.mark.parametrize("name", ["DPRNN", "DPGRU", "DPLSTM"])
def test_recurrent_layers_of_opacus(name: str) -> None:
    torch.manual_seed(0)
    compare(Recurrent(name).double().train(), FLOATS, quadratic, norm_tolerance=1e-10)


class Sliced(nn.Linear):
    """Returns a part of what it computed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :3]


def test_a_view_changed_in_place_is_refused_where_its_gradient_could_be_missed() -> None:
    from opacus_ac.grad_sample import register_rule

    def rule(module: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        padded = F.pad(backprops, (0, 1))
        rows = {module.weight: torch.einsum("n...i,n...j->nij", padded, activations[0])}
        return rows | {module.bias: padded.flatten(1, -2).sum(1)}  # type: ignore[return-value]

    register_rule(Sliced, rule)
    torch.manual_seed(0)
    compare(nn.Sequential(nn.Linear(6, 6), Sliced(6, 4)).double().train(), FLOATS, quadratic, norm_tolerance=1e-10)
    model = nn.Sequential(nn.Linear(6, 6), Sliced(6, 4), nn.ReLU(inplace=True)).double().to(DEVICE).train()
    with pytest.raises(RuntimeError, match="modified inplace"):
        one_backward(model, FLOATS, quadratic)


class Dropped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(6)), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


class MixesRecords(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize("inner", [nn.Dropout(0.5), MixesRecords()])
def test_a_fallback_that_does_not_repeat_itself_is_refused(inner: nn.Module) -> None:
    from opacus_ac.grad_sample.one_backward.source import BookKeepingSource

    model = nn.Sequential(nn.Linear(6, 6), Dropped(inner)).double().to(DEVICE).train()
    named = dict(model.named_parameters())
    source = BookKeepingSource(model, list(named.values()), list(named))
    detach = source.attach()
    quadratic(model, FLOATS).backward()
    with pytest.raises(ValueError, match=r"1 \(Dropped\).*single records"):
        source.finish_batch()
    with pytest.raises(ValueError, match="failed half-way"):  # what was found once is not forgotten
        source.finish_batch()
    source.clear(sums=True)
    model[1].inner = nn.Identity()
    quadratic(model, FLOATS).backward()
    assert bool(source.finish_batch().isfinite().all())
    detach()


class Processed(nn.Embedding):
    """Not a lookup only."""

    def forward(self, mask: Tensor) -> Tensor:
        return super().forward(mask.cumsum(-1)) @ self.weight.T


def test_an_embedding_that_also_multiplies_with_its_table_is_refused_before_anything_is_released() -> None:
    register_rules()
    model = nn.Sequential(Processed(10, 6)).double().to(DEVICE).train()
    check_model(model, mode="bk")
    with pytest.raises(
        ValueError, match=r"0 \(Processed\).*otherwise than by lookups.*register_rule\(Processed, rule\)"
    ):
        one_backward(model, (IDS > 0).long(), quadratic)


# ---------------------------------------------------------------- RMSNorm in three passes


class Mislabelled(nn.RMSNorm):
    """Names an epsilon and computes with another."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, 100 * self.eps)


def norms_of_transformers() -> list[nn.Module]:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    return [Qwen2RMSNorm(6, eps=1e-2), Gemma3RMSNorm(6, eps=1e-6), nn.RMSNorm(6, eps=1e-5)]


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_the_short_rule_for_rms_norms_is_the_rule(index: int, size: float) -> None:
    module, x = norms_of_transformers()[index], size * FLOATS.float().cpu()
    module.weight.data.uniform_(-1, 1)
    backprops = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    want = normalization.rms_norm(module, [x], backprops)[module.weight]
    if index == 1:
        want = normalization.offset_rms_norm(module, [x], backprops)[module.weight]
    got = normalization.rms_norm_rows(module, x, backprops)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_a_norm_that_computes_with_another_epsilon_than_it_names_keeps_the_long_rule() -> None:
    x = FLOATS.float().cpu()
    assert normalization.rms_norm_rows(Mislabelled(6, eps=1e-3), x, x) is None
    assert normalization.rms_norm_rows(nn.RMSNorm(6), x, x) is None  # its epsilon depends on the type
    module = nn.RMSNorm(6, eps=1e-3)
    assert normalization.rms_norm_rows(module, x.double(), x.double()) is None
    before = normalization.rms_norm_rows(module, x, x)
    module.eps = 1.0  # asked again at every use
    torch.testing.assert_close(
        normalization.rms_norm_rows(module, x, x), normalization.rms_norm(module, [x], x)[module.weight]
    )
    assert not torch.allclose(before, normalization.rms_norm_rows(module, x, x))
    compare(nn.Sequential(Mislabelled(6, eps=1e-3)).train(), x, quadratic, norm_tolerance=2e-5, tolerance=2e-5)


# ---------------------------------------------------------------- explain


@pytest.mark.parametrize("length", [3, 16])
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "bitnet-rms-norm", "gpt2", "opt", "roberta", "mamba"])
def test_explain_says_what_happens(name: str, length: int) -> None:
    """Routes and bytes of one record against what the books hold after a backward pass."""
    from opacus_ac.grad_sample.one_backward.source import BookKeepingSource

    model = tiny_models.build(name, dtype=torch.float32)
    register_rules(model)
    rows = {row.parameter: row for row in explain(model, length=length)}
    named = dict(model.named_parameters())
    source = BookKeepingSource(model, list(named.values()), list(named))
    with expand_broadcast_embeddings(model):
        detach = source.attach()
        tiny_models.mean_loss(model, tiny_models.token_batch(1, length, padded=False)).backward()
    books = source._chunks[0].books
    for index, parameter in enumerate(named):
        book, row = books[index], rows[parameter]
        tensors = [book.rows] if book.rows is not None else [t for d in book.dense for t in (d.left, d.right)]
        tensors += [entry.right for entry in book.lookups]
        assert row.memory == sum(4 * t.numel() for t in tensors), parameter
        expected = {"kept": {"kept", "rows", "replay"}}.get(book.routes, {book.routes})
        assert row.route in expected, parameter
    detach()


def test_explain_names_what_is_refused() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return x * gate * self.scale

    model = nn.Sequential(nn.Linear(4, 4), TwoInputs()).train()
    rows = {row.parameter: row for row in explain(model, mode="hooks")}
    assert rows["0.weight"].route == "rows"
    assert rows["1.scale"].route == "refused"
    assert "register_rule" in rows["1.scale"].note
    assert "refused" in str(explain(model, mode="hooks"))
    assert {row.parameter: row.route for row in explain(model)}["1.scale"] == "replay"
    assert {row.route for row in explain(nn.Sequential(nn.Linear(4, 4)), mode="hooks")} == {"rows"}
