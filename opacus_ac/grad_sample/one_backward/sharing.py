"""Finds the calls of a module that are for all records at once, and gives them one copy per record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from opacus_ac.grad_sample.one_backward.shared import TRANSPOSED, Shared
from opacus_ac.grad_sample.one_backward.use import Tracked

_PASSES_TO_LOOK = 2


@dataclass(frozen=True)
class SharedOutput:
    """The output of a call that was for all records at once.

    Attributes:
        records: the copies ``[B, ...]``, without a first dimension of size one.
        batch_of_one: whether the value has such a dimension.
        lengths: sizes that other dimensions of the batch have.
        is_lookup: whether the call is a lookup whose ids are the same for all records.
    """

    records: Tensor
    batch_of_one: bool
    lengths: frozenset[int]
    is_lookup: bool = False

    def inputs(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs of the call with a copy per record. Those of a lookup stay, because it is run again."""
        if self.is_lookup:
            return list(tensors)
        return [
            t.expand(len(self.records), *t.shape[1:])
            if not isinstance(t, Shared) and t.dim() > 1 and t.shape[0] == 1
            else t
            for t in tensors
        ]

    def restored(self, records: Tensor) -> Shared:
        """Return the value that the model goes on with, from its copies."""
        return Shared.from_records(records, self.batch_of_one, self.lengths)


def kept_output(output: Tensor, shared: SharedOutput | None) -> Tensor:
    """Return what is kept of the output of a module that is run again."""
    if isinstance(output, Shared):
        return output
    # What comes next may change the output in place.
    return (output if shared is None or shared.is_lookup else shared.records).clone()


class Sharing:
    """Tells which outputs are shared by all records, from the shapes of the batch.

    Args:
        buffers: buffers of the model. A layer that gets a part of one of them computes for all records at once.

    Attributes:
        batch: shape of the first tensor that the model is called with. Its first dimension are the records.
        lengths: sizes that other dimensions of its inputs have.
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._buffers = {_memory(buffer) for buffer in buffers}
        self.batch = torch.Size([0])
        self.lengths: frozenset[int] = frozenset()
        self._inputs: set[int] = set()
        self._positions: set[int] = set()
        self._rows: set[int] = set()

    def start(self, inputs: Sequence[Tensor]) -> None:
        """Note the tensors that the model is called with."""
        shapes = [t.shape for t in inputs if t.dim()]
        self.batch = shapes[0] if shapes else torch.Size([0])
        self.lengths = frozenset(size for shape in shapes for size in shape[1:])
        self._inputs = {_memory(t) for t in inputs if t.dim() and t.shape[0] == self.batch[0]}

    def of(self, tracked: Tracked, inputs: Sequence[Tensor], output: Tensor, batch: torch.Size) -> SharedOutput | None:
        """Return the copies of an output that is for all records at once; None for any other output.

        Args:
            tracked: the module.
            inputs: the tensors that it was called with.
            output: its output.
            batch: shape of the batch inside of the module.

        Raises:
            ValueError: If ids may be those of positions or of records.
        """
        if isinstance(output, Shared):
            return SharedOutput(output.records(), output.has_batch_of_one, output.lengths)
        records = batch[0]
        if records == 0 or any(isinstance(t, Shared) for t in inputs):
            return None
        if isinstance(tracked.module, nn.Embedding):
            if not self._is_shared_lookup(tracked, inputs, output, batch):
                return None
            one = output.dim() > 2 and output.shape[0] == 1
            return SharedOutput(_expanded(output, one, records), one, self.lengths, is_lookup=True)
        if records > 1 and self._is_of_constants(inputs) and output.dim() > 1 and output.shape[0] == 1:
            return SharedOutput(_expanded(output, True, records), True, self.lengths)
        return None

    def _is_of_constants(self, inputs: Sequence[Tensor]) -> bool:
        """Say whether a module is called with ``[1, ...]`` of a buffer of the model."""
        given = [t for t in inputs if t.dim() > 1]
        return bool(given) and all(t.shape[0] == 1 and _memory(t) in self._buffers for t in given)

    def _is_shared_lookup(self, tracked: Tracked, inputs: Sequence[Tensor], output: Tensor, batch: torch.Size) -> bool:
        """Say whether a lookup was for all records: ``[1, T, d]``, ``[T, d]`` of positions, ``[T, T, heads]``."""
        key, rows, records = id(tracked.module), output.shape[0], batch[0]
        lengths = self.lengths.union(batch[1:])
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


def _expanded(output: Tensor, batch_of_one: bool, records: int) -> Tensor:
    return output.expand(records, *output.shape[1 if batch_of_one else 0 :])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class SharedParameters(TorchFunctionMode):
    """While this mode is on, a trained parameter that a model uses outside of its own module is a shared value.

    Args:
        share: returns the shared value of a parameter, or None if it stays as it is.

    Attributes:
        used: whether there was such a use.
    """

    def __init__(self, share: Callable[[nn.Parameter], Shared | None]) -> None:
        super().__init__()
        self._share = share
        self.used = False

    def _replaced(self, value: Any) -> Any:
        # In its own module, a parameter requires no gradient while the module runs.
        if isinstance(value, nn.Parameter) and value.requires_grad:
            shared = self._share(value)
            self.used = self.used or shared is not None
            return value if shared is None else shared
        if type(value) in (list, tuple):
            return type(value)(self._replaced(v) for v in value)
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function with shared values in the place of such parameters."""
        kwargs = kwargs or {}
        attribute = func.__name__ in ("__get__", "__set__") and func not in TRANSPOSED
        if attribute or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        return func(*(self._replaced(a) for a in args), **{k: self._replaced(v) for k, v in kwargs.items()})


