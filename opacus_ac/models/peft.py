"""Parameter-efficient fine-tuning with peft: what is exact under per-record clipping, and what is refused by name.

Mode "bk" runs a layer of peft again on single records, unless all that is trained in it are layers with a rule. So a
method is exact there, if what it does to a record depends on no other record and on nothing random, and if it trains by
gradients alone. Methods that do more are refused here. Opacus's modes take LoRA, prefix tuning and LN tuning only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from opacus_ac.grad_sample.one_backward.layer_terms import computes_with_parts

_REPEATED = (
    "repeats one prompt over the batch, so no layer shows hooks what each record adds to it. Use "
    'grad_sample_mode="bk", or prefix tuning'
)
_RANDOM = "draws random numbers in its layers, which a second run on single records cannot repeat"
_REFUSED = {
    "ADALORA": (
        "chooses its ranks by products of weights and raw gradients (update_and_allocate), a release without noise"
    ),
    "LILY": "averages the choices of its router over all records of a batch",
    "OSF": "changes gradients in hooks on its parameters, through which no clipped gradient goes",
    "PVERA": _RANDOM,
    "CPT": "moves its weights in the forward pass",
}
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING")
_OPTIONS = {
    "alora_invocation_tokens": "hands its layers a list of positions, which cannot be taken apart into records",
    "coft": "moves its weights in the forward pass",
    "monteclora_config": _RANDOM,
    "target_parameters": "writes frozen weights anew in every forward pass, by a parametrisation",
    "use_asa": "chooses what it trains by raw gradients, a release without noise",
    "velora_config": "compresses inputs by a projection that a batch sets",
}
"""Options of methods that are exact without them."""
_WRITERS = ("v_proj", "o_proj", "down_proj")
_DATA_STARTS = ("eva", "corda", "lora_ga")
_REMEDY = "Use LoRA (opacus_ac.models.peft.freeze_a trains its second factor only), prefix tuning or LN tuning"
_REMEDY_OF_MODE = (
    'Use grad_sample_mode="bk", which runs such a layer again on single records, or LoRA '
    "(opacus_ac.models.peft.freeze_a trains its second factor only)"
)


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
    from opacus_ac.models.default_model import load_model

    model, tokenizer = load_model(name_or_dir, dtype=torch.float32 if full else frozen_dtype())
    if not full:
        model = add_lora(model, rank, layers)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train(), tokenizer


def frozen_dtype() -> torch.dtype:
    """Return the type of frozen weights: bfloat16 where the processor multiplies in it, otherwise float32."""
    narrow = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if narrow else torch.float32


def check_peft(model: nn.Module, *, mode: str = "bk") -> None:
    """Raise ``ValueError`` for a trained adapter of peft that cannot be clipped per record, naming method and reason.

    What is not refused by name is judged by ``check_model``, which looks at the layers.

    Args:
        model: the model with its adapters, for which ``register_rules`` was called.
        mode: ``grad_sample_mode``.
    """
    parts = [set(name.split(".")) for name, p in model.named_parameters() if p.requires_grad]
    for adapter, config in _adapters(model):
        method = getattr(config.peft_type, "value", str(config.peft_type))
        if not any(adapter in names for names in parts):
            continue
        problem = _REFUSED.get(method) or _option_problem(config)
        if problem is not None:
            raise ValueError(f"the peft adapter {adapter!r} ({method}) {problem}. {_REMEDY}")
        if mode != "bk" and method in _PROMPTS:
            raise ValueError(f"the peft adapter {adapter!r} ({method}) {_REPEATED}")
        for layer in _computing_layers(model, adapter):
            problem = _layer_problem(config, layer, model.get_submodule(layer), mode)
            if problem is not None:
                raise ValueError(f"the peft adapter {adapter!r} ({method}) {problem}")


def _computing_layers(model: nn.Module, adapter: str) -> Iterator[str]:
    """Yield the layers that compute with the parameters of their parts, and in which the adapter is trained."""
    for path, module in model.named_modules():
        if computes_with_parts(module):
            trained = (name.split(".") for name, p in module.named_parameters() if p.requires_grad)
            if any(adapter in names for names in trained):
                yield path


def _adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for adapter, config in configs.items() if isinstance(configs, dict) else ():
            if id(config) not in seen and hasattr(config, "peft_type"):
                seen.add(id(config))
                yield adapter, config


def _layer_problem(config: Any, path: str, layer: nn.Module, mode: str) -> str | None:
    """Return why a layer that computes with the parameters of its parts cannot be run again on single records."""
    if mode != "bk":
        return (
            f"computes with the parameters of its parts in {path}, which no hook of mode {mode!r} sees. "
            f"{_REMEDY_OF_MODE}"
        )
    for option, value in vars(config).items():
        unused = option == "lora_dropout" and not any(isinstance(m, nn.Dropout) and m.p for m in layer.modules())
        if option.endswith("dropout") and value and not unused:
            return f"with {option}={value} {_RANDOM}, as {path} needs. Set {option}=0, or use LoRA without variants"
    if type(layer).__name__ == "MultiheadAttention":
        return (
            f"merges its factors into the weights of {path} in every forward pass. Leave nn.MultiheadAttention out of "
            "target_modules"
        )
    held = (type(p).__name__ for p in layer.parameters() if p.device.type == "cpu")
    if getattr(config, "use_dora", False) and {"Params4bit", "Int8Params"} & set(held):
        return f"with use_dora puts the weight of {path} anew on every forward pass on a CPU. Use LoRA without it"
    return None


def _option_problem(config: Any) -> str | None:
    for option, why in _OPTIONS.items():
        if getattr(config, option, None):
            return f"with {option} {why}"
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower() in _DATA_STARTS:
        return (
            f"was started by init_lora_weights={start!r}: directions computed from data are a release without noise. "
            "If the data were public, say so by config.init_lora_weights = True after the start"
        )
    return None


__all__ = ["add_lora", "check_peft", "freeze_a", "frozen_dtype", "load_trainable"]
