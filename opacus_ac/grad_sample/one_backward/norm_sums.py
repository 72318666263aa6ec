"""What squared norms are made of: sums over the uses of a parameter and over pairs of uses, from Gram matrices.

Using a parameter again is concatenation along t, so that the squared norm is a sum over pairs of uses. Tying an
embedding to a head adds the cross term between the two kinds.

References:
    Lee and Kifer, arXiv 2009.03106 (Gram norms); Li et al., arXiv 2110.05679.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward.bounds import (
    ROWS,
    Certificate,
    chunk,
    inner_terms,
    relative_error,
    smallest,
    sum_terms,
    unit,
    wide,
)
from opacus_ac.grad_sample.one_backward.gram import Gram, GramCache, inner_by_pieces, products, sizes
from opacus_ac.grad_sample.one_backward.outer_products import Dense, Lookup

_GRAM_BYTES = 1 << 26
"""Memory for the ``[T, T]`` matrices of as many records as are worked on at once."""


@dataclass
class NormSums:
    """Sums over the uses of a parameter so far, as in :class:`Certificate`; ``[B]`` float64."""

    squares: Tensor
    """Meaningless where the gradients are written down."""
    reach: Tensor
    largest: Tensor
    uses: int
    terms: int
    """Error of the inner products, in units of u."""
    underflow: float
    """What underflow may take from a norm, beside sides of length 1."""

    def plus(self, other: NormSums) -> NormSums:
        """The same for the uses of both; the cross terms are in one of them."""
        return NormSums(
            self.squares + other.squares,
            self.reach + other.reach,
            torch.maximum(self.largest, other.largest),
            self.uses + other.uses,
            max(self.terms, other.terms),
            self.underflow + other.underflow,
        )

    def certify(self, squares: Tensor, held: Tensor, entries: int) -> Certificate:
        """The certificate for known squared norms, where ``held`` ``[B, ...]`` has the type that is computed in."""
        u = unit(held.dtype, held.device)
        return Certificate(
            squares,
            self.reach,
            smallest(held.dtype) * self.underflow * (1 + self.largest.sqrt()),
            self.largest,
            relative_error(held, entries),
            # A little more, because D itself is computed.
            1.01 * (self.terms + 8) * u,
            1.01 * (sum_terms(ROWS) + self.uses + 8) * u,
        )


def _slices(batch: int, *positions: int) -> list[slice]:
    """Stretches of records whose ``[T, T']`` matrices fit into the memory set aside for them."""
    step = max(1, _GRAM_BYTES // max(1, 4 * math.prod(positions)))
    return [slice(start, start + step) for start in range(0, batch, step)]


def dense_sums(term: Dense, cache: GramCache) -> NormSums:
    """Return the sums of one use by a dense layer, squared norms included."""
    batch, positions = term.left.shape[:2]
    slices = _slices(batch, positions, positions)
    terms = _chunks(term)
    if len(slices) == 1:
        return _dense_norm_sums(term, *products(cache.gram(term.left, terms[0]), cache.gram(term.right, terms[1])))
    # Slices of long sequences: too large to hold, and nobody shares them.
    parts = [products(Gram.of(term.left[i], terms[0]), Gram.of(term.right[i], terms[1])) for i in slices]
    return _dense_norm_sums(term, *(torch.cat(values) for values in zip(*parts, strict=True)))


def _chunks(term: Dense) -> tuple[int, int]:
    """Terms of the inner products of each side that are added up at a time."""
    height, width = term.left.shape[2], term.right.shape[2]
    return chunk(height, width), chunk(width, height)


def dense_sizes(term: Dense, cache: GramCache) -> NormSums:
    """Return the sums without squared norms, for gradients that are written down.

    The bounds of these must not depend on the route.
    """
    left, right = cache.sizes(term.left), cache.sizes(term.right)
    reach = (left * right).sum(1)
    return _dense_norm_sums(term, torch.zeros_like(reach), reach, torch.zeros_like(reach))


def _dense_norm_sums(term: Dense, squares: Tensor, reach: Tensor, largest: Tensor) -> NormSums:
    positions, height = term.left.shape[1:]
    width = term.right.shape[2]
    terms = inner_terms(height, width) + inner_terms(width, height)
    return NormSums(squares, reach, largest, 1, terms, positions * (height + width + 1) ** 0.5)


def lookup_sums(term: Lookup, *, written_down: bool) -> NormSums:
    """Return the sums of one use by an embedding, without squared norms where gradients are ``written_down``."""
    lengths = sizes(term.right)
    squares = torch.zeros_like(lengths[:, 0]) if written_down else lookup_cross(term, term)
    largest = torch.zeros_like(squares) if written_down else lengths.amax(1).square()
    positions, width = term.right.shape[1:]
    return NormSums(squares, lengths.sum(1), largest, 1, inner_terms(width, width), positions * (width + 1) ** 0.5)


def lookup_cross(one: Lookup, other: Lookup) -> Tensor:
    """``sum_{s,t} [ids_s = ids'_t] <right_s, right'_t>`` per record, ``[B]`` float64."""
    parts = []
    for i in _slices(one.ids.shape[0], one.ids.shape[1], other.ids.shape[1]):
        same = one.ids[i].unsqueeze(2) == other.ids[i].unsqueeze(1)
        angles = inner_by_pieces(one.right[i], other.right[i], chunk(one.right.shape[2], one.right.shape[2]))
        parts.append((same * angles).sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)


def dense_cross(one: Dense, other: Dense) -> Tensor:
    """``sum_{s,t} <left_s, left'_t> <right_s, right'_t>`` per record, ``[B]`` float64."""
    parts = []
    for i in _slices(one.left.shape[0], one.left.shape[1], other.left.shape[1]):
        left = inner_by_pieces(one.left[i], other.left[i], _chunks(one)[0])
        right = inner_by_pieces(one.right[i], other.right[i], _chunks(one)[1])
        parts.append((left * right).sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)


def dense_lookup_cross(dense: Dense, lookup: Lookup) -> Tensor:
    """``<G_dense, G_lookup>`` per record: ``sum_{s,t} left_s[ids_t] <right_s, e_t>``, ``[B]`` float64."""
    parts = []
    for i in _slices(dense.left.shape[0], dense.left.shape[1], lookup.ids.shape[1]):
        ids, right = lookup.ids[i], wide(dense.right[i])
        picked = dense.left[i].gather(2, ids.unsqueeze(1).expand(-1, dense.left.shape[1], -1))
        angles = inner_by_pieces(right, wide(lookup.right[i]).to(right.dtype), _chunks(dense)[1])
        parts.append((wide(picked) * angles).sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)
