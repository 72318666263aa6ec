"""Batch samplers, one for each kind of sampling."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import BatchSampler

from opacus_ac.noise.streams import RandomStream
from opacus_ac.sampling.passes import Pass
from opacus_ac.sampling.plan import SamplingPlan

_UNIFORMS = 2.0**53
"""Number of values that a uniform float64 draw can take."""


def _digest(indices: list[int]) -> int:
    """Return a hash of a logical batch, as a signed 64-bit integer."""
    data = np.asarray(indices, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class PrivateBatchSampler(BatchSampler):
    """Yields the indices of physical batches, and announces each batch to the plan.

    It is a ``BatchSampler`` for loaders around it, which ask for its ``batch_size``: Opacus's ``BatchMemoryManager``
    computes its length from it. Nothing else of ``BatchSampler`` is used.

    Args:
        plan: sampling plan.
        max_physical_batch_size: largest physical batch; None to leave logical batches whole.

    Attributes:
        rank: number of this process. It takes the records ``rank, rank + world, ...`` of each logical batch.
        world: number of processes.

    Raises:
        ValueError: If ``max_physical_batch_size`` is below 1.
    """

    def __init__(self, plan: SamplingPlan, max_physical_batch_size: int | None = None) -> None:  # no super().__init__
        if max_physical_batch_size is not None and max_physical_batch_size < 1:
            raise ValueError(f"max_physical_batch_size must be at least 1, got {max_physical_batch_size!r}")
        self.plan = plan
        self.max_physical_batch_size = max_physical_batch_size
        self.rank, self.world = 0, 1
        self.sampler, self.drop_last = range(plan.sizes.dataset_size), False

    @property
    def batch_size(self) -> float:  # type: ignore[override]
        """Expected size of the next logical batch."""
        return self.plan.sizes.expected(self.plan.step)

    def __len__(self) -> int:
        """Return the number of logical batches of a pass."""
        return self.plan.steps_per_pass

    def __iter__(self) -> Iterator[list[int]]:
        limit = self.max_physical_batch_size
        if not self.plan.own_loader and (limit is not None or self.plan.sizes.varies):
            raise ValueError(
                "BatchMemoryManager cannot split this loader again: it already splits batches or follows a "
                "batch_size_schedule. Iterate over the loader itself and set max_physical_batch_size in make_private"
            )
        return self._announced(self.plan.begin_pass())

    def _announced(self, passing: Pass) -> Iterator[list[int]]:
        """Announce and yield the physical batches of a pass."""
        try:
            for step, (expected, indices) in enumerate(self._logical_batches(self.plan.step)):
                chunks = self._physical_batches(indices)
                selection = _digest(indices) if self.world > 1 else 0
                self.plan.emit(passing, step, expected, [len(chunk) for chunk in chunks], selection)
                yield from chunks
        finally:
            passing.ended = True

    def _physical_batches(self, indices: list[int]) -> list[list[int]]:
        """Return the physical batches of this process. Each process has equally many, and the last may be empty.

        All processes draw the same logical batch and take its records in turn, so they need no communication.
        """
        most = -(-len(indices) // self.world)  # the records of rank 0; no rank has more
        size = self.max_physical_batch_size or max(most, 1)
        mine = indices[self.rank :: self.world]
        return [mine[i : i + size] for i in range(0, max(most, 1), size)]

    def _logical_batches(self, start: int) -> Iterator[tuple[float, list[int]]]:
        """Yield (expected batch size, indices) for the logical batches of a pass that begins at step ``start``."""
        raise NotImplementedError


class PoissonBatchSampler(PrivateBatchSampler):
    """Draws every record independently, with the sampling rate of the step as probability.

    Guarantees:
        The probability is the accounted rate, rounded down to a multiple of 2^-53. It is never above that rate.
    """

    def __init__(self, plan: SamplingPlan, stream: RandomStream, max_physical_batch_size: int | None = None) -> None:
        super().__init__(plan, max_physical_batch_size)
        self.stream = stream
        self.records = plan.sizes.dataset_size
        """Number of records of the dataset. It is private if it differs from the public N of the plan."""

    @property
    def sample_rate(self) -> float:
        """Sampling rate of the next step."""
        return self.plan.sizes.rate(self.plan.step)

    def _logical_batches(self, start: int) -> Iterator[tuple[float, list[int]]]:
        for step in range(self.plan.steps_per_pass):
            expected = self.plan.sizes.expected(start + step)
            yield expected, self._draw(expected / self.plan.sizes.dataset_size)

    def _draw(self, rate: float) -> list[int]:
        """Return the indices of one logical batch."""
        uniform = self.stream.uniform(self.records)
        drawn = uniform < math.floor(rate * _UNIFORMS) / _UNIFORMS
        indices: list[int] = drawn.nonzero().reshape(-1).tolist()
        return indices


class TruncatedPoissonBatchSampler(PoissonBatchSampler):
    """Poisson batches of at most ``plan.max_batch_size`` records; a random subset is kept if more were drawn."""

    def _draw(self, rate: float) -> list[int]:
        uniform = self.stream.uniform(self.plan.sizes.dataset_size)
        drawn = (uniform < math.floor(rate * _UNIFORMS) / _UNIFORMS).nonzero().reshape(-1)
        assert self.plan.max_batch_size is not None
        # The numbers below the rate are uniform among themselves, so the smallest belong to a random subset.
        kept = drawn[uniform[drawn].argsort()[: self.plan.max_batch_size]]
        return sorted(int(i) for i in kept)


class FixedSizeBatchSampler(PoissonBatchSampler):
    """Draws exactly B of the N records without replacement, independently for each step."""

    def _draw(self, rate: float) -> list[int]:
        size = round(rate * self.plan.sizes.dataset_size)
        uniform = self.stream.uniform(self.plan.sizes.dataset_size)
        return sorted(int(i) for i in uniform.argsort()[:size])


class ShuffledBatchSampler(PrivateBatchSampler):
    """Yields the batches of an ordinary batch sampler, which visits each record at most once per pass."""

    def __init__(self, plan: SamplingPlan, batches: BatchSampler, max_physical_batch_size: int | None = None) -> None:
        super().__init__(plan, max_physical_batch_size)
        self.batches = batches

    def _logical_batches(self, start: int) -> Iterator[tuple[float, list[int]]]:
        for indices in self.batches:
            yield self.plan.sizes.expected(start), indices
