"""Upper bounds of gradient norms, which include the rounding of the norm and of the sum.

A record is clipped by the computed norm of its gradient ``G = sum_t l_t (x) r_t``. It then adds a computed ``c G`` to
the sum, where c is its factor. Let u be the unit roundoff of the arithmetic and ``D = sum_t |l_t| |r_t|``. In whatever
order a library adds up::

    | ||G||^2 - S |        <=  e D^2       S: the computed sum over Gram matrices
    || added - c G ||      <=  eta c D     added: the computed contribution

Then ``N = sqrt(sum_p ((1 + rho) sqrt(max(S_p, 0) + e_p D_p^2) + eta_p D_p)^2)`` is an upper bound: a record that is
clipped by N adds at most C, even if its terms cancel. The sum is over parameters p, and rho is the relative error of
computing and adding up a gradient that is written down. The error of a sum of n terms is at most n u times the sum of
their sizes, so sums are computed in pieces. For ordinary records D is about ``sqrt(T) ||G||``, and N exceeds the norm
by a share of about ``e T / 2 + eta sqrt(T)``.

The errors are constants of a layer. They depend neither on the size of the batch nor on its length: both may change
with one more record, and the norms of the other records would change with them. For the same reason, a gradient that is
written down because that is cheaper for long batches has the same bound as if it were not.

The bound is for the record's own contribution, including the effect of its size on the partial sums that it is added
to. The rounding of the other records' contributions is not in the bound. It is a property of the whole sum, for which
there is ``secure_mode=True``.

References:
    Higham, Accuracy and Stability of Numerical Algorithms, chapter 3; Casacuberta et al., arXiv 2207.10635 (sums).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward.reach import Reach, Sides, reaches
from opacus_ac.grad_sample.transfers import on_host

CHUNKS = ((384, 384), (640, 256), (1 << 60, 192))
"""Pairs: largest smaller dimension of the matrix, and number of terms of an inner product that are added up at a time.

Gram matrices are used for batches that are no longer than that dimension, and e matters more the longer they are.
"""

_SMALL = 1 << 13
"""Number of entries of a written-down gradient up to which its norm is computed together with others."""

ROWS = 2048
"""Number of rows of a weighted sum of outer products that are added up at a time."""

RECORDS = 64
"""Number of written-down gradients of a weighted sum that are added up at a time."""

BLOCK = 1024
"""Number of squares that are added up in the native type. Their sums are added up in float64."""

DOUBLINGS = 32
"""Number of levels of pairwise sums that the bounds allow for."""

EXTREME = 1e16
"""Squared norm of one side of an outer product above which values of the other side may be lost to underflow."""

WORTHWHILE = 0.05
"""Share of a record's norm above which the slack of one parameter's bound makes its gradient be computed in float64."""

NEGLIGIBLE = 1e-12
"""Norm below which a bound is not improved, because no clipping norm is so small."""


@functools.cache
def unit(dtype: torch.dtype, device: torch.device) -> float:
    """Return the unit roundoff of sums in ``dtype``, at least float32. It is doubled if the device may truncate."""
    u = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    return u if device.type == "cpu" else 2 * u


def chunk(width: int, other: int) -> int:
    """Return the number of terms of an inner product that are added up at a time.

    Args:
        width: width of the side.
        other: width of the other side of the outer product.
    """
    # Several layers share an input and its Gram matrix, so the number depends only on the width of that input.
    smaller = width if width <= _COMMON else min(width, other)
    return next(size for limit, size in CHUNKS if smaller <= limit)


_COMMON = 1024


def stretches(width: int, size: int) -> list[slice]:
    """Return slices of ``width`` terms of nearly the same length, with at most ``size`` terms each."""
    step = -(-width // max(1, -(-width // size)))
    return [slice(first, first + step) for first in range(0, width, step)] if width else [slice(0, 0)]


def inner_terms(width: int, other: int) -> int:
    """Return the error of an inner product in units of u: the terms of one slice plus the number of slices."""
    parts = stretches(width, chunk(width, other))
    return parts[0].stop + len(parts)


def sum_terms(limit: int) -> int:
    """Return the error of :func:`in_pairs`, in units of u, for parts of ``limit`` terms."""
    return limit + DOUBLINGS


def in_pairs(count: int, limit: int, part: Callable[[slice], Tensor]) -> Tensor:
    """Return the sum of ``count`` terms by pairwise sums. The error grows with ``log2(count / limit)``.

    Args:
        count: number of terms, at least 1.
        limit: number of terms of a part.
        part: returns the sum of the terms of a slice, in memory of its own.
    """

    def total(first: int, last: int) -> Tensor:
        if last - first == 1:
            return part(slice(first * limit, min(last * limit, count)))
        middle = (first + last) // 2
        left = total(first, middle)
        return left.add_(total(middle, last))

    return total(0, -(-count // limit))


def wide(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 or float64, because squares and sums need more than bfloat16."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared L2 norm of each row of ``[B, ...]`` in float64.

    Norms of ``BLOCK`` entries are computed in the native type, and their squares are added up in float64. A float32
    norm over ten million entries is wrong by 6e-3 on CPU, and clipped records could exceed C.
    """
    total = torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    if rows.numel() == 0:
        return total
    flat = wide(rows).reshape(rows.shape[0], -1)
    whole = flat.shape[1] // BLOCK * BLOCK
    for part in (flat[:, :whole].unflatten(1, (-1, BLOCK)) if whole else None, flat[:, whole:].unsqueeze(1)):
        if part is not None and part.numel():
            total += torch.linalg.vector_norm(part, dim=-1).double().square_().sum(1)
    return total


