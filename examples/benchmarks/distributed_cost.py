"""What a private step costs on several processes: bytes sent, small messages, and memory; by counting, not by timing.

python examples/benchmarks/distributed_cost.py          # the tables of docs/distributed.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from opacus_ac.distributed.reducers import BUCKET

_NUMBER = 4  # bytes of float32: trained weights, sums, optimizer and average
_COEFFICIENT = 8  # bytes of float64: the released numbers of a zeroth-order step
_ROLES = ("ddp", "fsdp2", "hsdp", "zo")

SMALL_MESSAGES = 5
"""Collectives of a few hundred bytes in each step: counts and constants; the outcome of the charge (its length, then itself); the
noisy statistics; C and learning rate."""


@dataclass(frozen=True)
class StepCost:
    """Bytes that one rank sends in one step, by ring algorithms.

    Attributes:
        gathered: shards of weights, for forward and backward passes (as in ordinary FSDP2 training).
        reduced: sums of clipped gradients.
        returned: noised sums, from the rank that noised them to those that have the same weights.
        messages: number of small collectives beside them.
    """

    gathered: float
    reduced: float
    returned: float
    messages: int = SMALL_MESSAGES

    @property
    def total(self) -> float:
        """All bytes, without the small messages."""
        return self.gathered + self.reduced + self.returned


def step_cost(
    role: str,
    *,
    world: int,
    trained: int,
    total: int | None = None,
    root: int = 0,
    physical_batches: int = 1,
    replicas: int = 1,
    weight_bytes: int = 4,
    backend: str = "nccl",
) -> StepCost:
    """Return what a rank sends in one step.

    Args:
        role: "ddp", "fsdp2" or "hsdp"; "zo" for ``zeroth_order=``.
        world: number of processes.
        trained: number of trained weights; of "zo" the number K of directions, whatever the model.
        total: number of all weights; by default the trained ones.
        root: weights of the outermost ``fully_shard`` unit, which stay gathered between forward and backward pass.
        physical_batches: forward and backward passes of a step.
        replicas: number of copies of the model, of "hsdp".
        weight_bytes: bytes of a weight as it is gathered: 2 in bfloat16.
        backend: "nccl", or "gloo", whose reduce-scatter is an all-reduce and sends twice as much.

    Raises:
        ValueError: an unknown role, or replicas that do not divide the processes.

    >>> cost = step_cost("ddp", world=8, trained=494_000_000)
    >>> f"{cost.total / 2**30:.2f} GiB"
    '3.22 GiB'
    >>> step_cost("zo", world=8, trained=64).total
    896.0
    """
    if role not in _ROLES:
        raise ValueError(f"role {role!r} has no cost model: choose one of {', '.join(map(repr, _ROLES))}")
    if world % replicas or (role != "hsdp") != (replicas == 1):
        raise ValueError(f"replicas={replicas} does not go with role {role!r} on {world} processes")
    reduce = 2 if backend == "gloo" else 1
    if role in ("ddp", "zo"):
        sums = _others(world) * trained * (_NUMBER if role == "ddp" else _COEFFICIENT)
        return StepCost(0.0, reduce * sums, sums)
    shards = world // replicas
    everything = trained if total is None else total
    gathers = 2 * (everything - root) + root
    gathered = physical_batches * _others(shards) * gathers * weight_bytes
    reduced = reduce * physical_batches * _others(shards) * trained * _NUMBER
    between = _others(replicas) * trained * _NUMBER / shards
    return StepCost(gathered, reduced + reduce * between, between)


def _others(ranks: int) -> float:
    """Return the share of a tensor that is on, or goes to, the other ranks."""
    return (ranks - 1) / ranks


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, for :func:`memory_per_rank`; all weights are trained.

    Attributes:
        hidden: width of the residual stream.
        layers: number of blocks.
        intermediate: width inside of the feed-forward part, which has three matrices.
        vocabulary: number of tokens.
        key_value: width of keys, and of values.
        tied: whether input and output embeddings are one.
    """

    hidden: int
    layers: int
    intermediate: int
    vocabulary: int
    key_value: int
    tied: bool

    @property
    def block(self) -> int:
        """Weights of one block."""
        attention = 2 * self.hidden * (self.hidden + self.key_value)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def root(self) -> int:
        """Weights outside of the blocks."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def total(self) -> int:
        """All weights."""
        return self.layers * self.block + self.root

    @property
    def kept(self) -> int:
        """Numbers that mode "bk" keeps of one token until the step: the gradient at the output of each matrix and embedding.

        The inputs are kept by ordinary training too.
        """
        block = 3 * self.hidden + 2 * self.key_value + 2 * self.intermediate
        return self.layers * block + self.vocabulary + self.hidden


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the end of a backward pass, beside ordinary activations.

    Attributes:
        weights: weights that the rank has all the time.
        gathered: weights that it has for a while: the root unit and two blocks.
        training: gradient, two moments of Adam, and average of the weights.
        exchange: sums that are on their way: a bucket, and the largest parameter.
        records: gradients at the outputs of layers, kept for the clipped sums.
    """

    weights: float
    gathered: float
    training: float
    exchange: float
    records: float

    @property
    def total(self) -> float:
        """All bytes."""
        return self.weights + self.gathered + self.training + self.exchange + self.records


