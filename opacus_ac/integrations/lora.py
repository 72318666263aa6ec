"""LoRA adapters for private training."""

from __future__ import annotations

from typing import Any

_WRITERS = ("v_proj", "o_proj", "down_proj")


def add_lora(model: Any, rank: int, layers: int) -> Any:
    """Add adapters where the last layers write into the residual stream; their first factor stays at its start.

    With the first factor frozen the update is linear in what is trained, and no noise goes into it.

    Args:
        model: a transformers causal language model.
        rank: rank of the adapters.
        layers: how many of the last layers get adapters. In models without the usual names all linear layers do.

    References:
        arXiv 2106.09685 (LoRA); arXiv 2403.12313 (the frozen first factor).
    """
    from peft import LoraConfig, get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    chosen: dict[str, Any] = {"target_modules": "all-linear"}
    if set(_WRITERS) <= names:
        depth = model.config.num_hidden_layers
        last = list(range(max(0, depth - layers), depth))
        chosen = {"target_modules": list(_WRITERS), "layers_to_transform": last}
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **chosen))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def load_trainable(name_or_dir: str | None, *, full: bool, rank: int, layers: int) -> tuple[Any, Any]:
    """Return (model, tokenizer) in training mode: all weights trainable, or LoRA adapters on a frozen base.

    What is trained is in float32; a frozen base is in bfloat16 where the processor multiplies in it.

    Args:
        name_or_dir: folder or hub name; None for the default model.
        full: train all weights.
        rank: rank of the adapters.
        layers: how many of the last layers get adapters.

    Raises:
        ModelUnavailableError: the model cannot be loaded.
    """
    import torch

    from opacus_ac.integrations.default_model import load_model

    narrow = not full and (torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported())
    model, tokenizer = load_model(name_or_dir, dtype=torch.bfloat16 if narrow else torch.float32)
    if not full:
        model = add_lora(model, rank, layers)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train(), tokenizer
