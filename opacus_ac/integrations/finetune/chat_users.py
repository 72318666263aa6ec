"""Dialogues of users as training records: every user is one record of at most K rows.

A user's record must depend on that user's rows alone, in which rows are kept as well as in how they are encoded. N is
the number of users, including those without a row or a label, so that N does not depend on what anybody wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from opacus_ac.integrations.finetune.chat_data import IGNORE, Row, collate, encode
from opacus_ac.integrations.finetune.chat_files import read_users

Users = Mapping[Any, Sequence[Any]] | Sequence[Sequence[Any]]


def choose_rows(rows: int, limit: int, seed: int | None = None) -> list[int]:
    """Return the numbers of the rows that are kept of a user with ``rows`` rows, in order.

    Args:
        rows: number of rows of the user.
        limit: number of rows to keep.
        seed: public seed of a random choice; None keeps the first rows.

    Guarantees:
        The choice depends on the arguments only, not on the user's place in the dataset. That place changes when
        another user joins.
    """
    if seed is None or rows <= limit:
        return list(range(min(rows, limit)))
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(rows, generator=generator)[:limit].tolist())


class UserDataset(Dataset[list[Row]]):
    """A dataset of users, each a list of tokenised dialogues, for ``PrivateTrainer`` and ``make_private``.

    Args:
        users: the dialogues of each user, as ``read_users`` returns them, or a list of them without names.
        tokenizer: a tokenizer with a chat template.
        max_length: public limit on the number of tokens of a row.
        max_rows_per_user: public limit K on the number of rows of a user.
        seed: public seed of a random choice among the rows of a user who has more than K. The choice stays the same for
            the whole run. None keeps the first K rows in file order.

    Attributes:
        users: the kept rows of each user; item ``i`` of the dataset is ``users[i]``.

    Guarantees:
        Item ``i`` depends on the rows of user ``i`` alone. The caller makes sure that no person is two users.

    Raises:
        ValueError: If a limit is below 1, if none of the first 100 users has a label, or if a row cannot be encoded.
            The message has the numbers of user and row, from 0.
    """

    def __init__(
        self, users: Users, tokenizer: Any, *, max_length: int, max_rows_per_user: int, seed: int | None = None
    ) -> None:
        if max_rows_per_user < 1:
            raise ValueError(f"max_rows_per_user must be at least 1, got {max_rows_per_user}")
        self.max_length, self.max_rows_per_user = max_length, max_rows_per_user
        dialogues = users.values() if isinstance(users, Mapping) else users
        self.users = [
            [
                _encode(number, index, rows[index], tokenizer, max_length)
                for index in choose_rows(len(rows), max_rows_per_user, seed)
            ]
            for number, rows in enumerate(dialogues)
        ]
        first = self.users[:100]
        if first and not any((row["labels"] != IGNORE).any() for rows in first for row in rows):
            raise ValueError(
                f"no reply fits into max_length={max_length} tokens for any of the first {len(first)} users: choose a "
                "larger max_length"
            )

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> list[Row]:
        return self.users[index]


def _encode(user: int, index: int, record: Any, tokenizer: Any, max_length: int) -> Row:
    try:
        return encode(record["messages"] if isinstance(record, Mapping) else record, tokenizer, max_length)
    except ValueError as error:
        raise ValueError(f"user {user}, row {index}: {error}") from None


@dataclass(frozen=True)
class UserCollate:
    """Pads the users of a batch to the same number of rows, and all rows to the same length. It can be pickled.

    The batch ``[U * K, T]`` has the rows of its U users, one user after the other. K is the largest number of rows of a
    user in the batch. A filler row has one padding token and no label. The token is attended to, because a row without
    attention is NaN in some attention kernels. For evaluation an item may be a row, as in ``ChatDataset``; it counts as
    a user with this row.
    """

    pad_id: int
    max_length: int
    multiple: int = 8

    def __call__(self, users: Sequence[Sequence[Row] | Row]) -> Row:
        """Return the batch ``[U * K, T]`` of ``users``."""
        rows = [[user] if isinstance(user, Mapping) else list(user) for user in users]
        most = max([1, *map(len, rows)])
        filling = {"input_ids": torch.tensor([self.pad_id]), "labels": torch.tensor([IGNORE])}
        filled = [row for own in rows for row in (*own, *[filling] * (most - len(own)))]
        return collate(filled, self.pad_id, self.max_length, self.multiple)


__all__ = ["UserCollate", "UserDataset", "choose_rows", "read_users"]
