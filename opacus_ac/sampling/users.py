"""Records that are users: which rows of a batch belong to which user.

The rows of a user stand one after the other in a batch. Each user of a batch has the same number of rows; filler rows
have no labels. The number of users is what the loader drew, and is never guessed from the batch: a wrong number would
put rows of several people under one clipping bound, or one person under several bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from typing import Any

from torch import Tensor

from opacus_ac.grad_sample.checks.chosen_records import choose_records, fresh, named_rows, same
from opacus_ac.noise.secret_state import secret_randomness
from opacus_ac.sampling.plan import Draw, SamplingPlan

_NOT_IN_BLOCKS = (
    "the rows of a batch of collate_fn are not as many for each of its users, one user after the other: with "
    "max_rows_per_user a clipping bound would be about rows of several people. Use "
    "opacus_ac.integrations.finetune.chat_users.UserCollate, or put the rows of the first user into the batch, then "
    "those of the next, each filled up to the same number"
)


class UserRows:
    """Counts the users whose rows are in a batch.

    Args:
        plan: sampling plan of the loader, which draws users.
        max_rows: public K, the largest number of rows of a user that reach the model.

    Guarantees:
        :meth:`drawn` answers only for the whole batch that the loader handed out last, and only before a step has used
        it.

    Raises:
        ValueError: If ``max_rows`` is not a whole number >= 1.
    """

    def __init__(self, plan: SamplingPlan, max_rows: int) -> None:
        if isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1:
            raise ValueError(f"max_rows_per_user must be a whole number >= 1, got {max_rows!r}")
        self.max_rows = max_rows
        self._plan = plan
        self._noted: tuple[Draw, int] | None = None
        self._supposed: int | None = None

    @property
    def supposed(self) -> bool:
        """Whether the context of :meth:`suppose` is active."""
        return self._supposed is not None

    def note(self, batch: Any) -> None:
        """Note the number of rows of the batch that the loader is about to hand out.

        Raises:
            ValueError: If the users of the batch cannot have the same number of rows, from 1 to ``max_rows``.
        """
        draw = self._plan.current()
        assert draw is not None
        rows, users = row_count(batch), max(draw.records, 1)
        if rows % users or not 1 <= rows // users <= self.max_rows:
            raise ValueError(
                f"the rows of a batch are not as many for each of its users, at least 1 and at most max_rows_per_user="
                f"{self.max_rows}: let collate_fn fill up the users of a batch to the same number of rows, with rows "
                "that have no labels (opacus_ac.integrations.finetune.chat_users.UserCollate), and let the dataset "
                f"keep at most {self.max_rows} rows of a user"
            )
        self._noted = (draw, rows)

    def count(self, rows: int) -> int:
        """Return the number of users with ``rows`` rows in total, for a loss. The number is private.

        Raises:
            ValueError: If :meth:`drawn` would raise, and the context of :meth:`suppose` is not active.
        """
        return self.drawn(rows) if self._supposed is None else rows // self._supposed

    def drawn(self, rows: int) -> int:
        """Return the number of users whose ``rows`` rows went through the model. The number is private.

        Raises:
            ValueError: If the rows are not a whole batch that the private loader has just drawn.
        """
        draw = self._plan.current()  # None after a step has used it
        if draw is None or self._noted is None or self._noted[0] is not draw:
            raise ValueError(
                "max_rows_per_user is set, and only a batch that the private loader has just drawn tells which rows "
                "are of one user: take each batch from the loader that make_private returned, and one step per batch"
            )
        if rows != self._noted[1]:
            raise ValueError(
                "the model got another number of rows than the loader's batch has, so it is unknown which rows are of "
                "one user: pass each batch through the model whole, with the rows as the first dimension of every "
                "tensor; use max_physical_batch_size for smaller batches"
            )
        return max(draw.records, 1)

    @contextmanager
    def suppose(self, rows_per_user: int) -> Iterator[None]:
        """Return a context in which :meth:`count` assumes ``rows_per_user`` rows per user, to check a loss."""
        before, self._supposed = self._supposed, rows_per_user
        try:
            yield
        finally:
            self._supposed = before


def row_count(batch: Any) -> int:
    """Return the number of rows of a batch, which is the first dimension of all of its tensors.

    Raises:
        ValueError: If the batch has no tensors, or their first dimensions differ.
    """
    sizes = {len(rows) for _, rows in named_rows(batch)}
    if len(sizes) != 1:
        raise ValueError(
            f"the tensors of a batch have {len(sizes)} different first dimensions, and with max_rows_per_user all of "
            "them need the rows of its users there: let collate_fn return tensors in dicts, lists or tuples, rows first"
        )
    return sizes.pop()


def check_rows_of_users(dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
    """Refuse a ``collate`` that does not put the rows of a user one after the other, with as many for each user.

    A few users with different numbers of rows are collated together and alone. The rows that a user has alone must
    stand in one block of the batch of all, and each user must have a block of its own.

    Raises:
        ValueError: If rows of a user stand elsewhere, or the batches do not show whose rows are whose.
    """
    users = choose_records(dataset, most=3)
    if len(users) < 2:
        return
    with secret_randomness():
        alone = [dict(named_rows(collate(fresh([user])))) for user in users]
        told = False
        for order in (users, users[::-1]):
            together, again = (dict(named_rows(collate(fresh(order)))) for _ in range(2))
            fixed = {name: rows for name, rows in together.items() if same(rows, again.get(name))}
            told = _tell_apart(together, fixed, alone if order is users else alone[::-1]) or told
    if not told and not all(same(part, alone[0]) for part in alone):
        raise ValueError(
            "nothing in the batches of collate_fn tells whose rows are whose: let it put a user's rows into a batch as "
            "they are, and draw at random in the dataset or in the loop"
        )


def _tell_apart(together: dict[str, Tensor], fixed: dict[str, Tensor], alone: list[dict[str, Tensor]]) -> bool:
    """Check that the rows of each user are in one block of the batch of all users.

    Args:
        together: tensors of the batch of all users, by name.
        fixed: the tensors among them that are the same each time.
        alone: tensors of a batch of each user alone.

    Returns:
        Whether the tensors tell the users apart.

    Raises:
        ValueError: If the rows of a user are not in one block.
    """
    counts = {len(rows) for rows in together.values()}
    if len(counts) != 1:  # such a batch is refused later
        return True
    users = len(alone)
    if counts.pop() % users:
        raise ValueError(_NOT_IN_BLOCKS)
    told = False
    for name, rows in fixed.items():
        own = [part[name] for part in alone if name in part]
        if len(own) < users or not len(rows):
            continue
        blocks = [list(block) for block in rows.split(len(rows) // users)]
        found = [[_blocks_with(row, blocks) for row in part] for part in own]
        if not all(where for places in found for where in places):  # rows are not put in as they are
            continue
        homes = [set.intersection(*places) for places in found if places]
        if not any(all(map(set.__contains__, homes, order)) for order in permutations(range(users))):
            raise ValueError(_NOT_IN_BLOCKS)
        told = told or any(len(home) < users for home in homes)
    return told


def _blocks_with(row: Tensor, blocks: list[list[Tensor]]) -> set[int]:
    """Return the numbers of the blocks that contain ``row``."""
    return {place for place, block in enumerate(blocks) if any(_is_row(row, other) for other in block)}


def _is_row(row: Tensor, other: Tensor) -> bool:
    """Say whether ``other`` is ``row``, apart from padding at one end."""
    if row.dim() != other.dim():
        return False
    if not row.dim():
        return bool(row == other)
    length = row.shape[0]
    if row.shape[1:] != other.shape[1:] or length > other.shape[0]:
        return False
    return same(row, other[:length]) or same(row, other[other.shape[0] - length :])
