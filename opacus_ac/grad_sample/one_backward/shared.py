"""Values that are computed once for all records, such as a table of position biases.

A model may look up its positions once, shape them, and add the result to the scores of all records. The gradient of
such a value is already summed over the batch. So the value gets one copy per record behind it, ``[B, *shape]``. The
model sees one value, and what it does to that value is done to each copy. Where the value meets a tensor that has the
records as first dimension, copy i meets record i. So the gradient at copy i is that of record i.

Each kind of call is compared with the same call on the one value when it is first seen. A use that cannot be followed
gets no gradient: the backward pass is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from opacus_ac.grad_sample.one_backward.shared_ways import (
    Function,
    Way,
    aligned,
    on_copies,
    on_copies_by_loop,
    on_the_value,
    repeated,
    with_own_rows,
    with_records,
    with_records_by_loop,
)

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_LOW_TOLERANCE = 5e-2
_MOST_KINDS = 4096
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
TRANSPOSED = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH"))
_CONSTANTS = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
_ARITHMETIC = ("add_", "sub_", "mul_", "div_")


@dataclass(frozen=True)
class Batch:
    """What is known of the batch of a forward pass.

    Attributes:
        lengths: sizes that dimensions other than that of the records have.
        is_constant: says whether a tensor does not come from the batch; None if that is not known.
        rows_of_a_record: returns the number K of rows that each record has where the model is at the moment, one after
            the other. It is 1 outside of windows.
    """

    lengths: frozenset[int]
    is_constant: Callable[[Tensor], bool | None]
    rows_of_a_record: Callable[[], int]


class Shared(Tensor):
    """One value for all records, with a copy per record.

    Attributes:
        rows: the copies ``[B, *shape]``, which are connected to the graph.
        value: the value without a graph.
        batch: what is known of the batch.
    """

    rows: Tensor
    value: Tensor
    batch: Batch

    @staticmethod
    def of(rows: Tensor, batch: Batch) -> Shared:
        """Return the value of which ``rows`` are the copies."""
        value = rows.detach()[0]
        # What reaches this leaf has gone around __torch_function__, so its records are lost.
        guard = value.detach().requires_grad_()
        guard.register_hook(_refuse)
        shared = guard.as_subclass(Shared)
        shared.rows, shared.value, shared.batch = rows, value, batch
        return shared

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do to each copy what the model does to the value."""
        with torch._C.DisableTorchFunctionSubclass():
            return SharedCall(func, args, kwargs or {}, _caller()).result()

    @property
    def has_batch_of_one(self) -> bool:
        """Whether the value has a first dimension of size one, in the place of the records."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.dim() > 1 and self.shape[0] == 1

    def records(self) -> Tensor:
        """Return the copies as a layer would get them from a batch: without a first dimension of size one."""
        return self.rows.squeeze(1) if self.has_batch_of_one else self.rows

    @staticmethod
    def from_records(records: Tensor, batch_of_one: bool, batch: Batch) -> Shared:
        """Return the value of copies that :meth:`records` returned."""
        return Shared.of(records.unsqueeze(1) if batch_of_one else records, batch)

    def again(self, records: Tensor) -> Shared:
        """Return the value of what :meth:`records` returned, after it went through the graph."""
        return Shared.from_records(records, self.has_batch_of_one, self.batch)


def _caller() -> FrameType:
    """Return the frame of the model's code."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__package__") == __package__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _refuse(_gradient: Tensor | None = None) -> NoReturn:
    raise ValueError(
        "a value that was computed once for all records (a table of positions, a parameter used outside of its module, "
        "or an input with a first dimension of 1) was used in a way that does not tell the records apart. Give it the "
        "batch as first dimension, with one part per record, or freeze the parameters that it comes from"
    )


