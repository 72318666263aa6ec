"""Parameter-efficient fine-tuning with peft: what is exact under per-record clipping, and what is refused by name.

Exact in mode "bk", because every trained tensor is the weight of a module that is called: LoRA (rank-stabilised, with
biases, with ``modules_to_save``), prefix tuning without a reparametrisation by several layers, LN tuning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_NEVER_CALLED = (
    "keeps its parameters in a container and computes with them directly, so no hook sees what each record adds to them"
)
_REPEATED = "repeats one prompt over the batch, so no layer shows what each record adds to it"
_REFUSED = {
    "ADALORA": (
        "chooses its ranks by products of weights and raw gradients (update_and_allocate), a release without noise"
    ),
    "OFT": "rotates the weight in a layer with buffers, which no rule covers",
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT"), _REPEATED),
    **dict.fromkeys(
        (
            "BOFT", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HRA", "IA3", "LOHA", "LOKR", "MISS", "OSF",
            "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
        ),
        _NEVER_CALLED,
    ),
}  # fmt: skip
_LORA_OPTIONS = {
    "use_dora": "takes a norm over the factors in a module with several inputs, which no rule covers",
    "target_parameters": "multiplies its factors into a weight instead of calling them",
    "trainable_token_indices": _NEVER_CALLED,
}
_WRITERS = ("v_proj", "o_proj", "down_proj")
_DATA_STARTS = ("eva", "corda", "lora_ga")
_REMEDY = "Use LoRA (opacus_ac.models.peft.freeze_a trains its second factor only), prefix tuning or LN tuning"


def freeze_a(model: nn.Module) -> list[str]:
    """Freeze the first factor A of every LoRA adapter, so that only B is trained (FFA-LoRA); return what was frozen.

    The update ``B A`` is then linear in what is trained: there is no product of the noise in both factors, half of the
    noisy coordinates are gone, and the gradient at ``B = 0`` is that of any later step.

    Args:
        model: a model with LoRA adapters of peft.

    Raises:
        ValueError: If it has none, or none whose second factor is trained; nothing was changed.

    References:
        Sun et al., arXiv 2403.12313 (FFA-LoRA).
    """
    named = dict(model.named_parameters())
    found = [name for name in named if "lora_A" in name.split(".") or "lora_embedding_A" in name.split(".")]
    trained = [
        name for name, p in named.items() if p.requires_grad and {"lora_B", "lora_embedding_B"} & {*name.split(".")}
    ]
    if not found or not trained:
        raise ValueError(
            f"freeze_a found {len(found)} first and {len(trained)} trainable second factors of LoRA: add adapters with "
            "peft.get_peft_model(model, LoraConfig(...)) first"
        )
    for name in found:
        named[name].requires_grad_(False)
    return found


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
    freeze_a(model)
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
        ModelUnavailableError: If the model cannot be loaded.
    """
    import torch

    from opacus_ac.models.default_model import load_model

    narrow = not full and (torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported())
    model, tokenizer = load_model(name_or_dir, dtype=torch.bfloat16 if narrow else torch.float32)
    if not full:
        model = add_lora(model, rank, layers)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train(), tokenizer


def check_peft(model: nn.Module) -> None:
    """Raise ``ValueError`` for a trained adapter of peft that cannot be clipped per record, naming method and reason.

    Other methods are not judged by name: ``check_model`` looks at their layers.
    """
    parts = [set(name.split(".")) for name, p in model.named_parameters() if p.requires_grad]
    for adapter, config in _adapters(model):
        method = getattr(config.peft_type, "value", str(config.peft_type))
        if not any(adapter in names for names in parts):
            continue
        problem = _REFUSED.get(method) or _lora_problem(config, method)
        if problem is not None:
            raise ValueError(f"the peft adapter {adapter!r} ({method}) {problem}. {_REMEDY}")


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for adapter, config in configs.items() if isinstance(configs, dict) else ():
            if id(config) not in seen and hasattr(config, "peft_type"):
                seen.add(id(config))
                yield adapter, config


def _lora_problem(config: Any, method: str) -> str | None:
    if method != "LORA":
        return None
    for option, why in _LORA_OPTIONS.items():
        if getattr(config, option, None):
            return f"with {option} {why}"
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower() in _DATA_STARTS:
        return (
            f"was started by init_lora_weights={start!r}: directions computed from data are a release without noise. "
            "If the data were public, say so by config.init_lora_weights = True after the start"
        )
    return None


__all__ = ["add_lora", "check_peft", "freeze_a", "load_trainable"]
