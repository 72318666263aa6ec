"""Squared norms from Gram matrices: sums over the uses of a parameter, and over pairs of uses.

A second use of a parameter adds further positions t, so the squared norm is a sum over pairs of uses. An embedding that
is tied to a head adds a cross term between the two kinds of use.

References:
    Lee and Kifer, arXiv 2009.03106 (Gram norms); Li et al., arXiv 2110.05679.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import gram, half_products
from opacus_ac.grad_sample.one_backward.bounds import (
    ROWS,
    Certificate,
    chunk,
    inner_terms,
    relative_error,
    smallest,
    stretches,
    sum_terms,
    unit,
    wide,
)
from opacus_ac.grad_sample.one_backward.gram import GramCache, inner_by_pieces, products, products_by_tiles, sizes
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Lookup
from opacus_ac.grad_sample.one_backward.reach import Reach, Sides

T = TypeVar("T")

_GRAM_BYTES = 1 << 26
"""Memory for the ``[T, T]`` matrices of the records that are computed together, in bytes."""


@dataclass
class NormSums:
    """Sums over the uses of a parameter so far, ``[B]`` in float64 each. See :class:`Certificate` for their meaning."""

    squares: Tensor | None
    """None for 0; not used if the gradients are written down."""
    reach: Reach | None
    """The reach of some uses; None for 0."""
    sides: tuple[Sides, ...]
    """The sides of the other uses."""
    uses: int
    terms: int
    """Error of the inner products, in units of u."""
    underflow: float
    """Part of a norm that may be lost to underflow, if the other side has length 1."""
    split: float = 0.0
    """Error of weighted sums whose sides are multiplied in two parts."""

    def plus(self, other: NormSums) -> NormSums:
        """Return the sums for the uses of both. One of them has the cross terms."""
        return NormSums(
            _added(self.squares, other.squares, Tensor.add),
            _added(self.reach, other.reach, Reach.plus),
            self.sides + other.sides,
            self.uses + other.uses,
            max(self.terms, other.terms),
            self.underflow + other.underflow,
            max(self.split, other.split),
        )

    def certify(self, squares: Tensor, held: Tensor, entries: int) -> Certificate:
        """Return the certificate.

        Args:
            squares: squared norms ``[B]``.
            held: a tensor ``[B, ...]`` with the type of the computation.
            entries: number of entries of the parameter.
        """
        u = unit(held.dtype, held.device)
        return Certificate(
            squares,
            self.reach,
            self.sides,
            relative_error(held, entries),
            # One per cent more, because D is a computed value itself.
            1.01 * (self.terms + 8) * u,
            1.01 * ((sum_terms(ROWS) + self.uses + 8) * u + self.split),
            smallest(held.dtype) * self.underflow,
        )


def _added(one: T | None, other: T | None, add: Callable[[T, T], T]) -> T | None:
    """Return the sum of two values that may be None for 0."""
    return other if one is None else one if other is None else add(one, other)


def _slices(batch: int, rows: int, columns: int) -> list[slice]:
    """Return slices of records whose ``[rows, columns]`` matrices fit into ``_GRAM_BYTES``."""
    step = max(1, _GRAM_BYTES // max(1, 4 * rows * columns))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _tiles(batch: int, rows: int, columns: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield slices of records, rows and columns that together cover the matrices ``[B, rows, columns]``.

    A matrix of one record that does not fit into ``_GRAM_BYTES`` is cut into tiles.
    """
    whole = 4 * rows * columns <= _GRAM_BYTES
    height, width = (max(rows, 1), max(columns, 1)) if whole else (gram.TILE, gram.TILE)
    for records in _slices(batch, height, width):
        for across in stretches(rows, height):
            for along in stretches(columns, width):
                yield records, across, along


def dense_sums(term: Dense, cache: GramCache) -> NormSums:
    """Return the sums of one use by a dense layer, squared norms included."""
    batch, positions = term.left.shape[:2]
    terms = _chunks(term)
    if 4 * batch * positions**2 <= _GRAM_BYTES:
        return _dense_norm_sums(term, *products(cache.gram(term.left, terms[0]), cache.gram(term.right, terms[1])))
    # Matrices of long sequences are too large for the cache, and no other layer uses the same slices.
    side = min(positions, gram.TILE)
    parts = [products_by_tiles(term.left[i], term.right[i], terms) for i in _slices(batch, side, side)]
    squares, sides = zip(*parts, strict=True)
    together = Sides(torch.cat([s.left for s in sides]), torch.cat([s.right for s in sides]), squared=True)
    return _dense_norm_sums(term, torch.cat(squares), together)


