"""Per-sample gradients of one parameter without ever writing them down: sums of outer products.

Every use of a matrix parameter adds ``sum_t left_t (x) right_t`` to a record's gradient. For a dense layer both sides
are dense (output gradient and input), for an embedding the left side is one-hot (the token id). Using a parameter
again is concatenation along t; tying an embedding to a head adds the cross term between the two kinds. Norms come from
``[T, T]`` Gram matrices or, where that is cheaper, from the materialised gradient, which is then kept. What rounding can do to
either is known (:mod:`bounds`); a record for which it is too much is computed in float64 (:mod:`written_down`).

References:
    Bu et al., arXiv 2210.00038 (book-keeping); Lee and Kifer, arXiv 2009.03106 (Gram norms); Li et al., arXiv 2110.05679.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import written_down
from opacus_ac.grad_sample.one_backward.bounds import (
    RECORDS,
    ROWS,
    Certificate,
    chunk,
    in_pairs,
    inner_terms,
    of_rows,
    relative_error,
    smallest,
    sum_terms,
    unit,
    wide,
)
from opacus_ac.grad_sample.one_backward.bounds import squared_norms as squared_norms
from opacus_ac.grad_sample.one_backward.gram import Gram, GramCache, inner_by_pieces, products, sizes
from opacus_ac.grad_sample.one_backward.matmul import add_outer, inner, may_be_faster
from opacus_ac.grad_sample.unchanged import Unchanged

KEEP_FACTOR = 1.0
"""A dense gradient ``[I, J]`` is materialised when ``I J <= KEEP_FACTOR T (I + J)``.

