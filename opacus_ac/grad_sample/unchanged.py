"""Whether tensors still hold what they held: torch counts changes in place of a tensor, its views included."""

from __future__ import annotations

from torch import Tensor


class Unchanged:
    """Remembers tensors and their versions, with what they are.

    Guarantees:
        A change through any operator or view is seen. One that goes past torch's counter is not: through ``.data``,
        through numpy or another library that shares the memory, or by a kernel of one's own that does not announce it.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[str, Tensor, int]] = []

    def note(self, what: str, *tensors: Tensor) -> None:
        """Remember tensors, and what they are, for the message."""
        self._noted += [(what, tensor, tensor._version) for tensor in tensors]

    def check(self) -> None:
        """Raise ``ValueError`` when one was written to."""
        for what, tensor, version in self._noted:
            if tensor._version != version:
                raise ValueError(
                    f"{what} was written to in place after norms were computed from it, and the sum would be of other "
                    "values. Give the model a copy (x.clone()) of a buffer that is filled again before "
                    "optimizer.step(), and have custom backward functions return new tensors"
                )