def _chunks(term: Dense) -> tuple[int, int]:
    """Return for each side the number of terms of an inner product that are added up at a time."""
    height, width = term.left.shape[2], term.right.shape[2]
    return chunk(height, width), chunk(width, height)


def dense_sizes(term: Dense, cache: GramCache) -> NormSums:
    """Return the sums without squared norms, for gradients that are written down.

    Bounds must not depend on whether gradients are written down.
    """
    return _dense_norm_sums(term, None, Sides(cache.sizes(term.left), cache.sizes(term.right), squared=False))


def _dense_norm_sums(term: Dense, squares: Tensor | None, sides: Sides) -> NormSums:
    positions, height = term.left.shape[1:]
    width = term.right.shape[2]
    terms = inner_terms(height, width) + inner_terms(width, height)
    underflow = positions * (height + width + 1) ** 0.5
    return NormSums(squares, None, (sides,), 1, terms, underflow, half_products.sum_error(term.left, term.right))


def lookup_sums(term: Lookup, *, written_down: bool) -> NormSums:
    """Return the sums of one use by an embedding; without squared norms if gradients are ``written_down``."""
    lengths = sizes(term.right).double()
    squares = None if written_down else lookup_cross(term, term)
    reach = Reach(lengths.sum(1), None if written_down else lengths.amax(1).square())
    positions, width = term.right.shape[1:]
    return NormSums(squares, reach, (), 1, inner_terms(width, width), positions * (width + 1) ** 0.5)


def lookup_cross(one: Lookup, other: Lookup) -> Tensor:
    """Return ``sum_{s,t} [ids_s = ids'_t] <right_s, right'_t>`` for each record, ``[B]`` in float64."""
    total = _zeros(one.right)
    size = chunk(one.right.shape[2], one.right.shape[2])
    for i, rows, columns in _tiles(one.ids.shape[0], one.ids.shape[1], other.ids.shape[1]):
        same = one.ids[i, rows].unsqueeze(2) == other.ids[i, columns].unsqueeze(1)
        angles = inner_by_pieces(one.right[i, rows], other.right[i, columns], size)
        total[i] += angles.mul_(same).sum((1, 2), dtype=torch.float64)
    return total


def dense_cross(one: Dense, other: Dense) -> Tensor:
    """Return ``sum_{s,t} <left_s, left'_t> <right_s, right'_t>`` for each record, ``[B]`` in float64."""
    total = _zeros(one.right)
    for i, rows, columns in _tiles(one.left.shape[0], one.left.shape[1], other.left.shape[1]):
        left = inner_by_pieces(one.left[i, rows], other.left[i, columns], _chunks(one)[0])
        right = inner_by_pieces(one.right[i, rows], other.right[i, columns], _chunks(one)[1])
        total[i] += left.mul_(right).sum((1, 2), dtype=torch.float64)
    return total


def dense_lookup_cross(dense: Dense, lookup: Lookup) -> Tensor:
    """Return ``<G_dense, G_lookup> = sum_{s,t} left_s[ids_t] <right_s, e_t>`` for each record, ``[B]`` in float64."""
    total = _zeros(dense.right)
    for i, rows, columns in _tiles(dense.left.shape[0], dense.left.shape[1], lookup.ids.shape[1]):
        left, ids, right = dense.left[i, rows], lookup.ids[i, columns], dense.right[i, rows]
        picked = left.gather(2, ids.unsqueeze(1).expand(-1, left.shape[1], -1))
        angles = inner_by_pieces(right, lookup.right[i, columns], _chunks(dense)[1])
        total[i] += angles.mul_(wide(picked)).sum((1, 2), dtype=torch.float64)
    return total


def _zeros(held: Tensor) -> Tensor:
    return torch.zeros(held.shape[0], dtype=torch.float64, device=held.device)
