"""The private data loader: random batches, their physical batches, and a stand-in for the empty batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from opacus_ac.noise.secret_state import secret_randomness
from opacus_ac.noise.streams import RandomStream
from opacus_ac.sampling.collate import ArrivingCollate, EmptySafeCollate
from opacus_ac.sampling.fixed_length import length_is_fixed
from opacus_ac.sampling.passes import Pass
from opacus_ac.sampling.plan import BatchSizes, RateSchedule, SamplingPlan
from opacus_ac.sampling.public_randomness import carried_generator
from opacus_ac.sampling.samplers import (
    FixedSizeBatchSampler,
    PoissonBatchSampler,
    PrivateBatchSampler,
    ShuffledBatchSampler,
    TruncatedPoissonBatchSampler,
)
from opacus_ac.sampling.users import UserRows, check_rows_of_users

_DRAWING: dict[str, type[PoissonBatchSampler]] = {
    "poisson": PoissonBatchSampler,
    "truncated_poisson": TruncatedPoissonBatchSampler,
    "fixed_size": FixedSizeBatchSampler,
}


class _SecretWorker:
    """Gives secret states to the global generators of a worker. torch derives their seeds from a public seed."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None) -> None:
        inner = worker_init_fn.worker_init_fn if isinstance(worker_init_fn, _SecretWorker) else worker_init_fn
        self.worker_init_fn: Callable[[int], None] | None = inner
        self._secret: AbstractContextManager[None] | None = None

    def __call__(self, worker: int) -> None:
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker)
        self._secret = secret_randomness()  # for as long as the worker lives
        self._secret.__enter__()


class PrivateDataLoader(DataLoader[Any]):
    """A ``DataLoader`` of random batches. ``make_private`` builds it, and it is used like any other loader.

    ``len(loader)`` is the number of logical batches of a pass. With ``max_physical_batch_size`` a logical batch comes
    as several batches in a row, and the optimizer takes one step after the last of them.

    Attributes:
        users: counts the users of the current batch, where a record is a user; None otherwise.
    """

    _is_accelerate_prepared = True
    """Makes ``accelerate`` use the loader as it is. Its own loader would fetch a batch ahead, and join batches."""

    def __init__(self, template: DataLoader[Any], batch_sampler: PrivateBatchSampler) -> None:
        collate = template._collate.collate_fn if isinstance(template, PrivateDataLoader) else template.collate_fn
        self._collate: EmptySafeCollate = EmptySafeCollate(collate, template.dataset)
        super().__init__(
            dataset=template.dataset,
            batch_sampler=batch_sampler,
            collate_fn=ArrivingCollate(self._collate, batch_sampler.plan),
            num_workers=template.num_workers,
            pin_memory=template.pin_memory,
            timeout=template.timeout,
            worker_init_fn=_SecretWorker(template.worker_init_fn),
            multiprocessing_context=template.multiprocessing_context,
            prefetch_factor=template.prefetch_factor,
            persistent_workers=template.persistent_workers,
        )
        self.plan = batch_sampler.plan
        self.plan.length_is_fixed = cache(partial(length_is_fixed, template.dataset, collate, self._collate.first_row))
        limit = self.plan.max_rows_per_user
        self.users = None if limit is None else UserRows(self.plan, limit)

    def split(self, rank: int, world: int) -> None:
        """Hand out only this process's records of each logical batch. All processes make the same draws."""
        sampler = self.batch_sampler
        assert isinstance(sampler, PrivateBatchSampler)
        sampler.rank, sampler.world = rank, world

    @property
    def sample_rate(self) -> float:
        """Sampling rate of the next step, expected batch size / N."""
        return self.plan.sizes.rate(self.plan.step)

    def __iter__(self) -> Generator[Any, None, None]:  # type: ignore[override]
        passing, batches = self._begin()
        while True:
            try:
                with secret_randomness():  # a dataset may augment at random
                    batch, records = next(batches)
            except StopIteration:
                return
            self.plan.deliver(passing, batch, records)
            if self.users is not None:
                self.users.note(batch)
            yield batch

    def _begin(self) -> tuple[Pass, Iterator[Any]]:
        """Start a pass. This loader delivers its batches itself, so its collate function does not tell the plan."""
        shown, self.collate_fn, self.plan.own_loader = self.collate_fn, self._collate, True
        try:
            batches = super().__iter__()
            return self.plan.latest, batches
        finally:
            self.collate_fn, self.plan.own_loader = shown, False