class OutsideUses:
    """Looks for parameters that a model uses outside of their own modules, and shares them.

    The first forward passes are watched, function by function. If there is no such use in them, later ones are not.

    Args:
        tracked: the watched modules.
        share: returns a parameter with a copy per record, from its module and its name there.
    """

    def __init__(self, tracked: Iterable[Tracked], share: Callable[[Tracked, str, nn.Parameter], Shared]) -> None:
        self._homes: dict[int, tuple[Tracked, str]] = {}
        for item in tracked:
            trained = {id(p) for p in item.parameters}
            for name, parameter in item.module.named_parameters():
                if id(parameter) in trained:
                    self._homes.setdefault(id(parameter), (item, name))
        self._share = share
        self._passes: list[tuple[SharedParameters, FrameType]] = []
        self._values: dict[int, Shared] = {}
        self._left, self._found = _PASSES_TO_LOOK, False
        self.paused = False

    def start(self, caller: FrameType) -> None:
        """A forward pass of the model starts.

        Args:
            caller: the frame that runs the forward pass. Interrupted passes are known by it.
        """
        while self._passes and not _is_running(self._passes[-1][1]):
            self._leave()
        if not self._passes:
            self._values = {}
        if self._left or self._found:
            mode = SharedParameters(self._shared)
            mode.__enter__()
            self._passes.append((mode, caller))

    def end(self) -> None:
        """A forward pass of the model has ended, or failed."""
        if self._passes:
            self._found = self._found or self._passes[-1][0].used
            self._left = max(0, self._left - 1)
            self._leave()

    def _leave(self) -> None:
        mode, _ = self._passes.pop()
        if torch.overrides._get_current_function_mode() is mode:
            mode.__exit__(None, None, None)
        if not self._passes:
            self._values = {}

    def _shared(self, parameter: nn.Parameter) -> Shared | None:
        """Return the shared value of a parameter; None where it is used by its module, or is not watched."""
        home = self._homes.get(id(parameter))
        if self.paused or home is None or not home[0].module.training or not _is_running(self._passes[-1][1]):
            return None
        key = id(parameter)
        if key not in self._values:
            self._values[key] = self._share(*home, parameter)
        return self._values[key]


def _is_running(frame: FrameType) -> bool:
    """Say whether a frame is among the callers."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None
