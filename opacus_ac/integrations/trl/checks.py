"""Settings of TRL's trainers that cannot be made private, with the reason and the remedy for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin

PAIR_LOSSES = ("sigmoid", "hinge", "ipo")
"""Values of ``DPOConfig.loss_type`` that are available."""
_ONE_RECORD = "a record would no longer be alone in its row, so clipping would not bound what one of them does: use"

# Name of a field, test for a value that is refused, and the reason with the remedy.
Refusal = tuple[str, Callable[[Any], bool], str]


def _given(value: Any) -> bool:
    return value is not None


_BOTH: tuple[Refusal, ...] = (
    ("activation_offloading", bool, "its hooks on saved tensors are not known to keep records apart: use False"),
    ("router_aux_loss_coef", bool, "the router's loss is over the whole batch, which couples records: leave it out"),
    (
        "truncation_mode",
        lambda v: v not in ("keep_start", "keep_end"),
        "there is no such mode: use 'keep_start' or 'keep_end'",
    ),
)

_SFT: tuple[Refusal, ...] = (
    *_BOTH,
    ("eval_packing", bool, f"{_ONE_RECORD} False"),
    (
        "loss_type",
        lambda v: v != "nll",
        "its loss is not known as a mean over records of each record's mean: use 'nll'",
    ),
    (
        "chat_template_path",
        lambda v: v is not None and not (Path(v).is_file() and Path(v).suffix in (".jinja", ".j2")),
        "a template of another model may add tokens: name a .jinja file, or set the tokenizer's chat_template",
    ),
    (
        "dataset_kwargs",
        lambda v: bool((v or {}).get("skip_prepare_dataset")),
        "rows with input_ids need no preparation, and are truncated only: leave it out",
    ),
)

_DPO: tuple[Refusal, ...] = (
    *_BOTH,
    (
        "loss_type",
        lambda v: len(_listed(v)) != 1 or _listed(v)[0] not in PAIR_LOSSES,
        f"its loss is not known pair by pair here: use one of {', '.join(PAIR_LOSSES)}",
    ),
    ("label_smoothing", bool, "it belongs to losses that are not available: leave it out"),
    ("label_smoothing_factor", bool, "a pair has no labels to smooth: leave it out"),
    ("loss_weights", _given, "there is one loss: scale learning_rate instead, and leave it out"),
    ("ld_alpha", _given, "it is not available: leave it out"),
    ("f_divergence_type", lambda v: getattr(v, "value", v) != "reverse_kl", "it is not available: use 'reverse_kl'"),
    ("use_weighting", bool, "it is not available: use False"),
    ("sync_ref_model", bool, "a reference that follows the private weights is not available: use False"),
)


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def refused_sft(args: Any, parts: Mapping[str, Any]) -> list[str]:
    """Return the reasons against a fine-tuning on texts and dialogues, each with its remedy.

    Args:
        args: ``SFTConfig``.
        parts: the other arguments of the trainer, by name.
    """
    found = _by_name(args, _SFT) + _about_parts(parts)
    sample = _sample(parts.get("train_dataset"))
    if args.completion_only_loss and parts.get("formatting_func") is not None:
        found.append("completion_only_loss with formatting_func: a formatted text has no prompt: leave one of them out")
    dialogues = isinstance(_first_of(sample, ("messages", "conversations", "prompt")), list)
    if args.assistant_only_loss and sample and "input_ids" not in sample and not dialogues:
        found.append("assistant_only_loss: the rows of train_dataset are no dialogues: use False")
    return found


def refused_dpo(args: Any, parts: Mapping[str, Any]) -> list[str]:
    """Return the reasons against a fine-tuning on pairs of replies, each with its remedy.

    Args:
        args: ``DPOConfig``.
        parts: the other arguments of the trainer, by name.
    """
    found = _by_name(args, _DPO) + _about_parts(parts)
    model, peft_config = parts.get("model"), parts.get("peft_config")
    if parts.get("ref_model") is not None:
        found.append(
            "ref_model: a second model in memory is not available: the reference is the model before training, by "
            "peft_config=LoraConfig(...) or precompute_ref_log_probs=True in the DPOConfig"
        )
    if peft_config is None and not args.precompute_ref_log_probs:
        kind = "an adapter that is there already" if hasattr(model, "peft_config") else "all weights"
        found.append(
            f"no reference: {kind} would be trained, and the model before training would be lost. Pass "
            "peft_config=LoraConfig(...), which can be switched off, or set precompute_ref_log_probs=True"
        )
    if getattr(peft_config, "is_prompt_learning", False):
        found.append(f"peft_config {type(peft_config).__name__} puts tokens before single rows: use LoraConfig")
    return found


def _by_name(args: Any, refusals: tuple[Refusal, ...]) -> list[str]:
    return [
        f"{name}={getattr(args, name)!r}: {reason}"
        for name, refused, reason in refusals
        if hasattr(args, name) and refused(getattr(args, name))
    ]


def _sample(dataset: Any) -> Mapping[str, Any]:
    if dataset is None or not hasattr(dataset, "__len__") or not len(dataset):
        return {}
    row = dataset[0]
    return row if isinstance(row, Mapping) else {}


def _first_of(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None)


def _about_parts(parts: Mapping[str, Any]) -> list[str]:
    found = []
    if isinstance(parts.get("processing_class"), ProcessorMixin):
        found.append("processing_class is a processor of images or sound: pass the tokenizer of a language model")
    images = {"image", "images"} & set(_sample(parts.get("train_dataset")))
    if images:
        found.append(f"train_dataset has the column {images.pop()!r}: records with images are not available: remove it")
    data = parts.get("train_dataset")
    if data is None or (hasattr(data, "__len__") and not len(data)):
        found.append("train_dataset is missing or empty: pass the private records")
    if getattr(parts.get("train_dataset"), "max_rows_per_user", None) is not None:
        found.append(
            "train_dataset has users as records: use PrivateTrainer, with UserDataset and UserCollate (docs/trainer.md)"
        )
    if parts.get("peft_config") is not None and hasattr(parts.get("model"), "peft_config"):
        found.append("peft_config with a model that has adapters: pass the base model, or leave peft_config out")
    if parts.get("quantization_config") is not None and not isinstance(parts.get("model"), str):
        found.append("quantization_config with a model that is loaded already: pass the name of the model")
    return found