class LogicalBatches:
    """The logical batches of a private loader, for loops that take one optimizer step per item.

    Each item is an iterator of pairs: a physical batch, and whether it is the last one of its logical batch. Call
    ``optimizer.step()`` for each physical batch before you take the next one.

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
            self._open.close()  # an interrupted pass must not close this one later
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
        loader: loader over a map-style dataset: sequential, shuffled, or with Poisson batches.
        sampling: how batches are drawn. "poisson": each record with probability batch_size / N. "truncated_poisson":
            the same, but at most ``max_batch_size`` records. "fixed_size": batch_size of the N records, without
            replacement. "shuffled": the loader's own batches.
        stream: random stream of the draws.
        max_physical_batch_size: largest batch that reaches the model.
        schedule: expected batch size of each step (not for "shuffled").
        max_batch_size: largest logical batch, for "truncated_poisson".
        dataset_size: public number of records N, for the sampling rate and the length of a pass; by default the number
            of records. Another number is possible for "poisson" only.
        max_rows_per_user: largest number of rows of a user, if an item of the dataset is a user; None if it is a row.

    Raises:
        ValueError: If no privacy bound is known for the dataset or sampler, or if the items are not the records that
            ``max_rows_per_user`` says.
    """
    _check_records(loader.dataset, max_rows_per_user)
    _check_collate(loader, max_rows_per_user)
    batch_size, steps = _check(loader, drawn=sampling != "shuffled")
    records = len(loader.dataset)  # type: ignore[arg-type]
    if dataset_size is not None and dataset_size != records:
        if sampling != "poisson":
            raise ValueError(
                f"dataset_size={dataset_size} is not the number of records, which sampling={sampling!r} needs: leave "
                "it "
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
    """Refuse a dataset that has another ``max_rows_per_user`` than asked for, as ``UserDataset`` may have."""
    said = getattr(dataset, "max_rows_per_user", None)
    if said is not None and said != max_rows_per_user:
        raise ValueError(
            f"each item of {type(dataset).__name__} is a user with at most {said} rows, and max_rows_per_user="
            f"{max_rows_per_user!r}: pass max_rows_per_user={said}"
        )


def _check_collate(loader: DataLoader[Any], max_rows_per_user: int | None) -> None:
    """Refuse a ``collate_fn`` whose random draws are public, or that mixes the rows of users."""
    collate = loader._collate.collate_fn if isinstance(loader, PrivateDataLoader) else loader.collate_fn
    carried = carried_generator(collate)
    if carried is not None:
        raise ValueError(
            f"collate_fn has a generator of its own ({carried}), whose draws for a batch tell how many records came "
            "before: leave its seed or generator out, so that it draws from the global generators, which are secret "
            "during a step"
        )
    if max_rows_per_user is not None:
        check_rows_of_users(loader.dataset, collate)


def _why_refused(sampler: Any) -> str:
    """Return why batches are not drawn in the place of a sampler, and what to pass instead."""
    name = type(sampler).__name__
    if type(sampler) is SubsetRandomSampler:
        return (
            f"the sampler {name} chooses a part of the dataset, and batches are drawn from all of it: pass the part "
            "itself, torch.utils.data.Subset(dataset, indices), with shuffle=True"
        )
    if isinstance(sampler, DistributedSampler):
        return (
            f"the sampler {name} gives every process records of its own, and batches are drawn from all records: pass "
            "a DataLoader without it. Under torchrun the processes then share each draw"
        )
    return (
        f"no privacy bound is known for the sampler {name}: records drawn with weights or with replacement are not "
        "Poisson sampled. Pass a DataLoader with shuffle=True or False"
    )


def _check(loader: DataLoader[Any], drawn: bool) -> tuple[float, int]:
    """Return (expected batch size, batches per pass) of a loader whose sampling can be accounted for."""
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError("an IterableDataset cannot be Poisson sampled: use a map-style dataset (with __len__)")
    records = len(loader.dataset)  # type: ignore[arg-type]
    if records < 1:
        raise ValueError("the dataset has no records: pass one with at least one record")
    sampler = loader.batch_sampler
    if drawn and isinstance(sampler, PoissonBatchSampler | UniformWithReplacementSampler):
        return sampler.sample_rate * records, len(sampler)
    if type(sampler) is not BatchSampler:
        raise ValueError(
            f"no privacy bound is known for the batch sampler {type(sampler).__name__}: pass a DataLoader with "
            "batch_size=... (and shuffle=True or False)"
        )
    order = sampler.sampler
    known = type(order) is SequentialSampler or (type(order) is RandomSampler and not order.replacement)
    whole_pass = type(order) is not RandomSampler or order.num_samples <= records
    if not (known and whole_pass):
        raise ValueError(_why_refused(order))
    if drawn and sampler.batch_size > records:
        raise ValueError(
            f"batch_size {sampler.batch_size} exceeds the number of records {records}, so the sample rate would exceed "
            "1: choose a smaller batch_size"
        )
    return min(float(sampler.batch_size), float(records)), len(loader)
