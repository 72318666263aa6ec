"""Collate functions of the private loader: a stand-in for an empty batch, and news of batches for the plan."""

from __future__ import annotations

import copy
import os
import secrets
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info

from opacus_ac.noise.secret_state import secret_randomness
from opacus_ac.sampling.delivery import tensors_of
from opacus_ac.sampling.passes import Worker
from opacus_ac.sampling.plan import SamplingPlan

_ROWS_OF_A_STAND_IN = 8
"""Largest number of rows of a stand-in."""

_PLANS: weakref.WeakValueDictionary[str, SamplingPlan] = weakref.WeakValueDictionary()
"""The plans of this process, by the names that batches of a worker carry."""


class EmptySafeCollate:
    """A collate function that returns a stand-in for an empty batch. The optimizer leaves the stand-in out of its sums.

    A batch without records breaks many models (attention cannot reshape it), and a skipped step would reveal that the
    batch was empty. The stand-in is made of the first row of the dataset, or of as many rows as ``collate_fn`` needs,
    because an invented row might not pass through every tokenizer and model. Its gradients are left out of every sum,
    not multiplied by zero, so no release depends on it. Each stand-in is a new object, which the loop may change.

    ``collate_fn`` may leave records out, such as the ``None`` of a row that could not be read. Whether it leaves a
    record out is found by adding the record to the rows of the stand-in. Such a record is not counted, and a batch of
    such records only is an empty one.

    Args:
        collate_fn: makes a batch of a list of rows.
        dataset: the dataset whose first rows are used.

    Raises:
        ValueError: If no batch can be made of the first rows.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any], dataset: Any) -> None:
        self.collate_fn = collate_fn
        self._rows: list[Any] = []
        failure: Exception | None = None
        for count in range(1, min(_ROWS_OF_A_STAND_IN, len(dataset)) + 1):
            self._rows.append(dataset[count - 1])
            try:
                if _most_rows(self._stand_in()) or count == len(dataset):
                    return
            except Exception as error:
                failure = error
        if failure is not None:
            raise ValueError(
                f"collate_fn makes no batch of the first {len(self._rows)} rows of the dataset "
                f"({type(failure).__name__}: {failure}), and a Poisson batch may have any number of rows: let it take "
                "any list of rows"
            ) from failure
        del self._rows[1:]  # batches have no tensors; the loop makes them

    @property
    def first_row(self) -> Any:
        """The first row of the dataset."""
        return self._rows[0]

    def _stand_in(self) -> Any:
        return self._batch_of(self._rows)

    def _batch_of(self, rows: list[Any]) -> Any:
        # With a known seed, random masks of a collator would tell how many records came before.
        with secret_randomness():
            return self.collate_fn(copy.deepcopy(rows))

    def __call__(self, records: list[Any]) -> tuple[Any, int]:
        """Return the batch of ``records`` and how many of them it has; a stand-in and 0 if there are none."""
        if not records:
            return self._stand_in(), 0
        try:
            with secret_randomness():
                batch = self.collate_fn(records)
        except Exception:
            if all(map(self._is_left_out, records)):
                return self._stand_in(), 0
            raise
        return self._counted(batch, records)

    def _counted(self, batch: Any, records: list[Any]) -> tuple[Any, int]:
        """Return a batch and the number of its records; a stand-in and 0 if all of them were left out."""
        rows = 0 if batch is None else _most_rows(batch)
        if rows is None or rows >= len(records):
            return batch, len(records)
        left_out = sum(map(self._is_left_out, records))
        if left_out == len(records) and not rows:
            return self._stand_in(), 0
        # Otherwise records are joined, say, and the step finds another number of gradients than records.
        return batch, rows if rows and rows == len(records) - left_out else len(records)

    def _is_left_out(self, record: Any) -> bool:
        """Say whether a record makes no row in a batch, beside rows that make some."""
        try:
            without, twice = (_most_rows(self._batch_of(self._rows * times)) for times in (1, 2))
            if not without or twice != 2 * without:
                return False  # the number of rows says nothing about records
            return _most_rows(self._batch_of([*self._rows, record])) == without
        except Exception:  # a user's function may raise anything
            return False


def _most_rows(batch: Any) -> int | None:
    """Return the largest first dimension of the tensors in a batch; None without tensors."""
    return max((tensor.shape[0] for tensor in tensors_of(batch) if tensor.dim()), default=None)


class ArrivingCollate:
    """A collate function for other loaders around our sampler. It tells the plan of every batch that arrives.

    Args:
        collate: collates a batch.
        plan: sampling plan of the private loader.
    """

    def __init__(self, collate: EmptySafeCollate, plan: SamplingPlan) -> None:
        self.collate = collate
        self._plan = secrets.token_hex(8)
        _PLANS[self._plan] = plan

    def __call__(self, records: list[Any]) -> Any:
        """Return the batch of ``records``, or a stand-in if there are none. A worker returns it in a parcel."""
        batch, count = self.collate(records)
        worker = get_worker_info()
        if worker is not None:
            return _Parcel(batch, (self._plan, count, Worker(os.getpid(), worker.id, worker.num_workers)))
        return _unpack(batch, (self._plan, count, None))


class _Parcel:
    """A batch on its way out of a worker. Unpickling it returns the batch itself, and tells the plan of it."""

    def __init__(self, batch: Any, label: tuple[str, int, Worker | None]) -> None:
        self.batch, self.label = batch, label

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpack, (self.batch, self.label)


def _unpack(batch: Any, label: tuple[str, int, Worker | None]) -> Any:
    name, records, worker = label
    plan = _PLANS.get(name)
    if plan is not None:
        plan.arrive(batch, records, worker)
    return batch
