"""Reducers: how the sums of the ranks become one sum with one noise.

The optimizer has one of them and does the same step with each. One place holds what they must not get wrong: every
coordinate of the sum gets its noise exactly once, after the records of all ranks were added, from a stream that no
other rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from opacus_ac.distributed.group import Floats, Group, Ints, initialized

T = TypeVar("T")

BUCKET = 1 << 25
"""Values that are exchanged at a time, at least: 128 MiB in float32."""


class Noise(Protocol):
    """What a reducer needs of the mechanism, for one release."""

    def gradients(self, sums: Iterable[Tensor | None]) -> None:
        """Write the noised and scaled sums, one per parameter, into the gradients."""

    def in_place(self, totals: Sequence[Tensor]) -> None:
        """Set sums to (sum + noise) times the public scale."""


class Source(Protocol):
    """What a reducer needs of a source of gradients."""

    def sums(self, place: Callable[[nn.Parameter], Tensor | None] | None = None) -> Iterable[Tensor | None]:
        """Give the summed gradients of this rank, one per parameter; None is zero."""

    def settle(self) -> None:
        """Keep the sums and let go of the physical batch."""


class Reducer(Protocol):
    """What the optimizer needs of a set of processes.

    Attributes:
        name: "local", "ddp", "fsdp2" or "hsdp".
        rank: number of this process.
        world: number of processes.
    """

    name: str
    rank: int
    world: int

    def sync_module(self, module: nn.Module) -> None:
        """Give every rank the same parameters and buffers, once."""

    def settle(self, source: Source) -> None:
        """Take in the sums of a physical batch that another one of the same logical batch follows."""

    def release(self, source: Source, noise: Noise) -> None:
        """Write the noised sum over all ranks and physical batches into each parameter's ``grad``."""

    def clear(self) -> None:
        """Forget the sums of the logical batch."""

    def refresh(self) -> None:
        """Let the model see weights that were changed between two passes."""

    def gather(self, row: Ints) -> Ints:
        """Return the rows ``[n]`` of all ranks, ``[world, n]``, on every rank."""

    def agree(self, values: Floats) -> Floats:
        """Return the values ``[n]`` of rank 0, to the last bit."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the plain values of all ranks, on every rank."""

    def on_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its result, or raise its error, on all ranks."""


class LocalReducer:
    """One process: nothing to reduce."""

    name = "local"
    rank, world = 0, 1

    def sync_module(self, module: nn.Module) -> None:
        """Nothing to do."""

    def settle(self, source: Source) -> None:
        """Let the source keep its sums."""
        source.settle()

    def release(self, source: Source, noise: Noise) -> None:
        """Let the mechanism noise the sums."""
        noise.gradients(source.sums())

    def clear(self) -> None:
        """Nothing to do: the source keeps the sums."""

    def refresh(self) -> None:
        """Nothing to do: the model has the weights themselves."""

    def gather(self, row: Ints) -> Ints:
        """Return the only row."""
        return row[None]

    def agree(self, values: Floats) -> Floats:
        """Return the values."""
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the only value."""
        return [value]

    def on_first(self, work: Callable[[], T]) -> T:
        """Run ``work``."""
        return work()


