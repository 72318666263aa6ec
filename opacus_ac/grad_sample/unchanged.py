"""Checks that tensors were not written in place. torch counts such changes of every tensor and its views."""

from __future__ import annotations

from torch import Tensor


class Unchanged:
    """Remembers tensors and their versions, each with a description.

    Guarantees:
        A change by any operator of torch, also through a view, is found. A change that torch does not count is not
        found: through ``.data``, by numpy or another library that shares the memory, or by a user's own kernel.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[str, Tensor, int]] = []

    def note(self, what: str, *tensors: Tensor) -> None:
        """Remember tensors, with a description for the message."""
        self._noted += [(what, tensor, tensor._version) for tensor in tensors]

    def check(self) -> None:
        """Check that no tensor was written.

        Raises:
            ValueError: If one was written.
        """
        for what, tensor, version in self._noted:
            if tensor._version != version:
                raise ValueError(
                    f"{what} was written to in place after norms were computed from it, and the sum would be of other "
                    "values. Give the model a copy (x.clone()) of a buffer that is filled again before "
                    "optimizer.step(), and have custom backward functions return new tensors"
                )
