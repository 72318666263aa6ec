"""The interface through which the optimizer uses per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

Place = Callable[[nn.Parameter], Tensor | None]


class GradientSource(Protocol):
    """A way of computing per-sample gradients, as the optimizer sees it."""

    def finish_batch(self, weights: Sequence[float] | None = None) -> Tensor:
        """Return a bound of the gradient norm of each record of the physical batch, ``[B]`` float64; private.

        With the factor 1, a record adds at most this norm to the sum, rounding included. The bound is within a per cent
        of the gradient norm, unless the gradient of a record suffers much from rounding.

        Args:
            weights: one factor > 0 per parameter, by which its gradient is multiplied in the norm; None for 1. The sums
                are of the gradients without these factors.
        """

    def parameter_squares(self) -> Tensor:
        """Return the squared gradient norms of the finished batch, one column per parameter, ``[B, P]``; private.

        They are in float64, without weights, and as computed, while :meth:`finish_batch` returns upper bounds.
        """

    @property
    def records(self) -> int:
        """Number of records of the last backward pass."""

    def record_gradients(self, record: int) -> Iterable[Tensor | None]:
        """Return the part of each parameter's ordinary gradient that is from one record (None for zero); private.

        Args:
            record: number of the record in the last backward pass.
        """

    def accumulate(self, factors: Tensor) -> None:
        """Add ``sum_i factors[i] * g_i`` to the sums of the logical batch. Records with factor 0 are left out."""

    def withdraw(self) -> None:
        """Undo :meth:`accumulate`, after a failure of the step before its release began."""

    def settle(self) -> None:
        """Forget the physical batch, because another one of the same logical batch follows."""

    def sums(self, place: Place | None = None) -> Iterable[Tensor | None]:
        """Return the summed gradients of the logical batch, one per parameter (None for zero).

        Args:
            place: returns memory that may be used for a parameter's sum.
        """

    def clear(self, *, sums: bool) -> None:
        """Forget the physical batch; with ``sums`` also the logical batch."""

    @property
    def backward_passes(self) -> int:
        """Number of backward passes since the last step, at least 1."""

    @property
    def merged_passes(self) -> bool:
        """Whether record i of several forward passes of the model counted as one record."""


class OnlyTrained:
    """The sums of a source for parameters that are trained at present, without those of frozen parameters.

    Args:
        source: the source.
        parameters: all parameters of the source, in its order.
    """

    def __init__(self, source: GradientSource, parameters: Sequence[nn.Parameter]) -> None:
        self._source, self._parameters = source, list(parameters)

    def settle(self) -> None:
        """Forget the physical batch, as the source does."""
        self._source.settle()

    def sums(self, place: Place | None = None) -> Iterable[Tensor | None]:
        """Return the sums of the trained parameters."""
        trained = [p.requires_grad for p in self._parameters]
        every = self._source.sums(None if place is None else lambda p: place(p) if p.requires_grad else None)
        return (total for total, wanted in zip(every, trained, strict=True) if wanted)


def squares_by_parameter(found: Mapping[int, Tensor], parameters: int) -> Tensor:
    """Return ``[B, P]`` from single columns. Parameters without a column have 0.

    Args:
        found: columns ``[B]`` by number of the parameter.
        parameters: number of parameters P.
    """
    columns = torch.zeros(len(next(iter(found.values()))), parameters, dtype=torch.float64)
    for index, squares in found.items():
        columns[:, index] = squares
    return columns