def buckets(parameters: Sequence[nn.Parameter], size: int = BUCKET) -> Iterator[list[nn.Parameter]]:
    """Divide parameters, in their order, into stretches of one dtype and device.

    A stretch has at least ``size`` values, if there are as many.
    """
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (parameter.dtype, parameter.device)
        if bucket and (not alike or sum(p.numel() for p in bucket) >= size):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def sum_with_noise(flat: Tensor, group: Group, noise: Noise) -> None:
    """Replace ``flat`` ``[n]`` by its noised sum over a group, the same to the last bit on all of its ranks.

    Every rank reduces and noises one stretch: a coordinate gets its noise once, in float64, after the sum.
    """
    part = -(-flat.numel() // group.world)
    padded = flat if part * group.world == flat.numel() else flat.new_zeros(part * group.world)
    if padded is not flat:
        padded[: flat.numel()] = flat
    mine = group.reduce_scatter(padded)
    noise.in_place([mine])  # that of the padding is thrown away
    group.all_gather(mine, padded)
    if padded is not flat:
        flat.copy_(padded[: flat.numel()])


class GroupReducer:
    """What the reducers of several processes share: the small exchanges.

    Args:
        group: all processes.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.world = group.rank, group.world
        self.gather, self.agree = group.gather, group.agree
        self.gather_objects = group.gather_objects

    def on_first(self, work: Callable[[], T]) -> T:
        """Run ``work`` on rank 0 and return its result, or raise its error, on all ranks."""
        return self.group.on_first(work)


class ReplicatedReducer(GroupReducer):
    """Every rank has the whole model ("DDP" without its wrapper, whose hooks would see no gradient to reduce).

    Args:
        parameters: the trained parameters.
        group: all processes.
        bucket: values that are exchanged at a time, at least.

    Guarantees:
        Rank r adds the noise of the r-th stretch of each bucket to the sum over all ranks, from its own stream, and
        sends the result to the others. Noise is added once per coordinate, and gradients are the same to the last bit.
    """

    name = "ddp"

    def __init__(self, parameters: Iterable[nn.Parameter], group: Group, bucket: int = BUCKET) -> None:
        super().__init__(group)
        self._buckets = list(buckets(list(parameters), bucket))
        self._where: dict[int, tuple[int, int]] = {}  # number of the bucket, and first value in it
        for number, held in enumerate(self._buckets):
            first = 0
            for parameter in held:
                self._where[id(parameter)] = number, first
                first += parameter.numel()

    def of(self, parameters: Iterable[nn.Parameter]) -> ReplicatedReducer:
        """Return a reducer of the same processes for other parameters, which are on the device of the exchanges."""
        return ReplicatedReducer(parameters, self.group)

    def sync_module(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.group.broadcast(tensor)

    def settle(self, source: Source) -> None:
        """Let the source keep its sums: ranks exchange them once per step."""
        source.settle()

    def release(self, source: Source, noise: Noise) -> None:
        """Write the noised sums into the gradients, which are views of the buckets."""
        flats: dict[int, Tensor] = {}

        def place(parameter: nn.Parameter) -> Tensor:
            number, first = self._where[id(parameter)]
            if number not in flats:
                flats[number] = self._memory(number)
            return flats[number][first : first + parameter.numel()].view(parameter.shape)

        sums = iter(source.sums(place))
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket:
                total, own = next(sums), place(parameter)
                if total is None:
                    own.zero_()
                elif total.data_ptr() != own.data_ptr():
                    own.copy_(total.view_as(own))
                parameter.grad = own
            sum_with_noise(flats.pop(number), self.group, noise)
        next(sums, None)  # the source learns that all were taken

    def _memory(self, number: int) -> Tensor:
        """Return memory for the gradients of a bucket, padded so that the ranks can share it evenly."""
        bucket = self._buckets[number]
        size = sum(p.numel() for p in bucket)
        return torch.zeros(-(-size // self.world) * self.world, dtype=bucket[0].dtype, device=bucket[0].device)

    def clear(self) -> None:
        """Nothing to do: the source keeps the sums."""

    def refresh(self) -> None:
        """Nothing to do: the model has the weights themselves."""


class AloneReducer(LocalReducer):
    """One process, because there was no other when it began: it stops once there are others."""

    def on_first(self, work: Callable[[], T]) -> T:
        """Run ``work``, of which every charge is one.

        Raises:
            ValueError: If the process has been joined with others since: they have the same records and own accounts.
        """
        if initialized():
            raise ValueError(
                "torch.distributed has joined this process with others since make_private, which took it for the only "
                "one: each would spend a budget of its own on the same records. Call init_process_group before "
                "make_private; or pass reducer='local' where the processes are runs of their own on different people's "
                "data"
            )
        return work()


LOCAL, ALONE = LocalReducer(), AloneReducer()
