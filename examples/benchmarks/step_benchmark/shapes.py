"""The models and batches that are measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A model and a batch; ``at_once`` variants live beside ``plain`` at the same time (0: all of them)."""

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

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        lora = f", LoRA r{self.lora_rank} on q and v" if self.lora_rank else ""
        size = f"hidden {self.hidden}, {self.layers} layers, vocabulary {self.vocab}"
        experts = f", two of {self.experts} experts for a token" if self.experts else ""
        return f"{self.family}, {size}{experts}, {tied}{lora}; {self.batch} records of {self.length} tokens"


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
    "tiny": Shape(32, 1, 4, 2, 48, 64, 2, 8, tied=False),
}


def new_model(shape: Shape) -> nn.Module:
    """Return the untrained model, the same at every call."""
    torch.manual_seed(0)
    config = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": max(shape.length, 512),
        "tie_word_embeddings": shape.tied,
        "use_cache": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape.family == "BitNet":
        return _with_bit_linears(transformers.BitNetForCausalLM(transformers.BitNetConfig(**config))).train()
    if shape.experts:
        names = ("num_local_experts",) if shape.family == "Mixtral" else ("num_experts",)
        config |= dict.fromkeys(names, shape.experts) | {"num_experts_per_tok": 2}
        config |= {} if shape.family == "Mixtral" else {"moe_intermediate_size": shape.intermediate, "head_dim": 32}
    kind = getattr(transformers, f"{shape.family}Config")
    model = getattr(transformers, f"{shape.family}ForCausalLM")(kind(**config))
    if shape.lora_rank:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=shape.lora_rank, target_modules=targets, task_type="CAUSAL_LM"))
    return model.train()


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


def new_batch(shape: Shape, device: str) -> Batch:
    """Return the fixed batch of random tokens, every one of them labelled."""
    ids = torch.randint(shape.vocab, (shape.batch, shape.length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device), "labels": ids.to(device)}
