"""Lengths that records have by themselves: padding to them is a part of the record, and couples it with no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from opacus_ac.grad_sample.alone.single import inputs_in, mask_in

KeepsLength = Callable[[list[Tensor]], bool]
"""Whether tensors are those that a loader delivered which gives every record one length."""


class OwnLengths:
    """Remembers to which lengths records are padded by themselves, and refuses batches of another length from then on.

    Args:
        keeps_length: whether tensors come as they are from a loader that gives every record one length.
    """

    def __init__(self, keeps_length: KeepsLength) -> None:
        self._keeps_length = keeps_length
        self._accepted: set[int] = set()
        self._other: int | None = None

    def accept(self, call: Any) -> bool:
        """Accept the length of what a call was given if it is that of the records by themselves; whether it is.

        A view may be a batch that the loop has cut to its longest record, so it is not accepted.
        """
        tensors = list(inputs_in(call.arguments))
        if any(t._is_view() for t in tensors) or not self._keeps_length(tensors):
            return False
        self.hold(call.runs)
        return True

    def hold(self, runs: Any) -> None:
        """Take it that all batches have the length of those that runs of single records were cut from."""
        self._accepted.update(run.cut.positions[2] for run in runs if run.cut.positions is not None)

    def see(self, module: nn.Module, arguments: Any, rows: int, whole: bool) -> None:
        """Look at the length of a batch that the model, or with ``whole`` False a part of it, is given."""
        if not self._accepted:
            return
        mask = mask_in(module, arguments[0], arguments[1], rows)
        if mask is None and not whole:
            return
        lengths = {mask.shape[1]} if mask is not None else {t.shape[1] for t in inputs_in(arguments) if t.dim() > 1}
        if lengths and not lengths & self._accepted:
            self._other = max(lengths)

    def check(self) -> None:
        """Raise for a batch of another length that was seen.

        Raises:
            ValueError: a batch is padded to another length than those before.
        """
        other, self._other = self._other, None
        if other is not None:
            raise ValueError(
                f"what a record gets depends on the length of its batch, and a batch has length {other} where others "
                f"before had {' or '.join(map(str, sorted(self._accepted)))}: pass each batch to the model as long as "
                "the loader made it"
            )
