"""Adapters on frozen weights of 4 and 8 bits: a layer that stands in for them, and those of bitsandbytes where it is installed."""

import copy

import peft
import pytest
import torch
from helpers import Rows
from tiny_models import build, mean_loss, token_batch, worst_error
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine

pytestmark = pytest.mark.filterwarnings("ignore")
RATE = 1e3
"""Large, so that the difference of two weights in float32 shows the update."""
LAYERS = ["q_proj", "v_proj", "down_proj"]


class Product(torch.autograd.Function):
    """A product with a weight that is dequantised for it, as kernels are wrapped: ``torch.func`` cannot take it apart."""

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.weight = codes.to(x.dtype) * scale
        return x @ ctx.weight.t()

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.weight, None, None


class Frozen8Bit(nn.Linear):
    """Its weight is a frozen parameter of whole numbers with a scale per row."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
        self.scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x):
        product = Product.apply(x, self.weight, self.scale)
        return product if self.bias is None else product + self.bias


def four_bits(layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=torch.float32,
        quant_type="nf4",
    )
    made.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    made.bias = layer.bias
    return made.to("cpu")


def eight_bits(layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
    )
    made.weight = bitsandbytes.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = layer.bias
    return made.to("cpu")


BASES = {"stand-in": Frozen8Bit, "4 bits": four_bits, "8 bits": eight_bits}
METHODS = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=LAYERS, task_type="CAUSAL_LM"),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=LAYERS, task_type="CAUSAL_LM", use_dora=True),
    "IA3": lambda: peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "OFT": lambda: peft.OFTConfig(target_modules=LAYERS, oft_block_size=8, task_type="CAUSAL_LM"),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


def adapted(base, method, *, checkpointed=False):
    """A model with quantised linear layers and adapters, every trained weight moved off its start."""
    model = build("qwen2-untied", dtype=torch.float32)
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, BASES[base](module))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = base == "4 bits", base == "8 bits"
    model = peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=checkpointed, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(model, METHODS[method]())
    generator = torch.Generator().manual_seed(1)
    for parameter in trained_of(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def trained_of(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_alone(model, batch):
    """Gradients of each record alone, ``{name: [B, ...]}``. The model is run itself: its kernels may not be copied."""
    found = []
    for i in range(len(batch["labels"])):
        model.zero_grad()
        mean_loss(model, {k: v[i : i + 1] for k, v in batch.items()}).backward()
        found.append({name: p.grad.clone() for name, p in trained_of(model).items()})
    model.zero_grad()
    return {name: torch.stack([gradients[name] for gradients in found]) for name in found[0]}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("base", "method"), [(b, m) for b in BASES for m in METHODS if m != "DoRA" or b == "stand-in"])
def test_a_private_step_is_that_of_the_loop(base, method, checkpointed):
    model, batch = adapted(base, method, checkpointed=checkpointed), token_batch()
    frozen = {n: copy.deepcopy(p.detach()) for n, p in model.named_parameters() if not p.requires_grad}
    gradients, start = gradients_alone(model, batch), {n: p.detach().clone() for n, p in trained_of(model).items()}
    norms = torch.cat([g.flatten(1) for g in gradients.values()], 1).norm(dim=1)
    bound = 0.6 * float(norms.max())
    factors = (bound / norms).clamp(max=1) / len(norms)
    want = {name: torch.einsum("n,n...->...", factors, rows) for name, rows in gradients.items()}
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(trained_of(model).values(), lr=RATE), max_grad_norm=bound,
        data_loader=DataLoader(Rows([{k: v[i] for k, v in batch.items()} for i in range(len(norms))]), len(norms)),
        noise_multiplier=0.0, clipping="flat", ema_decay=None,
    )  # fmt: skip
    for drawn in loader:
        mean_loss(model, drawn).backward()
        optimizer.step()
    got = {name: (start[name] - p.detach()) / RATE for name, p in trained_of(model).items()}
    assert worst_error(got, want, floor=1e-3)[0] < 1e-3
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("base", ["4 bits", "8 bits"])
def test_dora_on_a_processor_is_refused(base):
    model = adapted(base, "DoRA")
    with pytest.raises(ValueError, match=r"use_dora puts the weight.*Use LoRA without it"):
        PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(trained_of(model).values(), lr=1.0), noise_multiplier=1.0,
            data_loader=DataLoader(Rows([1, 2, 3, 4]), 2),
        )  # fmt: skip