``T (I + J)`` numbers is what book-keeping has to hold until the clip factors are known. Materialising costs the one
product that the weight gradient needs anyway, and afterwards the two factors can go; the Gram route needs the two Grams
and then that product. A factor of 2 would save a few percent of time on small models and cost more memory than
ordinary training has.
"""

_GRAM_BYTES = 1 << 26
_PIECE = 1 << 20
"""Numbers of a result that are computed at once where it is added to another."""


@dataclass
class Dense:
    """``G_i = sum_t left[i, t] (x) right[i, t]``, the gradient of a weight stored ``[I, J]``."""

    left: Tensor
    """``[B, T, I]``."""
    right: Tensor
    """``[B, T, J]``."""

    @property
    def worth_keeping(self) -> bool:
        """Whether the materialised gradient is cheaper than its factors."""
        positions, rows, columns = self.left.shape[1], self.left.shape[2], self.right.shape[2]
        return keeps(positions, rows, columns)


@dataclass
class Lookup:
    """``G_i = sum_t onehot(ids[i, t]) (x) right[i, t]``, the gradient of an embedding table ``[V, D]``."""

    ids: Tensor
    """``[B, T]`` integers."""
    right: Tensor
    """``[B, T, D]``."""


@dataclass
class Rows:
    """Materialised per-sample gradients."""

    values: Tensor
    """``[B, *shape]``."""


Term = Dense | Lookup | Rows


class Weights:
    """One weight per record, ready for many sums.

    Records of weight 0 are left out, not multiplied by zero: one that is not finite must leave no trace.

    Args:
        values: ``[B]``, on the device of the records.
    """

    def __init__(self, values: Tensor) -> None:
        self._all = values
        kept = values.nonzero().reshape(-1)
        self._kept = None if kept.numel() == values.numel() else kept
        self.values = values if self._kept is None else values[kept]

    def pick(self, records: Tensor) -> Tensor:
        """The records ``[B, ...]`` that have a weight."""
        return records if self._kept is None else records[self._kept]

    def of(self, record: int) -> float:
        """The weight of one record."""
        return float(self._all[record])

    def without(self, records: list[int]) -> Weights:
        """The same, but for some records, which have no weight."""
        if not records:
            return self
        values = self._all.clone()
        values[records] = 0
        return Weights(values)


def keeps(positions: int, rows: int, columns: int) -> bool:
    """Whether a dense gradient ``[rows, columns]`` of ``positions`` outer products is materialised."""
    return rows * columns <= KEEP_FACTOR * positions * (rows + columns)


@dataclass
class ParameterBook:
    """What the records of one backward pass contribute to the gradient of one parameter.

    Squared norms are added up as the terms arrive, while what they are computed from is still in the processor's cache.
    """

    shape: torch.Size
    dense: list[Dense] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    rows: Tensor | None = None
    apart: list[int] = field(default_factory=list)
    """Records whose gradients are computed in float64, for their norm and for the sum."""
    _found: _Found | None = None
    """Meaningless once there are rows."""
    _used: Unchanged = field(default_factory=Unchanged)

    def add(self, term: Term, cache: GramCache, path: str = "") -> None:
        """Add one use of the parameter, by the module ``path``."""
        if isinstance(term, Rows):
            self._add_rows(term.values, path)
        elif isinstance(term, Dense) and (self.rows is not None or (not self.dense and term.worth_keeping)):
            self._keep(term)
            self._count(_dense_sizes(term, cache), [])
        elif isinstance(term, Dense):
            crosses = [_dense_cross(term, other) for other in self.dense]
            crosses += [_cross(term, other) for other in self.lookups]
            self._count(_dense_squares(term, cache), crosses)
            self.dense.append(term)
            self._used.note(_described(path), term.left, term.right)
        else:
            crosses = [] if self.rows is not None else [_lookup_cross(term, other) for other in self.lookups]
            crosses += [] if self.rows is not None else [_cross(other, term) for other in self.dense]
            self._count(_lookup_squares(term, written_down=self.rows is not None), crosses)
            self.lookups.append(term)
            self._used.note(_described(path), term.ids, term.right)

    def _count(self, own: _Found, crosses: list[Tensor]) -> None:
        for cross in crosses:
            own.squares = own.squares + 2 * cross
        self._found = own if self._found is None else self._found.plus(own)

    def _add_rows(self, values: Tensor, path: str) -> None:
        values = wide(values)
        if self.rows is None:
            self.rows = values
            self._used.note(_described(path), values)
        else:
            # Not in place: a rule may have returned a view of something that is still needed.
            self.rows = self.rows + values

    def _keep(self, term: Dense) -> None:
        rows = inner(wide(term.left).transpose(1, 2), wide(term.right).transpose(1, 2))
        self.rows = rows if self.rows is None else self.rows + rows.view(self.rows.shape)

    def check_unchanged(self) -> None:
        """Raise ``ValueError`` when what the norms were computed from was written to since."""
        self._used.check()

    def certificate(self) -> Certificate:
        """What is known of each record's norm.

        Raises:
            ValueError: what it was computed from was written to since.
        """
        self.check_unchanged()
        if self.rows is not None:
            self._materialise()
            alone = of_rows(self.rows)
            if self._found is None:
                return alone
            found = self._found.certify(alone.squares, self.rows, self.shape.numel())
            return replace(found, tiny=found.tiny + alone.tiny)
        assert self._found is not None
        held = self.dense[0].left if self.dense else self.lookups[0].right
        return self._found.certify(self._found.squares, held, self.shape.numel())

    def write_down(self, record: int) -> tuple[float, float]:
        """Compute one record's gradient in float64 from now on, and return a bound of its norm, and the squared norm."""
        self.apart.append(record)
        held = self.dense[0].left if self.dense else self.lookups[0].right
        return written_down.bound(self.shape, self.dense, self.lookups, record, unit(held.dtype, held.device))

    def is_zero(self, record: int) -> bool:
        """Whether nothing but zeros was added up for a record."""
        if self.rows is not None:
            return not bool(self.rows[record].any())
        sides = [(d.left[record], d.right[record]) for d in self.dense]
        whole = all(not bool(left.any()) or not bool(right.any()) for left, right in sides)
        return whole and not any(bool(entry.right[record].any()) for entry in self.lookups)

    def _materialise(self) -> None:
        """Fold everything into ``rows``: once part of the gradient is written down, the rest is added to it."""
        assert self.rows is not None
        batch = self.rows.shape[0]
        for term in self.dense:
            self._keep(term)
        for lookup in self.lookups:
            rows, width = self.shape
            first = torch.arange(batch, device=lookup.ids.device).unsqueeze(1) * rows
            flat = self.rows.reshape(batch * rows, width).clone()
            flat.index_add_(0, (lookup.ids + first).reshape(-1), wide(lookup.right).reshape(-1, width).to(flat.dtype))
            self.rows = flat.view(batch, rows, width)
        self.dense, self.lookups = [], []

    def weighted_sum(self, weights: Weights, out: Tensor) -> None:
        """Write ``sum_i weights[i] G_i`` into ``out``, of the parameter's shape; contiguous.

        In float64 where ``out`` is.

        Raises:
            ValueError: what the norms were computed from was written to since.
        """
        self.check_unchanged()
        if self.rows is not None:
            add_rows(weights.pick(self.rows), weights.values, out.zero_(), first=True)
            return
        together = weights.without(self.apart)
        factors = together.values.to(device=out.device, dtype=out.dtype)
        self._add_terms(together, out, factors.view(-1, 1, 1))
        for record in self.apart:
            if weights.of(record) != 0:
                for part, block in written_down.blocks(self.shape, self.dense, self.lookups, record):
                    out[part] += block.mul_(weights.of(record)).to(out)

    def _add_terms(self, weights: Weights, out: Tensor, factors: Tensor) -> None:
        """Write the weighted sum of all outer products into ``out``; factors ``[kept, 1, 1]`` in its type."""
        first = True
        for d in self.dense if len(factors) else []:
            left, right = wide(weights.pick(d.left)).to(out.dtype), wide(weights.pick(d.right)).to(out.dtype)
            _add_product(out, left, right, factors, first=first)
            first = False
        if first:
            out.zero_()
        for entry in self.lookups if len(factors) else []:
            values = weights.pick(entry.right).double() * factors.double()
            _add_lookups(weights.pick(entry.ids).reshape(-1), values.flatten(0, 1), out)

    @property
    def routes(self) -> str:
        """How the norm is computed, for tests and reports."""
        names = ["kept"] * (self.rows is not None) + ["gram"] * bool(self.dense) + ["lookup"] * bool(self.lookups)
        return "+".join(names)


