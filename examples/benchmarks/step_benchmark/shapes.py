"""The models and batches that are measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from opacus_ac.grad_sample.one_backward.outer_products import keeps

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A model and a batch.

    ``batch`` records reach the model at once, and ``parts`` such batches are one step. ``at_once`` variants live beside
    ``plain`` at the same time (0: all of them). ``base`` is the type of frozen weights beside adapters. With ``image`` the
    model is a vision transformer for images of so many pixels a side, and ``vocab`` the number of classes.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    batch: int
    length: int
    tied: bool = True
    family: str = "Qwen2"
    lora_rank: int = 0
    experts: int = 0
    at_once: int = 0
    parts: int = 1
    base: str = "float32"
    image: int = 0

    @property
    def records(self) -> int:
        """Records of a step."""
        return self.batch * self.parts

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        lora = f", LoRA r{self.lora_rank} on q and v" if self.lora_rank else ""
        lora += f" of a {self.base} base" if self.base != "float32" else ""
        batch = f"{self.parts} x {self.batch}" if self.parts > 1 else f"{self.batch}"
        if self.image:
            size = f"hidden {self.hidden}, {self.layers} layers, {self.vocab} classes"
            return f"{self.family}, {size}{lora}; {batch} images of {self.image} x {self.image}"
        size = f"hidden {self.hidden}, {self.layers} layers, vocabulary {self.vocab}"
        experts = f", two of {self.experts} experts for a token" if self.experts else ""
        return f"{self.family}, {size}{experts}, {tied}{lora}; {batch} records of {self.length} tokens"


SHAPES = {
    "a-untied": Shape(384, 6, 6, 3, 1056, 8192, 8, 128, tied=False),
    "a-tied": Shape(384, 6, 6, 3, 1056, 8192, 8, 128),
    "b": Shape(512, 4, 8, 4, 1408, 49152, 8, 64),
    "c": Shape(896, 24, 14, 2, 4864, 151936, 2, 64, at_once=1),
    "bitnet": Shape(384, 6, 6, 3, 1056, 8192, 8, 128, family="BitNet"),
    "lora": Shape(512, 4, 8, 4, 1408, 49152, 8, 64, lora_rank=8),
    "mixtral": Shape(256, 4, 8, 4, 512, 8192, 8, 512, tied=False, family="Mixtral", experts=8),
    "qwen3-moe": Shape(256, 4, 8, 4, 512, 8192, 8, 512, tied=False, family="Qwen3Moe", experts=8),
    # With few tokens for its size: noise has a cost for each parameter.
    "qwen3-moe-short": Shape(256, 4, 8, 4, 512, 8192, 8, 128, tied=False, family="Qwen3Moe", experts=8),
    "gpu": Shape(576, 30, 9, 3, 1536, 49152, 16, 512),
    "t128": Shape(384, 6, 6, 3, 1056, 8192, 8, 128),
    "t512": Shape(384, 6, 6, 3, 1056, 8192, 4, 512),
    "t2048": Shape(384, 6, 6, 3, 1056, 8192, 2, 2048),
    "tiny": Shape(32, 1, 4, 2, 48, 64, 2, 8, tied=False),
}


def new_model(shape: Shape, device: str = "cpu") -> nn.Module:
    """Return the untrained model, the same at every call; a large one is made where it is used."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, shape.base))
    try:
        with torch.device(device):
            model = _untrained(shape)
    finally:
        torch.set_default_dtype(before)
    if shape.lora_rank:
        from peft import LoraConfig, get_peft_model

        targets = ["query", "value"] if shape.family == "ViT" else ["q_proj", "v_proj"]
        task = None if shape.image else "CAUSAL_LM"
        model = get_peft_model(model, LoraConfig(r=shape.lora_rank, target_modules=targets, task_type=task))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model.train()


def _untrained(shape: Shape) -> nn.Module:
    if shape.image:
        return transformers.ViTForImageClassification(transformers.ViTConfig(**_sizes_of_images(shape)))
    config = _sizes_of_texts(shape)
    if shape.family == "BitNet":
        return _with_bit_linears(transformers.BitNetForCausalLM(transformers.BitNetConfig(**config)))
    kind = getattr(transformers, f"{shape.family}Config")
    model: nn.Module = getattr(transformers, f"{shape.family}ForCausalLM")(kind(**config))
    return model


def _sizes_of_texts(shape: Shape) -> dict[str, Any]:
    """Return the arguments of the configuration of a language model."""
    config: dict[str, Any] = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": max(shape.length, 512),
        "tie_word_embeddings": shape.tied,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape.family == "OPT":
        still = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "pad_token_id": 1}
        return config | still | {"ffn_dim": shape.intermediate, "word_embed_proj_dim": shape.hidden}
    config |= {"num_key_value_heads": shape.kv_heads, "intermediate_size": shape.intermediate, "pad_token_id": None}
    if shape.experts:
        names = ("num_local_experts",) if shape.family == "Mixtral" else ("num_experts",)
        config |= dict.fromkeys(names, shape.experts) | {"num_experts_per_tok": 2}
        config |= {} if shape.family == "Mixtral" else {"moe_intermediate_size": shape.intermediate, "head_dim": 32}
    return config


def _sizes_of_images(shape: Shape) -> dict[str, Any]:
    """Return the arguments of the configuration of a vision transformer, with patches of 16 pixels or a quarter."""
    return {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "image_size": shape.image,
        "patch_size": min(16, shape.image // 4),
        "num_labels": shape.vocab,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def products_of_norms(shape: Shape) -> float:
    """Return the multiplications of the Gram matrices, beside those of the layers of an ordinary step.

    It is one product ``[T, d] [d, T]`` for every side and record. A layer whose gradients are written down has none,
    because their product stands for that of the weight gradient.
    """
    weights = [m.weight.shape for m in new_model(shape).modules() if isinstance(m, nn.Linear)]
    ordinary = sum(3 * rows * columns for rows, columns in weights)
    grams = [shape.length * (i + j) for i, j in weights if not keeps(shape.length, i, j)]
    return sum(grams) / ordinary


def _with_bit_linears(model: nn.Module) -> nn.Module:
    """Replace the linear layers by AutoBitLinear in its training form, with the same weights."""
    from transformers.integrations.bitnet import AutoBitLinear, replace_with_bitnet_linear

    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantisation = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    replace_with_bitnet_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantisation)
    for name, module in model.named_modules():
        if isinstance(module, AutoBitLinear):
            module.weight.data.copy_(weights[name])
            module.requires_grad_(True)
    return model


def new_batch(shape: Shape, device: str, seed: int = 0) -> Batch:
    """Return a fixed batch of random tokens, every one of them labelled, or of random images."""
    generator = torch.Generator().manual_seed(seed)
    if shape.image:
        pixels = torch.randn(shape.batch, 3, shape.image, shape.image, generator=generator)
        labels = torch.randint(shape.vocab, (shape.batch,), generator=generator)
        return {"pixel_values": pixels.to(device), "labels": labels.to(device)}
    ids = torch.randint(shape.vocab, (shape.batch, shape.length), generator=generator)
    return {"input_ids": ids.to(device), "labels": ids.to(device)}
