"""Norms that are upper bounds: what rounding may have taken from a norm, and what it may add to a sum.

A record is clipped by a computed norm of ``G = sum_t l_t (x) r_t``, and what it adds to the sum is a computed ``c G``.
With ``D = sum_t |l_t| |r_t|`` and the unit roundoff u of the arithmetic, whatever the order in which a library adds
up::

    | ||G||^2 - S |        <=  e D^2       S: the computed sum over Gram matrices
    || added - c G ||      <=  eta c D     added: the computed contribution

so that ``N = sqrt(sum_p ((1 + rho) sqrt(max(S_p, 0) + e_p D_p^2) + eta_p D_p)^2)`` is a norm by which every record adds
at most C, cancelling ones included; rho is what computing and adding up a gradient that is written down costs. A sum of
n terms is off by at most n u of the sum of their sizes, so sums are computed in pieces. D is about ``sqrt(T) ||G||``
for ordinary records, whose norm is then too large by about ``e T / 2 + eta sqrt(T)`` of itself.

The errors are constants of the layer: they depend neither on the size of the batch nor on its length, of which a record
more or less is a part, because the norms of the others would move with them. For the same reason a gradient that is
written down because that is cheaper for long batches has the bound that it would have otherwise.

What is bounded is the record's own contribution, including what its size does to the partial sums that it goes through.
Not in the bound is how the others' contributions are rounded beside it, which is a property of the whole sum
(``secure_mode=True``).

References:
    Higham, Accuracy and Stability of Numerical Algorithms, chapter 3; Casacuberta et al., arXiv 2207.10635 (sums).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHUNKS = ((384, 384), (640, 256), (1 << 60, 192))
"""Terms of an inner product that are added up at a time, by the smaller dimension of the matrix: Gram matrices are for
batches no longer than that, and the longer they are, the more e counts."""

ROWS = 2048
"""Rows of a weighted sum of outer products that are added up at a time."""

RECORDS = 64
"""Gradients that are written down, of a weighted sum, that are added up at a time."""

BLOCK = 1024
"""Squares that are added up in the native type; from there on it is float64."""

DOUBLINGS = 32
"""Parts of a sum are added up in pairs: how often that is allowed for."""

EXTREME = 1e16
"""Squared norm of one side of an outer product above which the other's square, or a factor times it, may be lost to
underflow."""

WORTHWHILE = 0.05
"""Share of a record's norm by which the bound of one parameter may exceed its norm before it is computed in float64."""

NEGLIGIBLE = 1e-12
"""Norm of a record below which a bound is not worth a better one: no clipping norm is so small."""


def unit(dtype: torch.dtype, device: torch.device) -> float:
    """Unit roundoff of sums in ``dtype`` or better; doubled where the device may truncate instead of rounding."""
    u = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    return u if device.type == "cpu" else 2 * u


def chunk(width: int, other: int) -> int:
    """Return how many terms of inner products of one side are added up at a time, beside a side of another width."""
    # Of a model's own width, whatever the other side is: the inputs of several layers are the same, and so are their
    # matrices.
    smaller = width if width <= _COMMON else min(width, other)
    return next(size for limit, size in CHUNKS if smaller <= limit)


_COMMON = 1024


def stretches(width: int, size: int) -> list[slice]:
    """Return stretches of nearly the same length, of at most ``size`` terms."""
    step = -(-width // max(1, -(-width // size)))
    return [slice(first, first + step) for first in range(0, width, step)] if width else [slice(0, 0)]


def inner_terms(width: int, other: int) -> int:
    """Return the error of an inner product in units of u: terms of one stretch, and the stretches."""
    parts = stretches(width, chunk(width, other))
    return parts[0].stop + len(parts)


def sum_terms(limit: int) -> int:
    """Return the error of :func:`in_pairs`, in units of u, for parts of ``limit`` terms."""
    return limit + DOUBLINGS


def in_pairs(count: int, limit: int, part: Callable[[slice], Tensor]) -> Tensor:
    """Return the sum of ``part`` over stretches of ``limit`` of ``count`` terms.

    The error grows with ``log2(count / limit)``.

    Args:
        count: number of terms, at least 1.
        limit: terms of a part.
        part: computes a part in memory of its own.
    """

    def total(first: int, last: int) -> Tensor:
        if last - first == 1:
            return part(slice(first * limit, min(last * limit, count)))
        middle = (first + last) // 2
        left = total(first, middle)
        return left.add_(total(middle, last))

    return total(0, -(-count // limit))


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 or better: squares and sums of bfloat16 numbers are not kept in bfloat16."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared L2 norm of each row of ``[B, ...]`` in float64.

    Norms of ``BLOCK`` entries in the native type, then float64: a flat float32 norm over ten million elements is wrong
    by 6e-3 on CPU, which would let clipped records exceed C.
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
    """What is known of the norms of one parameter's gradients, record by record.

    Values are ``[B]`` in float64, on the device of the records until :func:`stacked`.
    """

    squares: Tensor
    """S, the squared norms as computed."""
    reach: Tensor
    """D, the sum of the norms of the outer products."""
    tiny: Tensor
    """What underflow may have taken from the norm."""
    largest: Tensor
    """Largest squared norm of a side of an outer product; 0 where there is none."""
    relative: float
    """rho."""
    norm_error: float
    """e."""
    sum_error: float
    """eta."""

    def bounds(self) -> Tensor:
        """Return N_p: what clipping has to count for this parameter, ``[B]``."""
        inexact = (self.squares.clamp(min=0) + self.norm_error * self.reach.square()).sqrt()
        return (1 + self.relative) * inexact + self.sum_error * self.reach + self.tiny

    def bounds_written_down(self) -> Tensor:
        """Return the same for gradients that are written down: they are what is added, whatever was rounded before."""
        return (1 + self.relative) * self.squares.sqrt() + self.tiny


def of_rows(rows: Tensor) -> Certificate:
    """Of gradients ``[B, ...]`` that are written down and no sums of outer products."""
    squares = squared_norms(rows)
    nothing = torch.zeros_like(squares)
    entries = rows[0].numel() if len(rows) else 0
    tiny = torch.full_like(squares, smallest(rows.dtype) * entries**0.5)
    return Certificate(squares, nothing, tiny, nothing, relative_error(rows, entries), 0.0, 0.0)


def relative_error(held: Tensor, entries: int) -> float:
    """Return rho of gradients of so many entries that are written down in the type of ``held``."""
    return (min(entries, BLOCK) // 2 + sum_terms(RECORDS) + 8) * unit(held.dtype, held.device)


def smallest(dtype: torch.dtype) -> float:
    """Square root of the smallest normal number: what is smaller may have a square of zero."""
    return float(torch.finfo(torch.promote_types(dtype, torch.float32)).tiny ** 0.5)


def stacked(certificates: list[Certificate]) -> list[Certificate]:
    """Return the same on the CPU, in one transfer for each device."""
    values = [torch.stack([c.squares, c.reach, c.tiny, c.largest]) for c in certificates]
    if len({v.device for v in values}) == 1:
        values = list(torch.stack(values).cpu())
    return [
        replace(c, squares=v[0], reach=v[1], tiny=v[2], largest=v[3])
        for v, c in zip((v.cpu() for v in values), certificates, strict=True)
    ]
