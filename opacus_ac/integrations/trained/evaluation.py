"""The loss of a run's model on public dialogues."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opacus_ac.integrations.finetune.chat_data import IGNORE, ChatDataset, collate
from opacus_ac.integrations.finetune.chat_files import read_dialogues
from opacus_ac.integrations.finetune.chat_users import read_users
from opacus_ac.integrations.public_rows import PrivateRows
from opacus_ac.integrations.same_file import same_file
from opacus_ac.integrations.trained.folder import RunError, RunFolder
from opacus_ac.integrations.trained.model import RunModel
from opacus_ac.loss import per_record_causal_lm_loss


@dataclass(frozen=True)
class HeldOutLoss:
    """A mean loss over public records.

    Attributes:
        mean: mean over the records of the mean loss of each record's reply tokens, in nats.
        error: its standard error over the records; NaN for one record.
        records: number of records that have a reply.
    """

    mean: float
    error: float
    records: int

    def __str__(self) -> str:
        shown = f" ± {self.error:.3f}" if math.isfinite(self.error) else ""
        return f"{self.mean:.3f}{shown}"


def read_public(run: RunFolder, file: str, *, train_file: str | None, group_by: str | None, unchecked: bool) -> Any:
    """Return public dialogues, after a comparison with the private data of the run.

    Args:
        run: the run.
        file: the public file.
        train_file: the private file; by default the one that the run was trained on, if this machine trained it.
        group_by: column of the user in the private file, as in training.
        unchecked: whether the user says that the private data are not at hand, so that nothing can be compared.

    Raises:
        RunError: If the private data are not known, or not there, or the file is the private one or has rows of it.
        ValueError: If a file cannot be read.
    """
    if unchecked:
        return read_dialogues(file)
    paths = run.local_paths
    private = train_file or paths.get("train_file")
    if private is None or not Path(private).is_file():
        where = "its private data are not known here" if private is None else f"its private data are not at {private}"
        raise RunError(
            f"{run.path}: {where}, so nobody can tell whether {file} has rows of them. Name them with --train-file, or "
            "say --unchecked if they are on another machine"
        )
    public = read_dialogues(file)
    group_by = group_by or (None if train_file else paths.get("group_by"))
    dialogues = read_dialogues(private) if group_by is None else read_users(private, group_by)
    shared = same_file(file, private)
    if shared is None:
        rows = [d for own in dialogues.values() for d in own] if isinstance(dialogues, Mapping) else dialogues
        shared = PrivateRows(rows).shared_by(public)
    if shared is not None:
        raise RunError(f"--data {file} is not public: {shared}")
    return public


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, dialogues: Any, *, max_length: int, batch_size: int = 8) -> HeldOutLoss:
    """Return the loss of a model on public dialogues.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        dialogues: the dialogues.
        max_length: tokens per dialogue; longer ones are cut.
        batch_size: dialogues at a time; it does not change the result.

    Raises:
        ValueError: If no dialogue has a reply within ``max_length``.
    """
    if not len(dialogues):
        raise RunError("there is no dialogue to evaluate on")
    rows = [row for row in ChatDataset(dialogues, tokenizer, max_length).rows if (row["labels"][1:] != IGNORE).any()]
    if not rows:
        raise RunError(f"no reply fits into {max_length} tokens: choose a larger --max-length")
    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        padded = collate(rows[start : start + batch_size], tokenizer.pad_token_id, max_length)
        batch = {name: values.to(model.device) for name, values in padded.items()}
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits.float()
        found += per_record_causal_lm_loss(logits, labels).double().tolist()
    mean = math.fsum(found) / len(found)
    squares = math.fsum((loss - mean) ** 2 for loss in found)
    error = math.sqrt(squares / (len(found) - 1) / len(found)) if len(found) > 1 else math.nan
    return HeldOutLoss(mean, error, len(found))


def losses(run: RunModel, dialogues: Any, *, max_length: int) -> dict[str, HeldOutLoss]:
    """Return the loss of the base model ("before"), where it is at hand, and of the trained model ("after")."""
    found = {}
    with suppress(RunError), run.base() as base:
        found["before"] = held_out_loss(base, run.tokenizer, dialogues, max_length=max_length)
    found["after"] = held_out_loss(run.model, run.tokenizer, dialogues, max_length=max_length)
    return found
