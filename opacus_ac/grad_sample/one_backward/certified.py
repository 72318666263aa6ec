"""From what is known of each parameter to one norm per record by which it is clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward.bounds import EXTREME, NEGLIGIBLE, WORTHWHILE, stacked
from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook


def certified(books: Sequence[ParameterBook], weights: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """Return each record's upper bound of the norm of what it adds, and its squared norms by parameter as computed.

    A record for which the bound is far above its norm, because its terms cancel, or whose sides are too large to be
    squared in float32, is computed in float64, for the norm and for the sum.

    Args:
        books: of the parameters that took part in one backward pass.
        weights: of these parameters.

    Returns:
        ``[B]`` and, for each book, ``[B]``; float64 on the CPU.

    Raises:
        ValueError: what a norm was computed from was written to since.
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
    for record in (norm == 0).nonzero().reshape(-1).tolist():  # a record without labels, say
        for book, bound in zip(books, bounds, strict=True):
            if book.is_zero(record):
                bound[record] = 0.0
    return _total([bound.square() for bound in bounds], weights).sqrt(), squares


def _total(squares: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(squares[0])
    for square, weight in zip(squares, weights, strict=True):
        total += weight**2 * square
    return total