@dataclass
class _Found:
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

    def plus(self, other: _Found) -> _Found:
        """The same for the uses of both; the cross terms are in one of them."""
        return _Found(
            self.squares + other.squares,
            self.reach + other.reach,
            torch.maximum(self.largest, other.largest),
            self.uses + other.uses,
            max(self.terms, other.terms),
            self.underflow + other.underflow,
        )

    def certify(self, squares: Tensor, held: Tensor, entries: int) -> Certificate:
        """The certificate for squared norms that are known by now, and values ``[B, ...]`` of the type that is computed in."""
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


def add_rows(rows: Tensor, factors: Tensor, out: Tensor, *, first: bool = False) -> None:
    """Add ``sum_i factors[i] rows[i]`` to ``out``, in its type; rows ``[B, ...]``; ``first``: it is zero."""
    flat, total, factors = rows.unsqueeze(-1).flatten(1), out.view(-1), factors.to(out)
    if out.dtype != flat.dtype:  # no copy of all of them in another type
        for row, factor in zip(flat, factors.tolist(), strict=True):
            total.add_(row.to(out.dtype), alpha=factor)
    elif len(flat) <= RECORDS and first:
        torch.mv(flat.t(), factors, out=total)
    elif len(flat):
        for start in range(0, len(total), _PIECE):
            entries = slice(start, start + _PIECE)
            product = partial(_weighted, flat[:, entries], factors)
            total[entries] += in_pairs(len(flat), RECORDS, product)


def _weighted(rows: Tensor, factors: Tensor, records: slice) -> Tensor:
    return torch.mv(rows[records].t(), factors[records])


def _described(path: str) -> str:
    return f"the input of {path or 'the model'}, or the gradient at its output,"


