"""What a case is, and what may come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Row = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]

ONE_LENGTH = "exact (one length)"
#: The gradient is that of autograd; the package refuses to go on, but not with records of one length, whose gradient is
#: that of autograd; it refuses to go on; it goes on and the gradient differs; an error that is no refusal; the model
#: does not exist in this environment; the time was up.
OUTCOMES = ("exact", ONE_LENGTH, "refused", "wrong", "crash", "not built", "time out")


class NotBuilt(Exception):
    """The model of a case cannot be made or run here, without privacy; the message says why."""


def library_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the loss that a model of transformers computes itself."""
    return model(**batch).loss


@dataclass(frozen=True)
class Case:
    """A model and the records that it is trained on.

    Attributes:
        name: unique among the cases of its kind.
        build: returns the model, in the precision and mode in which it is trained, and its records.
        loss: the loss of a batch, a mean over its records.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Sequence[Row]]]
    loss: Loss = library_loss


@dataclass(frozen=True)
class Finding:
    """What came of a case in one mode.

    Attributes:
        kind: the list that the case is in.
        name: the case.
        mode: "bk" or "hooks".
        outcome: one of ``OUTCOMES``.
        where: what had been reached: "make_private" or "first batch"; empty where it does not matter.
        message: the first sentence of a refusal, the error, or the parameter that is off most; of ``ONE_LENGTH`` the
            first sentence of the refusal of other records.
        error: norm of the difference of the released gradient from autograd's, relative; None where there is none.
        floor: by how much autograd differs from itself when a record is repeated, relative.
        seconds: time for the case.
        versions: of torch, transformers, peft and this package.
    """

    kind: str
    name: str
    mode: str
    outcome: str
    where: str = ""
    message: str = ""
    error: float | None = None
    floor: float | None = None
    seconds: float = 0.0
    versions: Mapping[str, str] | None = None

    def key(self) -> tuple[Any, ...]:
        """Return what makes another run of the same case unnecessary."""
        return self.kind, self.name, self.mode, tuple(sorted((self.versions or {}).items()))
