"""What the encoder is trained on: mail with a message or a sender as the record, and sentences with human ratings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from common.sentiment_data import encoder_folder, sentences
from encoder.mail import Message, archive_file, read_messages
from torch import Tensor
from torch.utils.data import Dataset

HELD_OUT_OF = 8
MOST = 3  # rows of a sender
IGNORE = -100
Row = tuple[list[int], int]  # tokens and class


class Records(Dataset[list[Row]]):
    """Records of at most ``max_rows_per_user`` rows; without one, of a row each."""

    def __init__(self, records: Sequence[list[Row]], max_rows_per_user: int | None = None) -> None:
        self.records = records
        if max_rows_per_user is not None:
            self.max_rows_per_user = max_rows_per_user

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[Row]:
        return self.records[index]


@dataclass(frozen=True)
class Task:
    """Private records, and public rows of the two classes 0 and 1, none of which is in a record."""

    private: Records
    public: list[Row]


def collate(records: Sequence[list[Row]]) -> dict[str, Tensor]:
    """Return the rows of the records, one record after the other, as many for each; rows that fill up have no label."""
    most = max([1, *map(len, records)])
    rows = [row for own in records for row in (*own, *[([0], IGNORE)] * (most - len(own)))]
    width = -(-max(len(ids) for ids, _ in rows) // 8) * 8
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < lengths[:, None]).long(), "labels": labels}


def tokens(texts: Sequence[str], length: int) -> list[list[int]]:
    """Return the first ``length`` tokens of each text."""
    from transformers import AutoTokenizer

    found: list[list[int]] = AutoTokenizer.from_pretrained(encoder_folder())(
        list(texts), truncation=True, max_length=length
    )["input_ids"]
    return found


def is_held_out(name: str) -> bool:
    """Return whether a name is public: a function of the name alone, one in eight."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_OF == 0


def _mail() -> tuple[list[Message], list[Row]]:
    messages = read_messages(archive_file())
    return messages, list(zip(tokens([m.text for m in messages], 64), [int(m.spam) for m in messages], strict=True))


def mail_by_message() -> Task:
    """Spam or not; a record is a message, and nobody who is held out sent one of them."""
    messages, rows = _mail()
    private = [[row] for message, row in zip(messages, rows, strict=True) if not is_held_out(message.sender)]
    return Task(Records(private), _public(messages, rows))


def mail_by_sender() -> Task:
    """Spam or not; a record is an address with the first ``MOST`` messages from it, by their names in the archive."""
    messages, rows = _mail()
    senders: dict[str, list[Row]] = {}
    for message, row in zip(messages, rows, strict=True):
        if not is_held_out(message.sender) and len(own := senders.setdefault(message.sender, [])) < MOST:
            own.append(row)
    return Task(Records(list(senders.values()), MOST), _public(messages, rows))


def _public(messages: Sequence[Message], rows: Sequence[Row]) -> list[Row]:
    return [row for message, row in zip(messages, rows, strict=True) if is_held_out(message.sender)]


def rated_sentences() -> Task:
    """Praise or blame in snippets of film reviews (Hutto and Gilbert, ICWSM 2014); a record is a snippet."""
    labelled = dict(sentences("movies"))
    rows = zip(labelled, tokens(list(labelled), 32), labelled.values(), strict=True)
    private, public = [], []
    for text, ids, label in rows:
        (public if is_held_out(text) else private).append((ids, label))
    return Task(Records([[row] for row in private]), public)


TASKS: dict[str, Callable[[], Task]] = {
    "mail, message": mail_by_message,
    "mail, sender": mail_by_sender,
    "sentences": rated_sentences,
}


@cache
def task_of(name: str) -> Task:
    """Return the task of that name, read once."""
    return TASKS[name]()


def as_batch(rows: Sequence[Row]) -> dict[str, Any]:
    """Return a batch of single rows."""
    return collate([[row] for row in rows])
