"""Lengths to which a loader pads every record. Such padding is a part of the record and couples no records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from opacus_ac.grad_sample.alone.single import inputs_in, mask_in

KeepsLength = Callable[[list[Tensor]], bool]
"""Says whether tensors are as they were delivered by a loader that gives every record the same length."""


class OwnLengths:
    """Remembers the lengths to which every record is padded, and then refuses batches of another length.

    Args:
        keeps_length: says whether tensors are as they were delivered by a loader that gives every record one length.
    """

    def __init__(self, keeps_length: KeepsLength) -> None:
        self._keeps_length = keeps_length
        self._accepted: set[int] = set()
        self._other: int | None = None

    def accept(self, call: Any) -> bool:
        """Accept the length of the inputs of a call, if the loader pads every record to it. Returns whether it does.

        A view is not accepted, because it may be a batch that the loop has cut to its longest record.
        """
        tensors = list(inputs_in(call.arguments))
        if any(t._is_view() for t in tensors) or not self._keeps_length(tensors):
            return False
        self.hold(call.runs)
        return True

    def hold(self, runs: Any) -> None:
        """Require that all batches have the padded length of these runs."""
        self._accepted.update(run.cut.positions[2] for run in runs if run.cut.positions is not None)

    def see(self, module: nn.Module, arguments: Any, rows: int, whole: bool) -> None:
        """Note the length of a batch.

        Args:
            module: the module that gets the batch.
            arguments: its arguments.
            rows: number of rows of the batch.
            whole: whether the module is the whole model, and not a part of it.
        """
        if not self._accepted:
            return
        mask = mask_in(module, arguments[0], arguments[1], rows)
        if mask is None and not whole:
            return
        lengths = {mask.shape[1]} if mask is not None else {t.shape[1] for t in inputs_in(arguments) if t.dim() > 1}
        if lengths and not lengths & self._accepted:
            self._other = max(lengths)

    def check(self) -> None:
        """Check the lengths that were noted.

        Raises:
            ValueError: If a batch is padded to another length than those before.
        """
        other, self._other = self._other, None
        if other is not None:
            raise ValueError(
                f"what a record gets depends on the length of its batch, and a batch has length {other} where others "
                f"before had {' or '.join(map(str, sorted(self._accepted)))}: pass each batch to the model as long as "
                "the loader made it"
            )
