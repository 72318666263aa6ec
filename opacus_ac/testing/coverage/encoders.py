"""Encoders of text with every head that has a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.testing.coverage.case import Case
from opacus_ac.testing.coverage.tiny import built, config_class, text_rows, tiny_config

TYPES = (
    "albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta", "xlm-roberta",
)  # fmt: skip
CLASSES = CHOICES = 3
Labelled = Callable[[int, dict[str, Tensor]], dict[str, Tensor]]


def _one_class(number: int, row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**row, "labels": torch.tensor(number % CLASSES)}


def _token_classes(_number: int, row: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = row["labels"]
    return {**row, "labels": torch.where(labels < 0, labels, labels % CLASSES)}


def _hidden_tokens(number: int, row: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = row["labels"].clone()
    labels[number % 2 :: 2] = -100
    return {**row, "labels": labels}


def _answer(number: int, row: dict[str, Tensor]) -> dict[str, Tensor]:
    rest = {name: value for name, value in row.items() if name != "labels"}
    return {**rest, "start_positions": torch.tensor(number % 3), "end_positions": torch.tensor(2 + number % 3)}


def _choice(number: int, row: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"].roll(shift) for shift in range(CHOICES)])
    mask = row["attention_mask"].expand(CHOICES, -1).clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(number % CHOICES)}


def _regression(number: int, row: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**row, "labels": torch.tensor(number / 3, dtype=torch.float64)}


#: Head -> the auto class, what the records of a head get as labels, and changes of the config.
HEADS: dict[str, tuple[str, Labelled, dict[str, Any]]] = {
    "sequence classification": ("AutoModelForSequenceClassification", _one_class, {"num_labels": CLASSES}),
    "regression": ("AutoModelForSequenceClassification", _regression, {"num_labels": 1}),
    "token classification": ("AutoModelForTokenClassification", _token_classes, {"num_labels": CLASSES}),
    "question answering": ("AutoModelForQuestionAnswering", _answer, {}),
    "masked language model": ("AutoModelForMaskedLM", _hidden_tokens, {}),
    "multiple choice": ("AutoModelForMultipleChoice", _choice, {}),
}


def labelled_rows(label: Labelled, rows: Sequence[dict[str, Tensor]] | None = None) -> list[dict[str, Tensor]]:
    """Return records with the labels of a head.

    Args:
        label: makes a record of its number and a record of text.
        rows: records of text; by default those of causal models.
    """
    return [label(number, row) for number, row in enumerate(text_rows() if rows is None else rows)]


def _model(model_type: str, head: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    import transformers

    name, label, changes = HEADS[head]
    config = tiny_config(config_class(model_type), **changes)
    return built(getattr(transformers, name), config), labelled_rows(label)


def cases() -> Iterator[Case]:
    """Yield a case per encoder and head."""
    for model_type in TYPES:
        for head in HEADS:
            yield Case(f"{model_type}: {head}", partial(_model, model_type, head))
