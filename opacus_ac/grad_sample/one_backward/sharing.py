"""Finds the calls of a module that are for all records at once, and gives them one copy per record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.broadcast import tensors_in
from opacus_ac.grad_sample.one_backward.shared import Batch, Shared
from opacus_ac.grad_sample.one_backward.use import Tracked


@dataclass(frozen=True)
class SharedOutput:
    """The output of a call that was for all records at once.

    Attributes:
        value: the output with its copies.
        is_lookup: whether the call is a lookup whose ids are the same for all records.
        is_constant: whether the inputs of the call have no copies yet.
    """

    value: Shared
    is_lookup: bool = False
    is_constant: bool = False

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the call with a copy per record. Those of a lookup stay, because it is run again."""
        if self.is_lookup or not self.is_constant:
            return list(tensors)
        return [_copied(t, self.value) if t.is_floating_point() and t.dim() else t for t in tensors]

    def kept(self, output: Tensor) -> Tensor:
        """Return what is kept of the output of a module that is run again."""
        return output.clone() if self.is_lookup else self.value


def _copied(value: Tensor, like: Shared) -> Tensor:
    return Shared.of(value.expand(like.rows.shape[0], *value.shape), like.batch)


class Sharing:
    """Tells which outputs are shared by all records, from the shapes of the batch.

    Args:
        buffers: buffers of the model. A layer that gets a part of one of them computes for all records at once.
        is_constant: says whether a tensor does not come from the batch; None if that is not known.
        rows_of_a_record: returns the number of rows that each record has where the model is at the moment.

    Attributes:
        batch: shape of the first tensor that the model is called with. Its first dimension are the records.
        known: what is known of it.
        undecided: whether it was not clear in the present pass if something is for all records.
    """

    def __init__(
        self,
        buffers: Iterable[Tensor],
        is_constant: Callable[[Tensor], bool | None],
        rows_of_a_record: Callable[[], int],
    ) -> None:
        self._buffers = {_memory(buffer) for buffer in buffers}
        self.batch = torch.Size([0])
        self._is_constant, self._rows_of_a_record = is_constant, rows_of_a_record
        self.known = Batch(frozenset(), is_constant, rows_of_a_record)
        self.undecided = False
        self._inputs: set[int] = set()
        self._shared_before: dict[int, bool | None] = {}
        self._positions: set[int] = set()
        self._rows: set[int] = set()

    def start(self, inputs: object) -> list[Tensor]:
        """Note what the model is called with. Returns the tensors that have the records first."""
        tensors = tensors_in(inputs)
        self.undecided = False
        self.batch = tensors[0].shape if tensors else torch.Size([0])
        lengths = frozenset(size for t in tensors for size in t.shape[1:])
        self.known = Batch(lengths, self._is_constant, self._rows_of_a_record)
        of_records = [t for t in tensors if t.shape[0] == self.batch[0]]
        self._inputs = {_memory(t) for t in of_records}
        return of_records

    def of(
        self, tracked: Tracked, inputs: Sequence[Tensor], output: Tensor, batch: torch.Size, constant: bool | None
    ) -> SharedOutput | None:
        """Return the copies of an output that is for all records at once; None for any other output.

        Args:
            tracked: the module.
            inputs: the tensors that it was called with.
            output: its output.
            batch: shape of the batch inside of the module.
            constant: whether the output is known not to come from the batch; None if that is not known.

        Raises:
            ValueError: If ids may be those of positions or of records.
        """
        if isinstance(output, Shared):
            return SharedOutput(output)
        records, rows = batch[0], batch[0] * self._rows_of_a_record()
        if records == 0 or output.dim() < 2 or any(isinstance(t, Shared) for t in inputs):
            return None
        is_lookup = isinstance(tracked.module, nn.Embedding)
        shared = self._told(id(tracked.module), inputs, output, rows, constant)
        if shared is None and is_lookup:
            shared = self._is_shared_lookup(tracked, inputs, output, torch.Size([rows, *batch[1:]]))
        elif shared is None:
            shared = self._is_of_constants(inputs) and output.shape[0] == 1 < rows
        if not shared:
            return None
        copies = Shared.of(output.expand(records, *output.shape), self.known)
        return SharedOutput(copies, is_lookup, is_constant=True)

    def _told(
        self, key: int, inputs: Sequence[Tensor], output: Tensor, records: int, constant: bool | None
    ) -> bool | None:
        """Say whether a watched pass has shown that the module's output is for all records; None if not."""
        if constant is None:
            return self._shared_before.get(key)
        if not constant and output.shape[0] != records:
            return None
        if constant and output.shape[0] == records:
            # As many rows as records may be those of the records, from numbers that went through Python.
            ids = [t for t in inputs if t.dim() == 1 and not t.is_floating_point()]
            if not self._shared_before.get(key) and not (ids and bool((ids[0].diff() == 1).all())):
                self.undecided = True
                return None
        self._shared_before[key] = constant if self._shared_before.get(key, constant) == constant else None
        return constant

    def _is_of_constants(self, inputs: Sequence[Tensor]) -> bool:
        """Say whether a module is called with ``[1, ...]`` of a buffer of the model."""
        given = [t for t in inputs if t.dim() > 1]
        return bool(given) and all(t.shape[0] == 1 and _memory(t) in self._buffers for t in given)

    def _is_shared_lookup(self, tracked: Tracked, inputs: Sequence[Tensor], output: Tensor, batch: torch.Size) -> bool:
        """Say whether a lookup was for all records: ``[1, T, d]``, ``[T, d]`` of positions, ``[T, T, heads]``."""
        key, rows, records = id(tracked.module), output.shape[0], batch[0]
        lengths = self.known.lengths.union(batch[1:])
        if output.dim() > 2 and rows == 1 < records:
            # One row of what the model was called with is of one record. All rows only tell how long the records are.
            ids = [t for t in inputs if not t.is_floating_point() and t.shape[:1] == (1,)]
            return not any(_memory(t) in self._inputs for t in ids)
        if rows != records and rows in lengths:
            self._positions.add(key)
            return True
        if key not in self._rows and self._are_constants(tracked.module, inputs, records):
            return True
        if rows != records:
            return output.dim() > 2 and rows % records != 0
        if rows not in lengths:
            self._rows.add(key)
        elif key in self._positions:
            return True
        elif key not in self._rows:
            return self._are_positions(tracked, inputs, output)
        return False

    def _are_constants(self, module: nn.Module, inputs: Sequence[Tensor], records: int) -> bool:
        """Say whether ids ``[K]`` are the same in every batch, as those of a codebook: a buffer, or ids in a row.

        As many ids as there are records may be theirs, unless they are those of the whole table.
        """
        ids = next((t for t in inputs if not t.is_floating_point() and t.dim()), None)
        if ids is None or ids.dim() != 1 or _memory(ids) in self._inputs:
            return False
        if _memory(ids) in self._buffers:
            return True
        if len(ids) < 2 or (len(ids) == records and len(ids) != module.num_embeddings):
            return False
        return bool((ids.diff() == 1).all())

    def _are_positions(self, tracked: Tracked, inputs: Sequence[Tensor], output: Tensor) -> bool:
        """Say whether as many ids as there are records are those of positions. Batch and sequence are of one size."""
        ids = next((t for t in inputs if not t.is_floating_point() and t.dim()), None)
        if ids is not None and _memory(ids) in self._inputs:
            return False
        in_a_row = ids is not None and len(ids) > 1 and bool((ids.diff() == 1).all())
        if ids is not None and ids.dim() == 1 and not in_a_row and not tracked.keep_output:
            return False
        if output.dim() == 2:
            raise ValueError(
                f"{tracked.path} ({type(tracked.module).__name__}) looks up {output.shape[0]} rows, which may be "
                "positions or records: batch and sequence are of one size. Give the first batch another length"
            )
        # Relative positions depend on the difference of two positions only.
        if ids is None or ids.dim() != 2 or not ids.shape[0] == ids.shape[1] > 1:
            return False
        return bool((ids[1:, 1:] == ids[:-1, :-1]).all()) and bool((ids != ids[0, 0]).any())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
