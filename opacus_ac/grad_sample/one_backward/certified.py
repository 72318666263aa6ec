"""Computes the norm by which each record is clipped from the certificates of all parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward.bounds import EXTREME, NEGLIGIBLE, WORTHWHILE, stacked
from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook
from opacus_ac.grad_sample.one_backward.routed import RoutedBook


def certified(books: Sequence[ParameterBook | RoutedBook], weights: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """Return for each record a bound of the norm of its contribution, and its squared norm for each parameter.

    If the bound is far above the norm, because terms cancel, or if values are too large to be squared in float32, the
    gradient of the record is computed in float64, both for the norm and for the sum.

    Args:
        books: the books of the parameters that one backward pass has used.
        weights: weights of these parameters.

    Returns:
        The bounds ``[B]`` and, for each book, the squared norms ``[B]``, in float64 on the CPU.

    Raises:
        ValueError: If a tensor was written after a norm was computed from it.
    """
    found = stacked([book.certificate() for book in books])
    bounds = [certificate.bounds() for certificate in found]
    squares = [certificate.squares.clamp(min=0) for certificate in found]
    norm = _total(squares, weights).sqrt()
    for book, known, bound, square, weight in zip(books, found, bounds, squares, weights, strict=True):
        excess = weight * (bound - square.sqrt())
        doubtful = (excess > WORTHWHILE * norm) & (weight * bound > NEGLIGIBLE) | (known.largest > EXTREME)
        if book.rows is not None:
            torch.where(doubtful, known.bounds_written_down(), bound, out=bound)
            continue
        for record in doubtful.nonzero().reshape(-1).tolist():
            bound[record], square[record] = book.write_down(record)
    for record in (norm == 0).nonzero().reshape(-1).tolist():  # such as a record without labels
        for book, bound in zip(books, bounds, strict=True):
            if book.is_zero(record):
                bound[record] = 0.0
    return _total([bound.square() for bound in bounds], weights).sqrt(), squares


def _total(squares: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(squares[0])
    for square, weight in zip(squares, weights, strict=True):
        total += weight**2 * square
    return total
