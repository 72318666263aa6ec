"""Settings of a Trainer that cannot be made private, with the reason and the remedy for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from opacus_ac.integrations.public_rows import PrivateRows
from opacus_ac.integrations.trainer.arguments import PrivacyArguments
from opacus_ac.integrations.trainer.inner import refused_inner
from opacus_ac.integrations.trainer.reporters import refused_reporters
from opacus_ac.models.transformers import has_record_losses
from opacus_ac.sampling.public_randomness import carried_generator

_DEFAULT_MAX_GRAD_NORM = 1.0  # the default of TrainingArguments, which the user did not choose


def _given(value: Any) -> bool:
    return bool(value)


def _more_than_one(value: Any) -> bool:
    return value is not None and value > 1


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _unsafe_optimizer(value: Any) -> bool:
    return any(part in _text(value) for part in ("lomo", "layerwise", "schedule_free"))


# Name of a field of TrainingArguments, test for a value that is refused, and the reason with the remedy.
_ARGUMENTS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("n_gpu", _more_than_one, "DataParallel is not available: start a process per device with torchrun"),
    ("deepspeed", _given, "DeepSpeed reduces gradients before they are clipped: leave it out"),
    ("fsdp", _given, "FSDP is not available in the Trainer: leave it out, or use make_private with fully_shard"),
    ("parallelism_config", _given, "parallelism within the model is not available: leave it out"),
    ("fp16", _given, "its loss scaler skips steps as private gradients overflow: use bf16=True"),
    ("torch_compile", _given, "compilation decides what runs before hooks can: leave it out"),
    (
        "use_liger_kernel",
        _given,
        "its kernels replace layers and loss, and have no rule for gradients per record: leave it out",
    ),
    (
        "neftune_noise_alpha",
        lambda v: v is not None,
        "its noise depends on the longest record of the batch: leave it out",
    ),
    (
        "auto_find_batch_size",
        _given,
        "the batch size must not depend on the records: choose per_device_train_batch_size",
    ),
    ("dataloader_num_workers", _given, "workers draw batches ahead of the steps that are accounted: use 0"),
    (
        "train_sampling_strategy",
        lambda v: v is not None and _text(v) != "random",
        "batches must be drawn at random, whatever the length of records: use 'random'",
    ),
    (
        "include_num_input_tokens_seen",
        lambda v: _text(v) not in ("no", "None", "False"),
        "it counts private tokens: use 'no'",
    ),
    ("skip_memory_metrics", lambda v: v is False, "peaks of memory follow the realised batches: leave it True"),
    ("debug", _given, "it prints values of private activations: leave it empty"),
    (
        "load_best_model_at_end",
        _given,
        "it would load weights that were not the evaluated average: choose among checkpoints",
    ),
    (
        "lr_scheduler_type",
        lambda v: _text(v) in ("reduce_lr_on_plateau", "greedy"),
        "it follows a loss: use a schedule over steps; lr_control follows the released clip rate",
    ),
    ("optim", _unsafe_optimizer, "it updates weights outside of optimizer.step(): use 'adamw_torch'"),
    ("enable_jit_checkpoint", _given, "it saves in the middle of a step: use save_strategy='steps'"),
    (
        "packing",
        _given,
        "a packed row puts several records under one clipping bound, and moves all rows after it: use False",
    ),
    ("padding_free", _given, "it joins the records of a batch into one row: use False"),
    (
        "max_grad_norm",
        lambda v: v not in (None, 0, _DEFAULT_MAX_GRAD_NORM),
        "it clips the noisy sum, not the records: set PrivacyArguments.per_sample_max_grad_norm, and this to 0",
    ),
)


def refusals(
    *,
    args: Any,
    privacy: PrivacyArguments,
    model: Any,
    train_dataset: Any,
    eval_dataset: Any,
    options: Mapping[str, Any],
    rows: PrivateRows | None = None,
) -> list[str]:
    """Return all reasons why this Trainer cannot be made private, each with its remedy.

    Args:
        args: ``TrainingArguments``.
        privacy: privacy settings.
        model: the model.
        train_dataset: private data, or None.
        eval_dataset: evaluation data, or None.
        options: the other arguments of ``Trainer``.
        rows: the rows of ``train_dataset``; None to read them here.
    """
    found = [
        f"{name}={_text(getattr(args, name))!r}: {reason}"
        for name, refused, reason in _ARGUMENTS
        if hasattr(args, name) and refused(getattr(args, name))
    ]
    for name, reason in (
        ("compute_loss_func", "the loss must be computed per record: leave it out, the model's own loss is made so"),
        ("model_init", "a new model for every train() would escape the hooks: pass model="),
    ):
        if options.get(name) is not None:
            found.append(f"{name}: {reason}")
    found += refused_inner(args, privacy, options.get("optimizers")) + refused_reporters(args)
    found += _about_data(privacy, rows or PrivateRows(train_dataset), eval_dataset, options.get("data_collator"))
    if privacy.grad_sample_mode != "bk":
        found += _about_hooks(args)
    if isinstance(model, nn.Module):
        found += _about_model(privacy, model)
    return found


def _about_data(privacy: PrivacyArguments, rows: PrivateRows, eval_dataset: Any, collator: Any) -> list[str]:
    found, train_dataset = [], rows.dataset
    if train_dataset is not None and (
        isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__len__")
    ):
        found.append(
            "train_dataset is iterable: records cannot be drawn from it. Use a dataset with __len__ and __getitem__"
        )
    if eval_dataset is not None:
        found += refused_evaluation(privacy, rows, eval_dataset)
    if getattr(train_dataset, "max_rows_per_user", None) is not None and collator is None:
        found.append(
            "data_collator is missing: the items of train_dataset are users, and the Trainer's own collator cannot "
            "join their rows. Pass opacus_ac.integrations.finetune.chat_users.UserCollate(pad_id, max_length)"
        )
    if type(collator).__name__ == "DataCollatorWithFlattening":
        found.append(
            "data_collator DataCollatorWithFlattening packs the records of a batch into one row: use one that pads"
        )
    carried = None if collator is None else carried_generator(collator)
    if carried is not None:
        found.append(
            f"data_collator {type(collator).__name__} has a generator of its own ({carried}), whose draws for a batch "
            "tell how many records came before: leave its seed or generator out, so that it draws from the global "
            "generators, which are secret during a step"
        )
    return found


def refused_evaluation(privacy: PrivacyArguments, rows: PrivateRows, eval_dataset: Any) -> list[str]:
    """Return the reasons why data must not be used for evaluation.

    Args:
        privacy: privacy settings.
        rows: the rows of the private data.
        eval_dataset: the data, or a mapping of names to data.
    """
    train_dataset = rows.dataset
    sets = list(eval_dataset.values()) if isinstance(eval_dataset, Mapping) else [eval_dataset]
    if train_dataset is not None and any(data is train_dataset for data in sets):
        return ["eval_dataset is train_dataset: its loss and metrics would be published without noise. Use public data"]
    if any(getattr(data, "max_rows_per_user", None) is not None for data in sets):
        return ["eval_dataset has users as items, and evaluation averages over rows: pass its rows (ChatDataset)"]
    if not privacy.evaluation_is_public:
        return [
            "eval_dataset: its loss and metrics are published without noise. If these data need no protection, say "
            "evaluation_is_public=True"
        ]
    shared = rows.shared_by(eval_dataset)
    return [] if shared is None else [f"eval_dataset is not public: {shared}"]


def _about_hooks(args: Any) -> list[str]:
    checkpointing = getattr(args, "activation_checkpointing", None) or getattr(args, "gradient_checkpointing", None)
    if not checkpointing:
        return []
    return [
        'activation_checkpointing with grad_sample_mode="hooks": Opacus loses the gradients of recomputed layers. Use '
        '"bk"'
    ]


def _about_model(privacy: PrivacyArguments, model: nn.Module) -> list[str]:
    found = []
    wide = (torch.float32, torch.float64)
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype not in wide]
    if narrow:
        found.append(
            f"{narrow[0]} and {len(narrow) - 1} more are trained in {model.get_parameter(narrow[0]).dtype}: rounding "
            "would move sums of clipped gradients beyond C. Load the model in float32 and use bf16=True (frozen "
            "weights may be bfloat16)"
        )
    if privacy.loss_bound is not None and has_record_losses(model) is False:
        found.append(
            f"loss_bound={privacy.loss_bound:g}: the losses of single records are not known for "
            f"{type(model).__name__}, so no noisy loss can be released. Use loss_bound=None (0 on a command line)"
        )
    return found


def raise_for(found: list[str], what: str) -> None:
    """Raise one error that lists all reasons.

    Raises:
        ValueError: If there is a reason.
    """
    if found:
        raise ValueError("\n  * ".join([f"{what} cannot be made private:", *found]))


def refuse_bases(cls: type) -> None:
    """Refuse a class that also inherits from a trainer of TRL.

    Raises:
        TypeError: If a base class is of TRL.
    """
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "trl":
            raise TypeError(
                f"{cls.__name__} inherits from {base.__name__} of TRL, which packs rows and logs entropy and token "
                "accuracy of the private batch without noise: inherit from PrivateSFTTrainer, PrivateDPOTrainer or "
                "PrivateTrainer alone, which are in opacus_ac.integrations"
            )
