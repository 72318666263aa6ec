"""Computes the norm by which each record is clipped from the certificates of all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward.bounds import EXTREME, NEGLIGIBLE, WORTHWHILE, squared_norms_of_many, stacked
from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook
from opacus_ac.grad_sample.one_backward.routed import RoutedBook
from opacus_ac.grad_sample.transfers import on_host


def certified(books: Sequence[ParameterBook | RoutedBook], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return for each record a bound of the norm of its contribution, and its squared norm for each parameter.

    If the bound is far above the norm, because terms cancel, or if values are too large to be squared in float32, the
    gradient of the record is computed in float64, both for the norm and for the sum.

    The values of all parameters come from the device in one transfer. Such records cost one more, and so do records
    whose gradient is zero.

    Args:
        books: the books of the P parameters that one backward pass has used.
        weights: weights of these parameters.

    Returns:
        The bounds ``[B]`` and the squared norms ``[P, B]``, in float64 on the CPU.

    Raises:
        ValueError: If a tensor was written after a norm was computed from it.
    """
    of_many = squared_norms_of_many([book.only_rows for book in books])
    known = stacked([book.certificate(own) for book, own in zip(books, of_many, strict=True)])
    bounds, squares = known.bounds(), known.squares.clamp(min=0)
    factors = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    norm = _total(squares, factors).sqrt()
    excess = factors * (bounds - squares.sqrt())
    doubtful = (excess > WORTHWHILE * norm) & (factors * bounds > NEGLIGIBLE) | (known.largest > EXTREME)
    kept = torch.tensor([[book.rows is not None] for book in books])
    bounds = torch.where(doubtful & kept, known.bounds_written_down(), bounds)
    _write_down(books, (doubtful & ~kept).nonzero().tolist(), bounds, squares)
    _find_zeros(books, (norm == 0).nonzero().flatten().tolist(), bounds)
    return _total(bounds.square(), factors).sqrt(), squares


def _write_down(
    books: Sequence[ParameterBook | RoutedBook], doubtful: Sequence[Sequence[int]], bounds: Tensor, squares: Tensor
) -> None:
    """Compute gradients in float64, and write their norms into bounds and squared norms ``[P, B]``.

    Args:
        books: the P books.
        doubtful: pairs of a number of a book and a record.
        bounds: overwritten where a gradient was computed.
        squares: the same.
    """
    if doubtful:
        found = on_host([books[book].write_down(record) for book, record in doubtful])
        for (book, record), (bound, square) in zip(doubtful, found.tolist(), strict=True):
            bounds[book, record], squares[book, record] = bound, square


def _find_zeros(books: Sequence[ParameterBook | RoutedBook], records: Sequence[int], bounds: Tensor) -> None:
    """Set the bounds ``[P, B]`` of gradients that are exactly zero to 0, such as those of a record without labels."""
    if records:
        zero = on_host([book.are_zero(records) for book in books])
        bounds[:, records] = torch.where(zero, 0.0, bounds[:, records])


def _total(squares: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over parameters of squared norms ``[P, B]`` times squared weights ``[P, 1]``, ``[B]``."""
    # A cumulative sum adds one by one, so the sum of a record does not depend on how many records there are.
    return (weights.square() * squares).cumsum(0)[-1]
