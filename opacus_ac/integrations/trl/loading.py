"""Model, tokenizer and adapters from the arguments of a trainer of TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from opacus_ac.integrations.trl.library import get_training_chat_template


def model_name(model: Any) -> str:
    """Return the last part of the name of a model, for the default output folder."""
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    return Path(name).name or type(model).__name__


def load_model(model: Any, args: Any, peft_config: Any, quantization_config: Any = None) -> Any:
    """Return the model to train, with new adapters if there is a ``peft_config``.

    Args:
        model: a model, or its name or folder. One that is loaded here is in float32 unless ``model_init_kwargs`` has a
            ``dtype``.
        args: ``SFTConfig`` or ``DPOConfig``.
        peft_config: configuration of the adapters, or None.
        quantization_config: how to quantise a base model that is loaded here, or None.
    """
    set_seed(args.seed)  # for new adapters; neither noise nor batches follow from it
    if isinstance(model, str):
        options = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        model = AutoModelForCausalLM.from_pretrained(model, **options)
    if peft_config is None:
        return model
    from peft import get_peft_model

    return get_peft_model(model, peft_config)


def load_tokenizer(model: Any, args: Any, tokenizer: Any) -> Any:
    """Return the tokenizer, with the tokens and the chat template that the arguments name.

    Args:
        model: the model, whose folder has the tokenizer if none is given. Its settings get the special tokens.
        args: ``SFTConfig`` or ``DPOConfig``.
        tokenizer: the tokenizer, or None.

    Raises:
        ValueError: If a special token is not in the vocabulary.
    """
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(
            model.config._name_or_path, trust_remote_code=getattr(args, "trust_remote_code", False)
        )
    end = getattr(args, "eos_token", None)
    if end is not None:
        tokenizer.eos_token = _known(end, "eos_token", tokenizer)
        _tell(model, "eos_token_id", tokenizer.eos_token_id)
    padding = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    tokenizer.pad_token = _known(padding, "pad_token", tokenizer)
    _tell(model, "pad_token_id", tokenizer.pad_token_id)
    template = getattr(args, "chat_template_path", None)
    if template is not None:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    return tokenizer


def _known(token: Any, name: str, tokenizer: Any) -> str:
    if token is None or token not in tokenizer.get_vocab():
        raise ValueError(f"{name}={token!r} is not in the vocabulary of the tokenizer: set a {name} that is")
    return str(token)


def _tell(model: Any, name: str, value: int) -> None:
    setattr(model.config.get_text_config(), name, value)
    generation = getattr(model, "generation_config", None)
    if generation is not None and name == "pad_token_id":
        generation.pad_token_id = value
    elif generation is not None:
        known = getattr(generation, name)
        others = [known] if isinstance(known, int) else list(known or [])
        if value not in others:
            generation.eos_token_id = [value, *others]


def training_template(tokenizer: Any, assistant_only: bool) -> str | None:
    """Return the chat template that marks replies, where labels are on replies only; None for the tokenizer's own.

    Raises:
        ValueError: If the tokenizer's template has no marks, and TRL has none of the kind that does.
    """
    return get_training_chat_template(tokenizer) if assistant_only else None


def without_dropout(model: nn.Module) -> None:
    """Switch off the dropout layers of a model for good."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