@dataclass
class Certificate:
    """Norms of one parameter's gradients, with their errors. Values are ``[B]`` in float64, on the device."""

    squares: Tensor
    """S, the squared norms as computed."""
    reach: Reach | None
    """D, the sum of the norms of the outer products, for some uses of the parameter; None for 0."""
    sides: tuple[Sides, ...]
    """The sides of its other uses, from which the rest of D is computed."""
    relative: float
    """rho."""
    norm_error: float
    """e."""
    sum_error: float
    """eta."""
    underflow: float
    """Part of the norm that may have been lost to underflow, if no side of an outer product is longer than 0."""


@dataclass
class Certificates:
    """The certificates of P parameters on the CPU: values ``[P, B]`` in float64, and errors ``[P, 1]``."""

    squares: Tensor
    """S, the squared norms as computed."""
    reach: Tensor
    """D, the sum of the norms of the outer products."""
    largest: Tensor
    """Largest squared norm of a side of an outer product."""
    relative: Tensor
    """rho."""
    norm_error: Tensor
    """e."""
    sum_error: Tensor
    """eta."""
    underflow: Tensor
    """See :class:`Certificate`."""

    @property
    def tiny(self) -> Tensor:
        """Part of the norm that may have been lost to underflow, ``[P, B]``."""
        return self.underflow * (1 + self.largest.sqrt())

    def bounds(self) -> Tensor:
        """Return N_p, the bound for each parameter, ``[P, B]``."""
        inexact = (self.squares.clamp(min=0) + self.norm_error * self.reach.square()).sqrt()
        return (1 + self.relative) * inexact + self.sum_error * self.reach + self.tiny

    def bounds_written_down(self) -> Tensor:
        """Return the bound for written-down gradients, ``[P, B]``. They are added as they are, with less error."""
        return (1 + self.relative) * self.squares.sqrt() + self.tiny


def squared_norms_of_many(rows: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return :func:`squared_norms` of small tensors, with one computation for all of the same shape and type.

    Most parameters of a model are biases and weights of norms. On a GPU, the norm of one of them takes as long to ask
    for as that of all.

    Returns:
        A list with None for large tensors, and for None.
    """
    found: list[Tensor | None] = [None] * len(rows)
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, values in enumerate(rows):
        if values is not None and values.shape[1:].numel() <= _SMALL:
            groups.setdefault((values.shape, values.dtype, values.device), []).append(place)
    for places in groups.values():
        together = torch.stack([values for place in places if (values := rows[place]) is not None])
        for place, squares in zip(places, squared_norms(together.flatten(0, 1)).view(together.shape[:2]), strict=True):
            found[place] = squares
    return found


def of_rows(rows: Tensor, squares: Tensor | None = None) -> Certificate:
    """Return the certificate of written-down gradients ``[B, ...]`` that are not sums of outer products.

    Args:
        rows: the gradients.
        squares: their squared norms; None to compute them.
    """
    squares = squared_norms(rows) if squares is None else squares
    entries = rows[0].numel() if len(rows) else 0
    underflow = smallest(rows.dtype) * entries**0.5
    return Certificate(squares, None, (), relative_error(rows, entries), 0.0, 0.0, underflow)


def relative_error(held: Tensor, entries: int) -> float:
    """Return rho of written-down gradients with so many entries, in the type of ``held``."""
    return (min(entries, BLOCK) // 2 + sum_terms(RECORDS) + 8) * unit(held.dtype, held.device)


@functools.cache
def smallest(dtype: torch.dtype) -> float:
    """Return the square root of the smallest normal number. A smaller number may have a square of zero."""
    return float(torch.finfo(torch.promote_types(dtype, torch.float32)).tiny ** 0.5)


def stacked(certificates: Sequence[Certificate]) -> Certificates:
    """Return the certificates of P parameters as one. There is one transfer, if all are on one device."""
    zero = torch.zeros(len(certificates[0].squares), dtype=torch.float64)
    parts = []
    for certificate, reach in zip(certificates, _reaches(certificates), strict=True):
        total, largest = (None, None) if reach is None else (reach.total, reach.largest)
        parts += [zero if part is None else part for part in (certificate.squares, total, largest)]
    values = on_host(parts)
    errors = [[c.relative, c.norm_error, c.sum_error, c.underflow] for c in certificates]
    columns = torch.tensor(errors, dtype=torch.float64).unsqueeze(2).unbind(1)
    return Certificates(*values.unflatten(0, (-1, 3)).unbind(1), *columns)


def _reaches(certificates: Sequence[Certificate]) -> list[Reach | None]:
    """Return the reach over all uses of each parameter; None for 0."""
    computed = iter(reaches([sides for certificate in certificates for sides in certificate.sides]))
    found = []
    for certificate in certificates:
        reach = certificate.reach
        for own in islice(computed, len(certificate.sides)):
            reach = own if reach is None else reach.plus(own)
        found.append(reach)
    return found
