"""Finds out which random draw a batch in the model comes from.

A sampler announces lists of indices, perhaps long before the batch exists (workers, loaders that fetch ahead). A batch
is *delivered* when it reaches the training loop. The model's forward pass recognises it by the memory and the content
of its tensors. So a batch that is kept and used again is recognised, whatever the loader does, and even if many batches
have the same size.
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

from opacus_ac._bytes import raw_bytes

_SAMPLED = 4096
"""Largest number of values of a tensor that are hashed to recognise its content."""

_REMEMBERED = 1 << 16
"""Largest number of tensors of past batches that are remembered."""

_PLACES = 256
"""Largest number of address ranges per storage that are remembered. A dataset may return views of one large tensor."""


@dataclass(frozen=True)
class Draw:
    """How a physical batch was drawn.

    Attributes:
        batch: number of its logical batch.
        sample_rate: probability with which each record was drawn; 1 if sampling does not amplify privacy.
        expected_batch_size: public expected size of the logical batch, by which its gradient sum is divided.
        records: number of records in this physical batch, a private value. 0 marks the stand-in of an empty batch.
        last: whether this is the last physical batch of its logical batch.
        pass_index: number of its pass over the data.
        step_in_pass: number of the logical batch within that pass.
        selection: hash of the records of the logical batch, over all processes; a private value.
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
    """A physical batch that has reached the training loop.

    Attributes:
        draw: the draw that it belongs to.
        used: whether a step has been charged for it, or its records are in the sums of an open logical batch.
        split: whether another loader has split it off a logical batch.
        owner: the plan of the draw.
        contents: hashes of the content of its tensors.
    """

    draw: Draw
    used: bool = False
    split: bool = False
    owner: Any = None
    contents: set[bytes] = field(default_factory=set)


@dataclass(eq=False)
class Sight:
    """The batch of a forward pass of the model, as far as it was recognised.

    Attributes:
        delivery: the delivery of the batch; None for a batch of unknown origin.
        repeats: whether two rows of a batch of unknown origin have the same content.
        is_part: whether it is one of several physical batches of a logical batch of another run or pass.
        contents: hashes of the content of a batch of unknown origin.
        confirmed: whether a backward pass has reached the output of the forward pass.
        is_older: whether gradients were cleared since.
    """

    delivery: Delivery | None
    repeats: bool = False
    is_part: bool = False
    contents: frozenset[bytes] = frozenset()
    confirmed: bool = False
    is_older: bool = False

    def confirm(self) -> None:
        """Note that a backward pass has reached the output."""
        self.confirmed = True

    def same(self, other: Sight) -> bool:
        """Say whether both are of the same batch. False for unknown batches without any content to compare."""
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
    """Return a hash of the content of a tensor; None if all values are equal, which does not tell batches apart.

    Of a large tensor some thousands of values are hashed.
    """
    size = tensor.numel()
    if size < 2 or tensor.is_meta or tensor.layout != torch.strided or tensor.is_complex():
        return None
    step = max(1, size // _SAMPLED)
    while step > 1 and math.gcd(step, tensor.shape[-1]) > 1:  # otherwise only one column would be hashed
        step += 1
    flat = tensor.detach().contiguous().view(-1)[::step].cpu().contiguous()
    if bool((flat == flat[0]).all()):
        return None
    known = hashlib.blake2b(repr((tuple(tensor.shape), tensor.dtype)).encode(), digest_size=16)
    known.update(raw_bytes(flat).data)
    return known.digest()


class _Memory:
    """Remembers to which delivery a range of memory belonged when it was last written."""

    def __init__(self) -> None:
        # A weak reference lets the memory of a storage go, but keeps its address from being used for another storage.
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
        """Return the delivery of a tensor or of a view into it; None if it was never noted, or was written since."""
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
    """Recognises which delivered batch goes into the model."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget all batches."""
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
        """Note tensors that were made from a delivered batch, such as its copy on a device."""
        for tensor in tensors:
            self._followed.note(tensor, delivery)

    def find(self, tensors: list[Tensor], current: Delivery | None) -> tuple[Delivery | None, bool]:
        """Return the delivery of some tensors, and whether any of them was recognised.

        The memory of delivered tensors is compared first, then their content, then the memory of tensors that were made
        from them. Only the content of the largest recognised tensors counts, because a small one (a mask, a list of
        lengths) may well be in another batch, too.

        Args:
            tensors: the inputs of the model.
            current: the delivery that is preferred among several with the same content.

        Returns:
            The delivery and True. None and True for tensors of several deliveries. None and False if no tensor was
            recognised.
        """
        in_memory = _distinct(self._delivered.owner(t) for t in tensors)
        if not in_memory:
            in_memory = self._by_content(tensors, current)
        if not in_memory:
            # A tensor that is passed at every step says nothing about the batch, so all tensors have to be known.
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
        # If two deliveries match equally well, the one that is not current is the less likely chance match.
        return [d for d in deliveries if d is not current] if len(deliveries) > 1 else deliveries


RECOGNITION = Recognition()
"""One for the whole process, so that a batch of one loader is recognised by the optimizer of another."""


def _distinct(deliveries: Iterable[Delivery | None]) -> list[Delivery]:
    return list({id(d): d for d in deliveries if d is not None}.values())


def rows_repeat(tensors: list[Tensor]) -> bool:
    """Say whether two rows of a batch have the same content, in all tensors with the batch's number of rows."""
    sizes = [t.shape[0] for t in tensors if t.dim() > 0]
    rows = max(set(sizes), key=sizes.count, default=0)
    if rows < 2:
        return False
    parts = [raw_bytes(t).reshape(rows, -1) for t in tensors if t.dim() > 0 and t.shape[0] == rows and t.numel()]
    seen = {b"|".join(part[i].tobytes() for part in parts) for i in range(rows)}
    return len(seen) < rows
