"""Builds the trainer of a job: reads the data, loads the model, and makes the optimizer private."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from opacus.validators.errors import UnsupportedModuleError
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from opacus_ac.integrations.finetune.arguments import DataArguments
from opacus_ac.integrations.finetune.callbacks import StepLines
from opacus_ac.integrations.finetune.chat_data import TEXT, ChatDataset, PadCollate, encode
from opacus_ac.integrations.finetune.chat_files import Messages
from opacus_ac.integrations.finetune.chat_users import UserCollate, UserDataset
from opacus_ac.integrations.finetune.errors import FinetuneError, failing_with
from opacus_ac.integrations.finetune.job import Job
from opacus_ac.integrations.finetune.rows import read_rows
from opacus_ac.integrations.public_rows import PrivateRows
from opacus_ac.integrations.trainer.trainer import PrivateTrainer
from opacus_ac.models.default_model import ModelUnavailableError
from opacus_ac.models.peft import load_trainable

_GREETING = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello, how are you?"}]


Planting = Callable[[Any, Any], Sequence[Messages]]
"""Makes further private dialogues, given the tokenizer and the private dialogues (of each user, with ``group_by``)."""


def build_trainer(job: Job, planting: Planting | None = None) -> PrivateTrainer:
    """Return a trainer with data, model and private optimizer, which reports its progress to stderr.

    Args:
        job: the options of the run.
        planting: makes dialogues that are trained on as well, each a record (or a user) of its own; for audits.

    Raises:
        FinetuneError: If data or model cannot be loaded, or if this training cannot be made private.
    """
    _check_one_process(job)
    private, public = _read(job)
    torch.manual_seed(job.training.seed)
    model, tokenizer = _load_model(job, has_dialogues=_has_dialogues(private))
    if planting is not None:
        private = _with_planted(private, planting(tokenizer, private))
    _check_batch_size(job, len(private))
    with failing_with(3, ValueError):
        train, collate = _records(job.data, private, tokenizer)
        evaluation = None if public is None else ChatDataset(public, tokenizer, job.data.max_length)
    with failing_with(5, ValueError, NotImplementedError, UnsupportedModuleError):
        trainer = PrivateTrainer(
            model,
            job.training,
            privacy=job.privacy,
            train_dataset=train,
            eval_dataset=evaluation,
            data_collator=collate,
            processing_class=tokenizer,
        )
        for kind in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(kind)
        trainer.add_callback(StepLines(trainer))
        trainer.create_optimizer()
    return trainer


def _check_one_process(job: Job) -> None:
    if job.training.world_size > 1:
        raise FinetuneError(
            f"the command line runs in one process, not {job.training.world_size}: start one, or use PrivateTrainer "
            "under torchrun",
            2,
        )


def _read(job: Job) -> tuple[Any, Any]:
    """Return the private dialogues (of each user, with ``group_by``) and the public dialogues (or None)."""
    rows, job.rows = job.rows or read_rows(job.data), None
    if rows.public is not None and job.privacy.evaluation_is_public:  # otherwise the Trainer refuses them
        with failing_with(3, ValueError):
            _check_public(job.data, rows.private, rows.public)
    return rows.private, rows.public


def _with_planted(private: Any, planted: Sequence[Messages]) -> Any:
    """Return the private dialogues with more of them; where users are protected, each is that of a new user."""
    if isinstance(private, dict):
        return {**private, **{("planted", number): [dialogue] for number, dialogue in enumerate(planted)}}
    return [*private, *planted]


def _has_dialogues(private: Any) -> bool:
    """Say whether a row is a dialogue, and not a text."""
    users = private.values() if isinstance(private, dict) else [private]
    return any(dialogue[0]["role"] != TEXT for rows in users for dialogue in rows)


def _load_model(job: Job, *, has_dialogues: bool) -> tuple[Any, Any]:
    """Return the model and its tokenizer, which must have a chat template for dialogues."""
    chosen = job.model
    with failing_with(5, ModelUnavailableError, ValueError, ImportError):
        model, tokenizer = load_trainable(
            chosen.model_name_or_path, full=chosen.full, rank=chosen.lora_r, layers=chosen.lora_layers
        )
        if has_dialogues:
            encode(_GREETING, tokenizer, job.data.max_length)
    return model, tokenizer


def _check_batch_size(job: Job, records: int) -> None:
    """Refuse an expected batch size that is larger than the dataset."""
    training = job.training
    expected = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if expected > (job.privacy.dataset_size or records):
        raise FinetuneError(
            f"a step expects {expected} records, {job.data.train_file} has fewer: lower --gradient_accumulation_steps "
            f"(now {training.gradient_accumulation_steps}) or --per_device_train_batch_size",
            2,
        )


def _check_public(data: DataArguments, private: Any, public: Any) -> None:
    """Refuse a validation file that has dialogues of the private file.

    Raises:
        ValueError: If the files share data.
    """
    dialogues = [d for rows in private.values() for d in rows] if data.group_by is not None else private
    shared = PrivateRows(dialogues).shared_by(public)
    if shared is not None:
        raise ValueError(f"--validation_file {data.validation_file} is not public: {shared}")


def _records(data: DataArguments, dialogues: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return the dataset of the private dialogues, and its collate function."""
    length = data.max_length
    if data.group_by is None:
        return ChatDataset(dialogues, tokenizer, length), PadCollate(tokenizer.pad_token_id, length)
    users = UserDataset(dialogues, tokenizer, max_length=length, max_rows_per_user=data.max_rows_per_user)
    return users, UserCollate(tokenizer.pad_token_id, length)
