"""PEFT methods on a small Llama, or on what else a method needs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from opacus_ac.testing.coverage.case import Case
from opacus_ac.testing.coverage.tiny import built, config_class, prepared, text_rows, tiny_config

_ATTENTION = ["q_proj", "v_proj"]
_LORA = {"r": 4, "lora_alpha": 8, "target_modules": _ATTENTION}
#: Name -> the class of PEFT's configs, its arguments, and the type of the model underneath.
METHODS: dict[str, tuple[str, dict[str, Any], str]] = {
    "LoRA": ("LoraConfig", _LORA, "llama"),
    "LoRA on GPT-2": ("LoraConfig", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2"),
    "LoRA on all linear layers": ("LoraConfig", {**_LORA, "target_modules": "all-linear"}, "llama"),
    "LoRA with biases": ("LoraConfig", {**_LORA, "bias": "lora_only", "lora_bias": True}, "llama"),
    "LoRA on embeddings": ("LoraConfig", {**_LORA, "target_modules": ["embed_tokens", "q_proj"]}, "llama"),
    "LoRA with modules_to_save": ("LoraConfig", {**_LORA, "modules_to_save": ["lm_head"]}, "llama"),
    "LoRA on Mixtral": ("LoraConfig", _LORA, "mixtral"),
    "rsLoRA": ("LoraConfig", {**_LORA, "use_rslora": True}, "llama"),
    "PiSSA": ("LoraConfig", {**_LORA, "init_lora_weights": "pissa"}, "llama"),
    "DoRA": ("LoraConfig", {**_LORA, "use_dora": True}, "llama"),
    "AdaLoRA": ("AdaLoraConfig", {"target_modules": _ATTENTION, "init_r": 4, "target_r": 2, "total_step": 9}, "llama"),
    "IA3": ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, "llama"),
    "VeRA": ("VeraConfig", {"r": 4, "target_modules": _ATTENTION}, "llama"),
    "LoHa": ("LoHaConfig", {"r": 4, "target_modules": _ATTENTION}, "llama"),
    "LoKr": ("LoKrConfig", {"r": 4, "target_modules": _ATTENTION}, "llama"),
    "OFT": ("OFTConfig", {"r": 0, "oft_block_size": 8, "target_modules": _ATTENTION}, "llama"),
    "BOFT": ("BOFTConfig", {"boft_block_size": 8, "target_modules": _ATTENTION}, "llama"),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 16, "target_modules": _ATTENTION}, "llama"),
    "LN tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm", "norm"]}, "llama"),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}, "llama"),
    "P-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 16}, "llama"),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 3}, "llama"),
}


def _model(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    import peft
    from transformers import AutoModelForCausalLM

    config, arguments, model_type = METHODS[name]
    changes = {"use_cache": True} if name == "prefix tuning" else {}
    base = built(AutoModelForCausalLM, tiny_config(config_class(model_type), **changes)).float()  # PiSSA asks for it
    adapted = peft.get_peft_model(base, getattr(peft, config)(task_type="CAUSAL_LM", **arguments))
    return prepared(adapted), text_rows()


def cases() -> Iterator[Case]:
    """Yield a case per method."""
    for name in METHODS:
        yield Case(name, partial(_model, name))