def _slices(batch: int, *positions: int) -> list[slice]:
    """Stretches of records whose ``[T, T']`` matrices fit into the memory set aside for them."""
    step = max(1, _GRAM_BYTES // max(1, 4 * math.prod(positions)))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _dense_squares(term: Dense, cache: GramCache) -> _Found:
    batch, positions = term.left.shape[:2]
    slices = _slices(batch, positions, positions)
    sizes = _chunks(term)
    if len(slices) == 1:
        return _dense_found(term, *products(cache.gram(term.left, sizes[0]), cache.gram(term.right, sizes[1])))
    # Slices of long sequences: too large to hold, and nobody shares them.
    parts = [products(Gram.of(term.left[i], sizes[0]), Gram.of(term.right[i], sizes[1])) for i in slices]
    return _dense_found(term, *(torch.cat(values) for values in zip(*parts, strict=True)))


def _chunks(term: Dense) -> tuple[int, int]:
    """Terms of the inner products of each side that are added up at a time."""
    height, width = term.left.shape[2], term.right.shape[2]
    return chunk(height, width), chunk(width, height)


def _dense_sizes(term: Dense, cache: GramCache) -> _Found:
    """The same without squared norms, for gradients that are written down: their bounds must not depend on the route."""
    left, right = cache.sizes(term.left), cache.sizes(term.right)
    reach = (left * right).sum(1)
    return _dense_found(term, torch.zeros_like(reach), reach, torch.zeros_like(reach))


def _dense_found(term: Dense, squares: Tensor, reach: Tensor, largest: Tensor) -> _Found:
    positions, height = term.left.shape[1:]
    width = term.right.shape[2]
    terms = inner_terms(height, width) + inner_terms(width, height)
    return _Found(squares, reach, largest, 1, terms, positions * (height + width + 1) ** 0.5)


def _lookup_squares(term: Lookup, *, written_down: bool) -> _Found:
    lengths = sizes(term.right)
    squares = torch.zeros_like(lengths[:, 0]) if written_down else _lookup_cross(term, term)
    largest = torch.zeros_like(squares) if written_down else lengths.amax(1).square()
    positions, width = term.right.shape[1:]
    return _Found(squares, lengths.sum(1), largest, 1, inner_terms(width, width), positions * (width + 1) ** 0.5)


def _lookup_cross(one: Lookup, other: Lookup) -> Tensor:
    """``sum_{s,t} [ids_s = ids'_t] <right_s, right'_t>`` per record, ``[B]`` float64."""
    parts = []
    for i in _slices(one.ids.shape[0], one.ids.shape[1], other.ids.shape[1]):
        same = one.ids[i].unsqueeze(2) == other.ids[i].unsqueeze(1)
        angles = inner_by_pieces(one.right[i], other.right[i], chunk(one.right.shape[2], one.right.shape[2]))
        parts.append((same * angles).sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)


def _dense_cross(one: Dense, other: Dense) -> Tensor:
    """``sum_{s,t} <left_s, left'_t> <right_s, right'_t>`` per record, ``[B]`` float64."""
    parts = []
    for i in _slices(one.left.shape[0], one.left.shape[1], other.left.shape[1]):
        left = inner_by_pieces(one.left[i], other.left[i], _chunks(one)[0])
        right = inner_by_pieces(one.right[i], other.right[i], _chunks(one)[1])
        parts.append((left * right).sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)


def _cross(dense: Dense, lookup: Lookup) -> Tensor:
    """``<G_dense, G_lookup>`` per record: ``sum_{s,t} left_s[ids_t] <right_s, e_t>``, ``[B]`` float64."""
    parts = []
    for i in _slices(dense.left.shape[0], dense.left.shape[1], lookup.ids.shape[1]):
        ids, right = lookup.ids[i], wide(dense.right[i])
        picked = dense.left[i].gather(2, ids.unsqueeze(1).expand(-1, dense.left.shape[1], -1))
        angles = inner_by_pieces(right, wide(lookup.right[i]).to(right.dtype), _chunks(dense)[1])
        parts.append((wide(picked) * angles).sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: Tensor, *, first: bool) -> None:
    """Add ``sum_i scale[i] left_i^T right_i`` to ``out``, or write it there when ``first``; scale ``[B, 1, 1]``."""
    # The weights go into the narrower side: the other may be as wide as the vocabulary.
    if left.shape[2] < right.shape[2]:
        left = left * scale
    else:
        right = right * scale
    rows = left.shape[0] * left.shape[1]
    if rows <= ROWS and first:
        add_outer(left, right, out, first=True)
        return
    if not rows:
        return
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    step = max(1, _PIECE // max(out.shape[1], 1))
    for start in range(0, out.shape[0], step):
        part = slice(start, start + step)
        product = in_pairs(rows, ROWS, partial(_product, left[:, part], right))
        # Added after it was computed: a product that starts from what is there rounds as often as it has rows.
        out[part] = product if first else product.add_(out[part])


def _product(left: Tensor, right: Tensor, rows: slice) -> Tensor:
    left, right = left[rows], right[rows]
    left = left.contiguous() if may_be_faster(left) else left
    out = left.new_empty(left.shape[1], right.shape[1])
    add_outer(left.unsqueeze(0), right.unsqueeze(0), out, first=True)
    return out


def _add_lookups(ids: Tensor, values: Tensor, out: Tensor) -> None:
    """Add ``values`` ``[R, D]`` (float64) to the rows ``ids`` ``[R]`` of ``out``; each row is added up in float64 and rounded once."""
    if not len(ids):
        return
    order = ids.argsort()
    ids = ids[order]
    # Numbers of the stretches of equal ids: there are fewer than rows, and those that are not used add zeros to row 0.
    stretch = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).cumsum(0)])
    sums = torch.zeros_like(values).index_add_(0, stretch, values[order])
    out.index_add_(0, torch.zeros_like(ids).scatter_(0, stretch, ids), sums.to(out.dtype))
