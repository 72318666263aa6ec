"""Which draw a batch in hand came from: delivery ties a step to a draw, not the announcement.

A sampler announces index lists, perhaps long before the batch is there (workers, prefetching loaders). A batch is
*delivered* when it reaches the loop. It is recognised there, in the model's forward pass, by the memory of its tensors
and by their content, so that a batch that is kept and used again is known as such, whatever the loader and however many
batches have the same size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_SAMPLED = 4096
"""Values of a tensor that its content is known by, at most."""

_REMEMBERED = 1 << 16
"""Tensors of past batches that are recognised, at most."""

_PLACES = 256
"""Stretches of one memory that are told apart, at most: a dataset may hand out views of one large tensor."""


@dataclass(frozen=True)
class Draw:
    """How a physical batch came about.

    Attributes:
        batch: number of the logical batch that it belongs to.
        sample_rate: probability with which each record was drawn; 1 where no amplification by sampling holds.
        expected_batch_size: public denominator of the logical batch.
        records: number of records in this physical batch; private. 0 marks the stand-in of an empty batch.
        last: whether this is the last physical batch of its logical batch.
        pass_index: pass over the data that it belongs to.
        step_in_pass: number of the logical batch within that pass.
        selection: hash of all records of the logical batch, of all processes; private.
        part: number of the physical batch within its logical batch, from 0.
    """

    batch: int
    sample_rate: float
    expected_batch_size: float
    records: int
    last: bool
    pass_index: int
    step_in_pass: int
    selection: int = 0
    part: int = 0


@dataclass(eq=False)
class Delivery:
    """A physical batch that has reached the loop.

    Attributes:
        draw: the draw that it is, or is a part of.
        used: whether a step has been charged for it, or its records are in the sums of an open logical batch.
        split: whether another loader made it, a part of a logical batch.
        owner: the plan whose draw it is.
        contents: what the content of its tensors is known by.
    """

    draw: Draw
    used: bool = False
    split: bool = False
    owner: Any = None
    contents: set[bytes] = field(default_factory=set)


@dataclass(eq=False)
class Sight:
    """What a forward pass of the model was seen to run on.

    Attributes:
        delivery: the delivery that the batch is; None for a batch of unknown origin.
        repeats: whether two rows of a batch of unknown origin have the same content.
        is_part: whether it is one of several physical batches that a logical batch of another run or pass was cut into.
        contents: what a batch of unknown origin is known by.
        confirmed: whether a backward pass has come back to its output.
        is_older: whether gradients were cleared since.
    """

    delivery: Delivery | None
    repeats: bool = False
    is_part: bool = False
    contents: frozenset[bytes] = frozenset()
    confirmed: bool = False
    is_older: bool = False

    def confirm(self) -> None:
        """Note that a backward pass has come back."""
        self.confirmed = True

    def same(self, other: Sight) -> bool:
        """Whether both are of the same batch; of unknown ones that have nothing to tell them apart, one never is."""
        if self.delivery is not None or other.delivery is not None:
            return self.delivery is other.delivery
        return bool(self.contents) and self.contents == other.contents


def unknown(tensors: list[Tensor]) -> Sight:
    """Return the sight of a batch of unknown origin."""
    contents = frozenset(content for content in map(content_of, tensors) if content is not None)
    return Sight(None, rows_repeat(tensors), contents=contents)


def tensors_of(batch: Any, depth: int = 6) -> Iterator[Tensor]:
    """Yield the tensors in a batch: in containers, dataclasses and plain objects that hold some as attributes."""
    if isinstance(batch, Tensor):
        yield batch
        return
    if depth == 0 or batch is None or isinstance(batch, str | bytes | int | float | bool):
        return
    if isinstance(batch, Mapping):
        inner: Any = batch.values()
    elif isinstance(batch, list | tuple | set):
        inner = batch
    elif dataclasses.is_dataclass(batch) or (
        hasattr(batch, "__dict__") and not isinstance(batch, torch.nn.Module | type)
    ):
        inner = vars(batch).values()
    else:
        return
    for value in inner:
        yield from tensors_of(value, depth - 1)


def content_of(tensor: Tensor) -> bytes | None:
    """Return what the content of a tensor is known by; None where it is too plain to tell batches apart.

    That of a large tensor is known by some thousands of its values.
    """
    size = tensor.numel()
    if size < 2 or tensor.is_meta or tensor.layout != torch.strided or tensor.is_complex():
        return None
    step = max(1, size // _SAMPLED)
    while step > 1 and math.gcd(step, tensor.shape[-1]) > 1:  # or one column would stand for all
        step += 1
    flat = tensor.detach().contiguous().view(-1)[::step].cpu().contiguous()
    if bool((flat == flat[0]).all()):
        return None
    known = hashlib.blake2b(repr((tuple(tensor.shape), tensor.dtype)).encode(), digest_size=16)
    known.update(flat.view(torch.uint8).numpy().tobytes())
    return known.digest()


class _Memory:
    """Remembers to which delivery a stretch of memory belonged when it was last written to."""

    def __init__(self) -> None:
        # A weak reference keeps the address of a storage from being used again, not its memory.
        self._known: OrderedDict[int, tuple[StorageWeakRef, list[tuple[int, int, int, Delivery]]]] = OrderedDict()

    def note(self, tensor: Tensor, delivery: Delivery) -> None:
        """Note that a tensor belongs to a delivery."""
        if not _has_memory(tensor):
            return
        reference = StorageWeakRef(tensor.untyped_storage())
        known = self._known.pop(reference.cdata, None)
        places = [] if known is None or known[0].expired() else known[1]
        first, last = _stretch(tensor)
        places = [place for place in places[-_PLACES:] if place[:2] != (first, last)]
        self._known[reference.cdata] = reference, [*places, (first, last, _version(tensor), delivery)]
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def owner(self, tensor: Tensor) -> Delivery | None:
        """Return the delivery that a tensor or a view belongs to; None if it was written to since or never noted."""
        known = self._known.get(StorageWeakRef(tensor.untyped_storage()).cdata) if _has_memory(tensor) else None
        if known is None or known[0].expired():
            return None
        first, _ = _stretch(tensor)
        for start, end, version, delivery in reversed(known[1]):
            if start <= first <= end:
                return delivery if version == _version(tensor) else None
        return None


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and tensor.numel() > 0


def _stretch(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the last address of a tensor."""
    length = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Recognition:
    """Tells which delivered batch goes into the model."""

    def __init__(self) -> None:
        self._delivered, self._followed = _Memory(), _Memory()
        self._content: OrderedDict[bytes, Delivery] = OrderedDict()

    def remember(self, delivery: Delivery, batch: Any) -> None:
        """Note the tensors of a batch that is being delivered."""
        for tensor in tensors_of(batch):
            self._delivered.note(tensor, delivery)
            content = content_of(tensor)
            if content is not None:
                delivery.contents.add(content)
                self._content[content] = delivery
                self._content.move_to_end(content)
        while len(self._content) > _REMEMBERED:
            self._content.popitem(last=False)

    def follow(self, delivery: Delivery, tensors: list[Tensor]) -> None:
        """Note tensors that were made of a delivered batch, such as its copy on a device."""
        for tensor in tensors:
            self._followed.note(tensor, delivery)

    def find(self, tensors: list[Tensor], current: Delivery | None) -> tuple[Delivery | None, bool]:
        """Return the delivery that tensors belong to, and whether anything tells.

        The memory of delivered tensors counts most, then their content, of which a large tensor counts more than a
        small one (a mask or a list of lengths is easily that of another batch too), then the memory of what was made of
        them.

        Args:
            tensors: what goes into the model.
            current: the delivery that is preferred to others that have the same content.

        Returns:
            The delivery; None with True for tensors of several deliveries, None with False where nothing is known.
        """
        in_memory = _distinct(self._delivered.owner(t) for t in tensors)
        if not in_memory:
            in_memory = self._by_content(tensors, current)
        if not in_memory:
            # Tensors that are passed at every step, whatever the batch, tell nothing: all have to be known.
            followed = [self._followed.owner(t) for t in tensors if _has_memory(t)]
            in_memory = [] if None in followed else _distinct(followed)
        return (in_memory[0] if len(in_memory) == 1 else None), bool(in_memory)

    def _by_content(self, tensors: list[Tensor], current: Delivery | None) -> list[Delivery]:
        found: list[tuple[int, Delivery]] = []
        for tensor in tensors:
            content = content_of(tensor)
            if content is None:
                continue
            known = current if current is not None and content in current.contents else self._content.get(content)
            if known is not None:
                found.append((tensor.numel() * tensor.element_size(), known))
        largest = max((size for size, _ in found), default=0)
        deliveries = _distinct(delivery for size, delivery in found if size == largest)
        # Of two that fit equally well the one that is not in hand tells more.
        return [d for d in deliveries if d is not current] if len(deliveries) > 1 else deliveries


RECOGNITION = Recognition()
"""That of the process: a batch that one loader has handed out is known to the optimizer of another one."""


def _distinct(deliveries: Iterable[Delivery | None]) -> list[Delivery]:
    return list({id(d): d for d in deliveries if d is not None}.values())


def rows_repeat(tensors: list[Tensor]) -> bool:
    """Whether two rows of a batch have the same content in all tensors that have a row for each."""
    sizes = [t.shape[0] for t in tensors if t.dim() > 0]
    rows = max(set(sizes), key=sizes.count, default=0)
    if rows < 2:
        return False
    parts = [
        t.detach().cpu().contiguous().view(rows, -1)
        for t in tensors
        if t.dim() > 0 and t.shape[0] == rows and t.numel()
    ]
    seen = {b"|".join(part[i].contiguous().view(torch.uint8).numpy().tobytes() for part in parts) for i in range(rows)}
    return len(seen) < rows
