"""Takes one record out of the arguments of a model, and finds tensors in its outputs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

Paths = dict[tuple[Any, ...], Tensor]


@dataclass(frozen=True)
class Cut:
    """The part of a batch that is taken.

    Attributes:
        rows: number of rows of the batch.
        first: first row of the part.
        count: number of rows of the part.
        dim: dimension of the rows.
        positions: first position, end, and number of positions ``[B, T, ...]`` where padding is cut off; None where it
            is not.
    """

    rows: int
    first: int
    count: int
    dim: int = 0
    positions: tuple[int, int, int] | None = None

    def padded(self) -> Cut:
        """Return the same rows with their padding."""
        return dataclasses.replace(self, positions=None)

    def of(self, tensor: Tensor) -> Tensor:
        """Return a copy of the part of a tensor. A tensor without rows is returned as it is."""
        if tensor.dim() <= self.dim or tensor.shape[self.dim] != self.rows:
            return tensor.detach()
        return self.trimmed(tensor.detach().narrow(self.dim, self.first, self.count)).clone()

    def trimmed(self, tensor: Tensor) -> Tensor:
        """Return rows without their padding."""
        if self.positions is None or tensor.dim() < 2 or tensor.shape[1] != self.positions[2]:
            return tensor
        first, end, length = self.positions
        dims = [1, 2, 3] if tensor.dim() == 4 and tensor.shape[-1] == length else [1]  # a mask of pairs of positions
        for dim in dims:
            if tensor.shape[dim] == length:
                tensor = tensor.narrow(dim, first, end - first)
        return tensor

    def take(self, value: Any) -> Any:
        """Return arguments in which every tensor with rows is replaced by its part."""
        if isinstance(value, Tensor):
            return self.of(value)
        if isinstance(value, PackedSequence):
            return self._packed(value)
        if isinstance(value, Mapping):
            items = {key: self.take(item) for key, item in value.items()}
            if type(value) is dict or not isinstance(value, MutableMapping):
                return items
            new = copy.copy(value)
            for key, item in items.items():
                new[key] = item
            return new
        if isinstance(value, tuple):
            parts = [self.take(item) for item in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        if isinstance(value, list):
            alike = len(value) == self.rows > 1 and not any(_has_rows(item, self.rows, self.dim) for item in value)
            return value[self.first : self.first + self.count] if alike else [self.take(item) for item in value]
        if _is_holder(value):
            new = copy.copy(value)
            for name, item in vars(value).items():
                object.__setattr__(new, name, self.take(item))
            return new
        return value

    def _packed(self, value: PackedSequence) -> PackedSequence:
        if int(value.batch_sizes[0]) != self.rows:
            return value
        padded, lengths = pad_packed_sequence(value, batch_first=True)
        own = lengths[self.first : self.first + self.count]
        part = padded.detach()[self.first : self.first + self.count, : int(own.max())]
        return pack_padded_sequence(part, own, batch_first=True, enforce_sorted=False)


def _is_holder(value: Any) -> bool:
    """Say whether a value is a plain object with tensors as attributes."""
    if isinstance(value, nn.Module | type) or callable(value):
        return False
    plain = dataclasses.is_dataclass(value) or type(value).__module__ not in ("builtins", "torch")
    return plain and any(isinstance(v, Tensor) for v in getattr(value, "__dict__", {}).values())


def _has_rows(value: Any, rows: int, dim: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > dim and value.shape[dim] == rows


def inputs_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors with at least one dimension in some arguments, in their order."""
    if isinstance(value, Tensor):
        if value.dim():
            yield value
    elif isinstance(value, PackedSequence):
        yield pad_packed_sequence(value, batch_first=True)[0]
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from inputs_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from inputs_in(item)
    elif _is_holder(value):
        yield from inputs_in(vars(value))


def count_rows(arguments: Any, dim: int) -> int:
    """Return the number of rows that most tensors in arguments have, the first number in a tie; 0 without tensors."""
    sizes = [t.shape[dim] for t in inputs_in(arguments) if t.dim() > dim]
    if not sizes:
        lists = [a for a in _flat(arguments) if isinstance(a, list)]
        return len(lists[0]) if lists else 0
    return max(sizes, key=lambda size: (sizes.count(size), -sizes.index(size)))


def _flat(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _flat(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _flat(item)


def floats_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield (path, tensor) for the floating-point tensors in the output of a model."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from floats_in(item, (*path, key))
    elif isinstance(value, tuple | list):
        for place, item in enumerate(value):
            yield from floats_in(item, (*path, place))
    elif _is_holder(value):
        for name, item in vars(value).items():
            yield from floats_in(item, (*path, name))


def replace_floats(value: Any, new: Callable[[tuple[Any, ...], Tensor], Tensor], path: tuple[Any, ...] = ()) -> Any:
    """Return the output of a model with other floating-point tensors. Mutable containers are changed in place."""
    if isinstance(value, Tensor):
        return new(path, value) if value.is_floating_point() else value
    if isinstance(value, MutableMapping):
        for key, item in list(value.items()):
            if isinstance(item, Tensor | Mapping | tuple | list) or _is_holder(item):
                value[key] = replace_floats(item, new, (*path, key))
        return value
    if isinstance(value, tuple):
        parts = [replace_floats(item, new, (*path, place)) for place, item in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, list):
        value[:] = [replace_floats(item, new, (*path, place)) for place, item in enumerate(value)]
        return value
    if _is_holder(value):
        for name, item in list(vars(value).items()):
            object.__setattr__(value, name, replace_floats(item, new, (*path, name)))
    return value


def mask_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int) -> Tensor | None:
    """Return the attention mask ``[B, T]`` among the arguments of a call; None without a mask."""
    named = dict(kwargs)
    with contextlib.suppress(TypeError, ValueError):
        named.update(inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments)
    for value in list(named.values()):
        if isinstance(value, Mapping):
            named.update(value)
    mask = named.get("attention_mask")
    fits = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == rows
    return mask if fits else None


def own_positions(mask: Tensor, record: int) -> tuple[int, int, int] | None:
    """Return first position, end and T of a record of a mask ``[B, T]``; None if it has no padding to cut off."""
    used = mask != 0
    length = mask.shape[1]
    own = used[record].nonzero().reshape(-1)
    if not len(own):
        return None
    first, end = int(own[0]), int(own[-1]) + 1
    return None if (first, end) == (0, length) else (first, end, length)


def choose_records(arguments: Any, rows: int, dim: int, mask: Tensor | None, limit: int = 3) -> list[int]:
    """Return up to ``limit`` records that differ: the shortest, the longest, one with another label, the middle one.

    >>> import torch
    >>> choose_records((torch.arange(5.0),), 5, 0, None)
    [0, 4, 2]
    """
    candidates = [0, rows - 1, rows // 2, *range(rows)]
    if mask is not None:
        lengths = (mask != 0).sum(1)
        candidates = [int(lengths.argmin()), int(lengths.argmax()), *candidates]
    labels = [
        t for t in inputs_in(arguments) if t.dim() == 1 and dim == 0 and len(t) == rows and not t.is_floating_point()
    ]
    if labels:
        other = (labels[-1] != labels[-1][candidates[0]]).nonzero().reshape(-1)
        if len(other):
            candidates.insert(1, int(other[0]))
    return list(dict.fromkeys(candidates))[:limit]