class SharedCall:
    """One call of a function of torch with a shared value among its arguments."""

    # What was found for a kind of call: the way that gives the same as the plain call.
    known: ClassVar[dict[Any, Way]] = {}
    # Whether a place in the source brings records and copies together, from batches whose shapes tell.
    places: ClassVar[dict[Any, bool]] = {}
    # First dimensions at a place that were not those of the records in some batch, with their sizes. None is
    # forgotten, because a later batch may have just as many records.
    constants: ClassVar[set[Any]] = set()

    def __init__(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any], caller: FrameType) -> None:
        if kwargs.get("inplace"):
            kwargs = {**kwargs, "inplace": False}  # the copies are one memory
        self.func = func
        self.caller = caller
        self.spec: TreeSpec
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.shared = {i for i, leaf in enumerate(self.leaves) if isinstance(leaf, Shared)}
        one = self.leaves[min(self.shared)]
        self.size, self.batch = one.rows.shape[0], one.batch
        self.each = self.batch.rows_of_a_record()
        self.rows = self.size * self.each
        self.others = {
            i: leaf
            for i, leaf in enumerate(self.leaves)
            if isinstance(leaf, Tensor)
            and i not in self.shared
            and leaf.dim() > 0
            and not isinstance(leaf, nn.Parameter)
        }

    @property
    def place(self) -> Any:
        """The place in the source where the function is called."""
        return self.func, self.caller.f_code, self.caller.f_lasti

    @property
    def name(self) -> str:
        """Name of the function."""
        return str(getattr(self.func, "__name__", self.func)).split(".")[0]  # torch.ops add the overload

    def run(self, leaves: Iterable[Any]) -> Any:
        """Call the function with these leaves of its arguments."""
        args, kwargs = tree_unflatten(list(leaves), self.spec)
        return self.func(*args, **kwargs)

    def result(self) -> Any:
        """Return what the call gives, with the records told apart.

        Raises:
            ValueError: If it is not clear which record uses which part of a value.
        """
        if self.func is _REQUIRES_GRAD:
            return True
        if self.func is Tensor.backward:
            _refuse()
        if self.func in _CONSTANTS or not torch.is_grad_enabled():
            return on_the_value(self)
        if self._writes():
            return self._in_place()
        kind = self._kind()
        way = self.known.get(kind)
        if way is None:
            way, result = self._find()
            if len(self.known) >= _MOST_KINDS:
                self.known.clear()
            self.known[kind] = way
            return result
        return way(self)

    def keep(self, rows: Tensor) -> Shared:
        """Return a result that is the same for all records, from its copies."""
        return Shared.of(rows, self.batch)

    def _kind(self) -> Any:
        def described(i: int, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return (
                    i in self.shared,
                    tuple(leaf.shape),
                    leaf.dtype,
                    leaf.requires_grad,
                    isinstance(leaf, nn.Parameter),
                )
            return repr(leaf)

        return (
            self.place,
            self.size,
            self.each,
            self.size in self.batch.lengths,
            *(described(i, leaf) for i, leaf in enumerate(self.leaves)),
        )

    def _writes(self) -> bool:
        kept = isinstance(self.spec, TreeSpec) and "out" in (self.spec.unflatten(self.leaves)[1])
        return (
            kept or self.name in ("__setitem__", *_ARITHMETIC) or (self.name.endswith("_") and self.name[-2:] != "__")
        )

    def _in_place(self) -> Any:
        """Change a tensor that has the records first, or each copy of a value."""
        target = self.leaves[0]
        if self.name in _ARITHMETIC and 0 in self.shared:
            args, kwargs = tree_unflatten(self.leaves, self.spec)
            changed = SharedCall(getattr(Tensor, self.name[:-1]), args, kwargs, self.caller).result()
            if isinstance(changed, Shared):
                target.rows, target.value = changed.rows, changed.value
                return target
        elif self.name in _ARITHMETIC and target.shape[0] == self.rows:
            return aligned(self, target.dim())
        raise ValueError(
            f"{self.name} writes to a value that was computed once for all records, or writes such a value to a tensor "
            "without the records as first dimension. Use the function that returns a new tensor"
        )

    def _find(self) -> tuple[Way, Any]:
        """Return the way that gives what the call gives on the one value, with its result."""
        with torch.random.fork_rng(), torch.no_grad():
            want = on_the_value(self)
        if not _floats(want):
            return on_the_value, want
        meeting, apart = self._ways(want)
        clear = not meeting or not apart or self._is_clear()
        if meeting and apart and self.place in self.places:
            meeting, apart = (meeting, []) if self.places[self.place] else ([], apart)
        met = self._first(meeting, want)
        alone = self._first(apart, want) if met is None or not clear else None
        if met is not None and alone is not None:
            remedy = "Add it without expand() or repeat()" if self.each > 1 else "Give the first batch another length"
            raise ValueError(
                f"{self.name} gets a value that was computed once for all records, {self._shapes(self.shared)}. A size "
                f"of {self.rows} may be that of the batch or of the sequence. {remedy}"
            )
        found = alone if met is None else met
        if found is None:
            raise ValueError(
                f"{self.name} gets a value that was computed once for all records, {self._shapes(self.shared)}, beside "
                f"{self._shapes(self.others) or 'no other tensor'}, and it is not clear which record uses which part "
                "of it. Give the value the batch as first dimension, or freeze the parameters that it comes from"
            )
        if meeting and clear:
            self.places[self.place] = met is not None
        return found

    def _first(self, ways: list[Way], want: Any) -> tuple[Way, Any] | None:
        """Return the first way that gives what is wanted, with its result."""
        for way in ways:
            try:
                result = way(self)
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue
            if self._agrees(result, want):
                return way, result
        return None

    def _shapes(self, places: Iterable[int]) -> str:
        return ", ".join(str(list(self.leaves[i].shape)) for i in places)

    def _ways(self, want: Any) -> tuple[list[Way], list[Way]]:
        """Return the ways in which the value may meet the records, and those in which it stays one for all of them."""
        tensors = _floats(want)
        certain = any(t.requires_grad for t in self.others.values())
        first = tensors[0].shape[0] if tensors[0].dim() else 0
        meeting: list[Way] = []
        carrying = [self._carries_records(i, t) for i, t in self.others.items()]  # each one is noted
        if any(carrying):
            dim = max(t.dim() for t in self.others.values())
            meeting = [partial(aligned, dim=dim), with_records, with_records_by_loop, with_own_rows]
            if self.each > 1:  # the first writes a copy for each row, and no copy counts with one row only
                meeting = [*meeting[1:3], meeting[0]]
        elif self.name in ("expand", "expand_as", "broadcast_to") and self._may_be_records(0, first):
            dim = tensors[0].dim()
            meeting = [partial(aligned, dim=dim)]
        elif self.name == "repeat" and first % self.rows == 0:
            meeting = [repeated]
        return meeting, [] if certain else [on_copies, on_copies_by_loop]

    def _carries_records(self, place: int, tensor: Tensor) -> bool:
        """Say whether a tensor has, or may have, the records as first dimension."""
        if tensor.requires_grad:
            return True
        constant = self.batch.is_constant(tensor)
        if constant and self.each > 1:  # a later batch may have just as many rows, in a pass that is not watched
            self.constants.add((self.place, place, tensor.shape[0]))
        return self._may_be_records(place, tensor.shape[0]) and not constant

    def _may_be_records(self, place: int, size: int) -> bool:
        """Say whether a first dimension may be that of the records: it was of no other size than theirs before."""
        key = self.place, place, size
        if size != self.rows:
            if size != 1:
                self.constants.add(key)
            return False
        return key not in self.constants

    def _is_clear(self) -> bool:
        """Say whether it is known which tensors come from the batch, or sizes tell."""
        rows = [t for t in self.others.values() if t.shape[0] == self.rows]
        known = bool(rows) and all(self.batch.is_constant(t) is not None for t in rows)
        return known or (self.each == 1 and self.size not in self.batch.lengths)

    def _agrees(self, result: Any, want: Any) -> bool:
        found, wanted = _floats(result), _floats(want)
        found = [f.value if isinstance(f, Shared) else f for f in found]
        return len(found) == len(wanted) and all(_is_close(f, w) for f, w in zip(found, wanted, strict=True))


def _floats(output: Any) -> list[Tensor]:
    leaves = tree_flatten(output)[0]
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _is_close(found: Tensor, want: Tensor) -> bool:
    if found.shape != want.shape or found.dtype != want.dtype:
        return False
    tolerance = _TOLERANCE.get(want.dtype, _LOW_TOLERANCE)
    return torch.allclose(found.detach(), want, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)