def memory_per_rank(
    role: str,
    shape: ModelShape,
    *,
    world: int,
    batch: int,
    length: int,
    replicas: int = 1,
    weight_bytes: int = 2,
    ema: bool = True,
) -> Memory:
    """Return the memory of a rank for full fine-tuning with AdamW.

    Args:
        role: "ddp", "fsdp2" or "hsdp".
        shape: the model.
        world: number of processes.
        batch: records of a physical batch, on one rank.
        length: tokens of a record.
        replicas: number of copies of the model, of "hsdp".
        weight_bytes: bytes of a number in the passes: 2 in bfloat16, for gathered weights and what is kept of records.
        ema: whether there is a weight average.
    """
    shards = 1 if role == "ddp" else world // replicas
    own = shape.total * _NUMBER / shards
    gathered = 0 if role == "ddp" else (shape.root + 2 * shape.block) * weight_bytes
    largest = shape.vocabulary * shape.hidden
    exchange = 0 if role == "ddp" else (max(BUCKET, largest) + largest) * _NUMBER
    records = batch * length * shape.kept * weight_bytes
    return Memory(own, gathered, own * (4 if ema else 3), exchange, records)


SHAPES = {
    "0.5B": ModelShape(896, 24, 4864, 151936, 128, True),
    "2B": ModelShape(2560, 30, 6912, 128256, 640, True),
    "8B": ModelShape(4096, 32, 14336, 128256, 1024, False),
}
"""Sizes of Qwen2.5-0.5B, BitNet b1.58 2B4T and Llama 3 8B, without biases and inner norms."""


def sent_row(name: str, role: str, world: int) -> list[float]:
    """Return GiB that a rank sends in a step: gathers of weights, sums, noised sums, all."""
    shape = SHAPES[name]
    cost = step_cost(role, world=world, trained=shape.total, root=shape.root, weight_bytes=2)
    return [value / 2**30 for value in (cost.gathered, cost.reduced, cost.returned, cost.total)]


def memory_row(name: str, role: str, world: int) -> list[float]:
    """Return GiB on a rank for 4 records of 512 tokens: weights, gathered, training, exchange, records, all."""
    m = memory_per_rank(role, SHAPES[name], world=world, batch=4, length=512)
    return [value / 2**30 for value in (m.weights, m.gathered, m.training, m.exchange, m.records, m.total)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables in Markdown."""
    parser = argparse.ArgumentParser(description="Bytes sent and memory of a private step on several processes.")
    parser.add_argument("--world", type=int, default=8, help="number of processes")
    world = parser.parse_args(argv).world
    for title, row in (("bytes sent, GiB", sent_row), ("memory, GiB", memory_row)):
        print(f"\n{title}\n")
        for name in SHAPES:
            for role in ("ddp", "fsdp2"):
                print(f"| {name} | {role} | {world} | {' | '.join(f'{v:.1f}' for v in row(name, role, world))} |")


if __name__ == "__main__":
    main()
