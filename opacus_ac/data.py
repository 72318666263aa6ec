"""The private data loader: Poisson batches, physical batches, and a stand-in for the empty batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

import torch
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from opacus_ac.randomness import RandomStream
from opacus_ac.sampling import (
    BatchSizes,
    FixedSizeBatchSampler,
    PoissonBatchSampler,
    PrivateBatchSampler,
    RateSchedule,
    SamplingPlan,
    ShuffledBatchSampler,
    TruncatedPoissonBatchSampler,
)
from opacus_ac.users import UserRows

_DRAWING: dict[str, type[PoissonBatchSampler]] = {
    "poisson": PoissonBatchSampler,
    "truncated_poisson": TruncatedPoissonBatchSampler,
    "fixed_size": FixedSizeBatchSampler,
}


def constant_like(batch: Any) -> Any:
    """Return ``batch`` with every tensor zeroed and every string emptied: its structure without its content.

    Raises:
        ValueError: the batch holds something other than tensors, numbers, strings and containers of them.
    """
    if isinstance(batch, torch.Tensor):
        return torch.zeros_like(batch)
    if isinstance(batch, str | bytes | bool | int | float) or batch is None:
        return None if batch is None else type(batch)()
    if isinstance(batch, Mapping):
        return type(batch)({key: constant_like(value) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(constant_like(value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(constant_like(value) for value in batch)
    raise ValueError(
        f"cannot make a stand-in for an empty batch from {type(batch).__name__}: let collate_fn return tensors in "
        "dicts, lists or tuples"
    )


class EmptySafeCollate:
    """Collates a batch; an empty batch becomes a constant batch of one record, which the optimizer gives weight zero.

    A batch of no records breaks many models (attention cannot reshape it), and skipping the step would reveal that
    the batch was empty.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any], example: Any) -> None:
        self.collate_fn = collate_fn
        self.stand_in = constant_like(collate_fn([example]))

    def __call__(self, records: list[Any]) -> Any:
        """Return the batch of ``records``, or the stand-in when there are none."""
        return self.collate_fn(records) if records else self.stand_in


class PrivateDataLoader(DataLoader[Any]):
    """A ``DataLoader`` over private draws; built by ``make_private``, used as any other loader.

    ``len(loader)`` is the number of logical batches of a pass. With ``max_physical_batch_size`` a logical batch
    comes as several batches in a row; the optimizer knows and steps once.

    Attributes:
        users: tells, where a record is a user, how many users the rows of the batch in hand belong to; None otherwise.
    """

    def __init__(self, template: DataLoader[Any], batch_sampler: PrivateBatchSampler) -> None:
        super().__init__(
            dataset=template.dataset,
            batch_sampler=batch_sampler,
            collate_fn=EmptySafeCollate(template.collate_fn, template.dataset[0]),
            num_workers=template.num_workers,
            pin_memory=template.pin_memory,
            timeout=template.timeout,
            worker_init_fn=template.worker_init_fn,
            multiprocessing_context=template.multiprocessing_context,
            prefetch_factor=template.prefetch_factor,
            persistent_workers=template.persistent_workers,
        )
        self.plan = batch_sampler.plan
        limit = self.plan.max_rows_per_user
        self.users = None if limit is None else UserRows(self.plan, limit)

    def split(self, rank: int, world: int) -> None:
        """Hand out this process's records of each logical batch, one of several processes that draw alike."""
        sampler = self.batch_sampler
        assert isinstance(sampler, PrivateBatchSampler)
        sampler.rank, sampler.world = rank, world

    @property
    def sample_rate(self) -> float:
        """Sampling rate of the next step, expected batch size / N."""
        return self.plan.sizes.rate(self.plan.step)

    def __iter__(self) -> Generator[Any, None, None]:  # type: ignore[override]
        self.plan.open()
        try:
            for batch in super().__iter__():
                self.plan.deliver()
                if self.users is not None:
                    self.users.note(batch)
                yield batch
        finally:
            self.plan.close()


