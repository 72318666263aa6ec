"""Single layers through Opacus's hooks against a loop of batch size one, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bit_layers import DetachBitLinear, int8, ternary
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from opacus.grad_sample.linear import compute_linear_grad_sample
from tiny_models import hooks_gradients, worst_error
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm, Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from opacus_ac.grad_sample import check_model, register_rules, register_ste_linear
from opacus_ac.grad_sample.rules.normalization import offset_rms_norm, rms_norm, rms_norm_offset
from opacus_ac.testing import per_sample_gradients

IN, OUT = 10, 6


def cubic(model: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradient at the output differs at every position and grows with the record."""
    return model(batch).pow(3).flatten(1).sum(1).mean()


def floats(*middle: int, width: int = IN) -> Tensor:
    x = torch.randn(3, *middle, width, dtype=torch.float64)
    x[..., 0] *= 20  # an outlier channel, so that int8 codes of the others are coarse
    return x * torch.tensor([1.0, 0.2, 4.0], dtype=torch.float64).view(3, *[1] * (x.dim() - 1))


def parity(layer: nn.Module, batch: Tensor, *, strict: bool = True) -> float:
    model = nn.Sequential(layer).double().train()
    want = per_sample_gradients(model, batch, cubic)
    assert all(g.abs().max() > 0 for g in want.values())
    return worst_error(hooks_gradients(model, batch, cubic, strict=strict), want)[0]


# ---- dense and ternary layers ------------------------------------------------------------------------------------


def bitlinear(**options: object) -> nn.Module:
    layer = AutoBitLinear(IN, OUT, **{"online_quant": True, **options})
    if not layer.online_quant:
        layer.weight_scale.fill_(0.37)
    if layer.rms_norm is not None:
        layer.rms_norm.weight.data.uniform_(0.5, 1.5)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "online": bitlinear,
    "online without bias": lambda: bitlinear(bias=False),
    "offline": lambda: bitlinear(online_quant=False),
    "offline without bias": lambda: bitlinear(online_quant=False, bias=False),
    "inner norm": lambda: bitlinear(use_rms_norm=True),
    "offline with inner norm": lambda: bitlinear(online_quant=False, use_rms_norm=True),
    "Conv1D": lambda: Conv1D(OUT, IN),
}


@pytest.mark.parametrize("middle", [(), (5,), (2, 5)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("name", LAYERS)
def test_dense_layers(name: str, middle: tuple[int, ...]) -> None:
    layer = LAYERS[name]()
    register_rules(layer)
    check_model(nn.Sequential(layer).train())
    assert parity(layer, floats(*middle), strict="offline" not in name) < 1e-10


def test_frozen_bias_and_frozen_weight() -> None:
    for frozen in ("weight", "bias"):
        layer = bitlinear()
        getattr(layer, frozen).requires_grad_(False)
        register_rules(layer)
        assert parity(layer, floats(5)) < 1e-10


def test_the_inner_norm_may_be_left_to_functorch() -> None:
    layer = bitlinear(use_rms_norm=True)
    register_rules()  # no model: the norm's type stays unknown
    assert LlamaRMSNorm not in GradSampleHooks.GRAD_SAMPLERS
    assert parity(layer, floats(5)) < 1e-10


def test_linear_rule_on_a_ternary_layer_would_be_silently_wrong() -> None:
    """The obvious registration: it runs, it looks right, and its gradients are off. ``check_model`` refuses it."""
    layer = bitlinear()
    register_grad_sampler(AutoBitLinear)(compute_linear_grad_sample)
    error = parity(layer, floats(5))
    assert 1e-3 < error < 1.0
    with pytest.raises(ValueError, match=r"0 \(AutoBitLinear\).*compute_linear_grad_sample.*register_rules"):
        check_model(nn.Sequential(layer).train())
    with pytest.warns(UserWarning, match="replaced"):
        register_rules(layer)
    check_model(nn.Sequential(layer).train())
    assert parity(layer, floats(5)) < 1e-10


# ---- hand-written straight-through layers --------------------------------------------------------------------------


class Rounding(torch.autograd.Function):
    """A straight-through estimator in the old style, which functorch cannot run."""

    @staticmethod
    def forward(ctx: object, value: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        return quantize(value)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class FunctionBitLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Rounding.apply(x, int8), Rounding.apply(self.weight, ternary), self.bias)


class ScaledBitLinear(FunctionBitLinear):
    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:])
        return 0.5 * F.linear(Rounding.apply(x, int8), Rounding.apply(self.weight, ternary), self.bias)


class NormedBitLinear(FunctionBitLinear):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.norm = nn.LayerNorm(IN)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


PURE = [DetachBitLinear, FunctionBitLinear, ScaledBitLinear, NormedBitLinear]


