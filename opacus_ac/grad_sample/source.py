"""What the step asks of per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

Place = Callable[[nn.Parameter], Tensor | None]


class GradientSource(Protocol):
    """What a way of computing per-sample gradients offers to the optimizer."""

    def finish_batch(self, weights: Sequence[float] | None = None) -> Tensor:
        """Return a norm of the gradient of each record of the physical batch, ``[B]`` float64. Private.

        It is an upper bound of the norm of what the record adds to the sum with the factor 1, rounding included; for a
        record whose gradients can be computed well it is within a per cent of it.

        Args:
            weights: one factor > 0 per parameter on its gradient; None for 1. The sums are those of the gradients as
                they are.
        """

    def parameter_squares(self) -> Tensor:
        """Return the squared gradient norms ``[B, P]`` of the finished batch, one column per parameter. Private.

        They are as computed, where :meth:`finish_batch` returns upper bounds, and those of the gradients as they are,
        without weights; float64.
        """

    @property
    def records(self) -> int:
        """Number of records that the last backward pass went through."""

    def record_gradients(self, record: int) -> Iterable[Tensor | None]:
        """Give what a record of the last backward pass adds to each parameter's gradient; None is zero. Private."""

    def accumulate(self, factors: Tensor) -> None:
        """Add ``sum_i factors[i] * g_i`` to the sums of the logical batch; records with factor 0 are left out."""

    def withdraw(self) -> None:
        """Take back :meth:`accumulate`: the step failed before its release began."""

    def settle(self) -> None:
        """Let go of the physical batch: another one of the same logical batch follows."""

    def sums(self, place: Place | None = None) -> Iterable[Tensor | None]:
        """Give the summed gradients of the logical batch, one per parameter; None is zero.

        Args:
            place: gives memory that may be used for a parameter's sum.
        """

    def clear(self, *, sums: bool) -> None:
        """Forget the physical batch, and with ``sums`` the logical batch too."""

    @property
    def backward_passes(self) -> int:
        """Number of backward passes since the last step, at least 1."""

    @property
    def merged_passes(self) -> bool:
        """Whether several forward passes of the model were taken for one, record by record."""


class OnlyTrained:
    """The sums of a source for the parameters that are trained now; those of frozen ones are passed over.

    Args:
        source: the source.
        parameters: all of its parameters, in its order.
    """

    def __init__(self, source: GradientSource, parameters: Sequence[nn.Parameter]) -> None:
        self._source, self._parameters = source, list(parameters)

    def settle(self) -> None:
        """As the source."""
        self._source.settle()

    def sums(self, place: Place | None = None) -> Iterable[Tensor | None]:
        """Give the sums of the trained parameters."""
        trained = [p.requires_grad for p in self._parameters]
        every = self._source.sums(None if place is None else lambda p: place(p) if p.requires_grad else None)
        return (total for total, wanted in zip(every, trained, strict=True) if wanted)


def squares_by_parameter(found: Mapping[int, Tensor], parameters: int) -> Tensor:
    """Return ``[B, P]`` from the columns that there are; parameters that took no part have 0."""
    columns = torch.zeros(len(next(iter(found.values()))), parameters, dtype=torch.float64)
    for index, squares in found.items():
        columns[:, index] = squares
    return columns