class LogicalBatches:
    """A private loader seen a logical batch at a time, for loops that take one optimizer step per item.

    Each item yields the pairs (physical batch, whether it is the last of its logical batch). ``optimizer.step()`` has to
    follow each physical batch before the next one is asked for.

    Args:
        loader: the loader that ``make_private`` returned.
    """

    def __init__(self, loader: PrivateDataLoader) -> None:
        self.loader = loader
        self.dataset = loader.dataset
        self._open: Generator[Any, None, None] | None = None

    def __len__(self) -> int:
        """Return the number of logical batches of a pass."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Iterator[tuple[Any, bool]]]:
        if self._open is not None:
            self._open.close()  # a pass that an error interrupted must not close this one later
        self._open = batches = iter(self.loader)
        try:
            for _ in range(len(self)):
                yield self._physical(batches)
        finally:
            batches.close()

    def _physical(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        last = False
        while not last:
            batch = next(batches)
            draw = self.loader.plan.current()
            assert draw is not None
            last = draw.last
            yield batch, last


def private_loader(
    loader: DataLoader[Any],
    *,
    sampling: str,
    stream: RandomStream,
    max_physical_batch_size: int | None = None,
    schedule: RateSchedule | None = None,
    max_batch_size: int | None = None,
    dataset_size: int | None = None,
    max_rows_per_user: int | None = None,
) -> PrivateDataLoader:
    """Return a private loader over the records of ``loader``.

    Args:
        loader: loader over a map-style dataset, sequential, shuffled, or already Poisson.
        sampling: "poisson": batches of rate batch_size / N; "truncated_poisson": the same, with at most ``max_batch_size``
            records; "fixed_size": batch_size of N records without replacement; "shuffled": the loader's own batches.
        stream: random stream of the draws.
        max_physical_batch_size: largest batch that reaches the model.
        schedule: expected batch size per step (not for "shuffled").
        max_batch_size: largest logical batch, for "truncated_poisson".
        dataset_size: public N, from which rate and length of a pass follow; the number of records by default. It may differ
            from that number for "poisson" only.
        max_rows_per_user: where an item of the dataset is a user, the most rows that one has; None where it is a row.

    Raises:
        ValueError: a dataset or sampler for which no sampling bound is known, or items that are other records than said.
    """
    _check_records(loader.dataset, max_rows_per_user)
    batch_size, steps = _check(loader, drawn=sampling != "shuffled")
    records = len(loader.dataset)  # type: ignore[arg-type]
    if dataset_size is not None and dataset_size != records:
        if sampling != "poisson":
            raise ValueError(
                f"dataset_size={dataset_size} is not the number of records, which sampling={sampling!r} needs: leave it "
                'out, or use sampling="poisson"'
            )
        sizes = BatchSizes(dataset_size, batch_size, schedule)
        plan = SamplingPlan(sizes, sampling, math.ceil(dataset_size / batch_size), max_rows_per_user=max_rows_per_user)
        public = PoissonBatchSampler(plan, stream, max_physical_batch_size)
        public.records = records
        return PrivateDataLoader(loader, public)
    if schedule is not None and sampling == "shuffled":
        raise ValueError("batch_size_schedule needs poisson_sampling=True, or another sampling that draws batches")
    sizes = BatchSizes(records, batch_size, schedule, whole=sampling == "fixed_size")
    plan = SamplingPlan(sizes, sampling, steps, max_batch_size, max_rows_per_user)
    sampler: PrivateBatchSampler
    if sampling == "shuffled":
        assert isinstance(loader.batch_sampler, BatchSampler)
        sampler = ShuffledBatchSampler(plan, loader.batch_sampler, max_physical_batch_size)
    else:
        sampler = _DRAWING[sampling](plan, stream, max_physical_batch_size)
    return PrivateDataLoader(loader, sampler)


def _check_records(dataset: Any, max_rows_per_user: int | None) -> None:
    """Refuse a dataset that says of its items, as ``UserDataset`` does, that they are other records than asked for."""
    said = getattr(dataset, "max_rows_per_user", None)
    if said is not None and said != max_rows_per_user:
        raise ValueError(
            f"each item of {type(dataset).__name__} is a user with at most {said} rows, and max_rows_per_user="
            f"{max_rows_per_user!r}: pass max_rows_per_user={said}"
        )


def _check(loader: DataLoader[Any], drawn: bool) -> tuple[float, int]:
    """Return (expected batch size, batches per pass) of a loader whose sampling can be accounted."""
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError("an IterableDataset cannot be Poisson sampled: use a map-style dataset (with __len__)")
    records = len(loader.dataset)  # type: ignore[arg-type]
    if records < 1:
        raise ValueError("the dataset has no records")
    sampler = loader.batch_sampler
    if drawn and isinstance(sampler, PoissonBatchSampler | UniformWithReplacementSampler):
        return sampler.sample_rate * records, len(sampler)
    if type(sampler) is not BatchSampler:
        raise ValueError(
            f"no sampling bound is known for the batch sampler {type(sampler).__name__}: pass a DataLoader with "
            "batch_size=... (and shuffle=True or False)"
        )
    order = sampler.sampler
    known = type(order) is SequentialSampler or (type(order) is RandomSampler and not order.replacement)
    whole_pass = type(order) is not RandomSampler or order.num_samples <= records
    if not (known and whole_pass):
        raise ValueError(
            f"no sampling bound is known for the sampler {type(order).__name__}: records drawn with weights or with "
            "replacement are not Poisson sampled. Pass a DataLoader with shuffle=True or False"
        )
    if drawn and sampler.batch_size > records:
        raise ValueError(
            f"batch_size {sampler.batch_size} exceeds the number of records {records}: the sample rate would exceed 1"
        )
    return min(float(sampler.batch_size), float(records)), len(loader)