@pytest.mark.parametrize("middle", [(), (5,), (2, 5)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("cls", PURE)
def test_registered_straight_through_layers(cls: type[nn.Linear], middle: tuple[int, ...]) -> None:
    register_ste_linear(cls)
    layer = cls(IN, OUT)
    check_model(nn.Sequential(layer).train())
    assert parity(layer, floats(*middle)) < 1e-10


def test_unregistered_straight_through_layers() -> None:
    """Functorch is exact for the detach trick and cannot run an old-style Function: refused before any training."""
    detach = nn.Sequential(DetachBitLinear(IN, OUT)).train()
    check_model(detach)
    assert parity(detach[0], floats(5)) < 1e-10
    with pytest.raises(ValueError, match=r"0 \(FunctionBitLinear\).*setup_context.*register_ste_linear"):
        check_model(nn.Sequential(FunctionBitLinear(IN, OUT)).train())


class ClippedMask(FunctionBitLinear):
    """Hands no gradient to weights that were clipped."""

    def forward(self, x: Tensor) -> Tensor:
        inside = self.weight.clamp(-0.2, 0.2)
        return F.linear(x, inside + (ternary(inside) - inside).detach(), self.bias)


class ScaleInWeightPath(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        signs = self.weight + (self.weight.sign() - self.weight).detach()
        return F.linear(x, signs * self.weight.abs().mean(), self.bias)


class ScaleAtOutput(nn.Linear):
    """The product itself is a straight-through one, but the weight acts once more."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.linear(x, w + (ternary(w) - w).detach()) * w.abs().mean() + self.bias.detach()


class TwoProducts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(x.abs(), self.weight)


class NoProduct(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class BiasOutside(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x, self.weight) + self.bias


class LearnedScale(nn.Linear):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) * self.alpha


class BatchScale(nn.Linear):
    """One activation scale for the whole tensor: each record's codes depend on the largest record."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 127 / x.abs().max()
        return F.linear(x + ((x * scale).round() / scale - x).detach(), self.weight, self.bias)


IMPURE = {
    ClippedMask: "does not pass unchanged",
    ScaleInWeightPath: "does not pass unchanged",
    ScaleAtOutput: "by another way",
    TwoProducts: "2 times",
    NoProduct: "0 times",
    BiasOutside: "bias argument",
    LearnedScale: "alpha",
    BatchScale: "other records",
}


@pytest.mark.parametrize("cls", IMPURE)
def test_impure_layers_are_refused(cls: type[nn.Linear]) -> None:
    register_ste_linear(cls)
    layer = cls(IN, OUT)
    if cls is ScaleAtOutput:
        layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=rf"0 \({cls.__name__}\).*{IMPURE[cls]}"):
        check_model(nn.Sequential(layer).train())
    if cls is BatchScale:
        return  # only a comparison of batches can see it, a backward pass cannot
    with pytest.raises(ValueError, match=IMPURE[cls]):  # and without check_model, in the backward pass
        parity(layer, floats(5))


def test_a_clipping_mask_that_sets_in_later_is_caught_then() -> None:
    register_ste_linear(ClippedMask)
    layer = ClippedMask(IN, OUT)
    layer.weight.data.clamp_(-0.1, 0.1)
    check_model(nn.Sequential(layer).train())
    assert parity(layer, floats(5)) < 1e-10
    layer.weight.data[2, 3] = 0.7
    with pytest.raises(ValueError, match="does not pass unchanged"):
        parity(layer, floats(5))


def test_straight_through_layer_under_autocast() -> None:
    register_ste_linear(FunctionBitLinear)
    model = nn.Sequential(FunctionBitLinear(IN, OUT)).train()

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m(batch)
        return y.float().pow(2).flatten(1).sum(1).mean()

    batch = floats(5).float()
    want = per_sample_gradients(model, batch, loss)
    got = {n: g.float() for n, g in hooks_gradients(model, batch, loss).items()}
    assert worst_error(got, want)[0] < 2e-2  # bfloat16 has 8 bits


# ---- embeddings ----------------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 3, 0, 5, 1], [0, 0, 2, 6, 6], [1, 4, 1, 0, 3]])


def embedding_layer(**options: object) -> nn.Module:
    layer = nn.Embedding(7, 4, **options)
    nn.init.normal_(layer.weight)  # the padding row too: at zero, the cubic loss would hide it
    return layer


def scaled_embedding() -> nn.Module:
    layer = Gemma3TextScaledWordEmbedding(7, 4, padding_idx=0, embed_scale=2.5)
    nn.init.normal_(layer.weight)
    return layer


class TwiceEmbedding(nn.Embedding):
    """Not a lookup times a constant: left to functorch, which is exact."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.weight[0]


@pytest.mark.parametrize("ids", [IDS, IDS[:, 0], IDS.unsqueeze(1)], ids=["[B, T]", "[B]", "[B, 1, T]"])
@pytest.mark.parametrize(
    ("make", "strict"),
    [
        (embedding_layer, True),
        (lambda: embedding_layer(padding_idx=0), True),
        (lambda: embedding_layer(padding_idx=-7), True),
        (scaled_embedding, False),
        (TwiceEmbedding, True),
    ],
    ids=["plain", "padding", "negative padding", "scaled", "other"],
)
def test_embeddings(make: Callable[..., nn.Module], strict: bool, ids: Tensor) -> None:
    layer = make(7, 4) if make is TwiceEmbedding else make()
    register_rules(layer)
    check_model(nn.Sequential(layer).train())
    assert parity(layer, ids, strict=strict) < 1e-10


def test_opacus_ignores_padding_idx_and_is_refused() -> None:
    layer = embedding_layer(padding_idx=0)
    assert parity(layer, IDS) > 0.1
    with pytest.raises(ValueError, match=r"0 \(Embedding\).*register_rules"):
        check_model(nn.Sequential(layer).train())


def test_empty_batch_has_no_rows() -> None:
    register_rules()
    rule = GradSampleHooks.GRAD_SAMPLERS[nn.Embedding]
    layer = embedding_layer()
    assert rule(layer, [torch.zeros(0, 5, dtype=torch.long)], torch.zeros(0, 5, 4))[layer.weight].shape == (0, 7, 4)
    layer.requires_grad_(False)
    assert rule(layer, [IDS], torch.zeros(3, 5, 4)) == {}


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_embeddings_that_cannot_be_private(option: dict[str, object]) -> None:
    layer = embedding_layer(**option)
    for _ in range(2):
        with pytest.raises(ValueError, match=next(iter(option))):
            check_model(nn.Sequential(layer).train())
        register_rules(layer)
    with pytest.raises(ValueError, match=next(iter(option))):
        parity(layer, IDS)


# ---- norms ---------------------------------------------------------------------------------------------------------


class Float64GemmaNorm(Gemma3RMSNorm):
    """Gemma's norm without its casts to float32, so that 1e-10 can be asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x) * (1.0 + self.weight)


class RenamedNorm(nn.Module):
    """Behaves as an RMSNorm under other names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.tiny = 1e-5

    def forward(self, anything: Tensor) -> Tensor:
        return anything / (anything.pow(2).mean(-1, keepdim=True) + self.tiny).sqrt() * self.weight


class FakeRMSNorm(nn.Module):
    """Carries the name and the attributes but normalises by the largest entry."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.abs().amax(-1, keepdim=True) + self.variance_epsilon)


class BatchRMSNorm(RenamedNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean() + self.tiny).sqrt()


NORMS = {
    "Llama": (LlamaRMSNorm, rms_norm, 1e-10),
    "Qwen2": (Qwen2RMSNorm, rms_norm, 1e-10),
    "T5": (T5LayerNorm, rms_norm, 1e-10),
    "renamed": (RenamedNorm, rms_norm, 1e-10),
    "Gemma": (Gemma3RMSNorm, offset_rms_norm, 1e-5),  # multiplies the weight in float32 and sums there
    "Gemma in float64": (Float64GemmaNorm, offset_rms_norm, 1e-10),
    "fake": (FakeRMSNorm, None, 1e-10),
}


@pytest.mark.parametrize("middle", [(), (5,), (2, 5)], ids=["2-D", "3-D", "4-D"])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name: str, middle: tuple[int, ...]) -> None:
    cls, rule, tolerance = NORMS[name]
    layer = cls(IN)
    layer.weight.data += 0.3 * torch.randn(IN)
    register_rules(layer)
    assert GradSampleHooks.GRAD_SAMPLERS.get(cls) is rule
    check_model(nn.Sequential(layer).train())
    assert parity(layer, 0.01 * floats(*middle)) < tolerance


def test_a_norm_over_the_batch_is_no_rms_norm_and_is_refused() -> None:
    layer = BatchRMSNorm(IN)
    assert rms_norm_offset(layer) is None
    register_rules(layer)
    with pytest.raises(ValueError, match=r"BatchRMSNorm.*other records"):
        check_model(nn.Sequential(layer).train())


@pytest.mark.parametrize("shape", [(IN,), (5, IN)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.LayerNorm(shape, bias=bias)
    if not bias:
        with pytest.raises(ValueError, match="LayerNorm fails without a bias"):
            check_model(nn.Sequential(layer).train())
    register_rules(layer)
    check_model(nn.Sequential(layer).train())
    assert parity(layer, floats(5)) < 1e-10
