"""Per-sample gradients of one parameter without ever writing them down: sums of outer products.

Every use of a matrix parameter adds ``sum_t left_t (x) right_t`` to a record's gradient. For a dense layer both sides
are dense (output gradient and input), for an embedding the left side is one-hot (the token id). Using a parameter
again is concatenation along t; tying an embedding to a head adds the cross term between the two kinds. Norms come from
``[T, T]`` Gram matrices or, where that is cheaper, from the materialised gradient, which is then kept.

References:
    Bu et al., arXiv 2210.00038 (book-keeping); Lee and Kifer, arXiv 2009.03106 (Gram norms); Li et al., arXiv 2110.05679.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opacus_ac.grad_sample.products import add_outer, inner, inner_is_faster

KEEP_FACTOR = 1.0
"""A dense gradient ``[I, J]`` is materialised when ``I J <= KEEP_FACTOR T (I + J)``.

``T (I + J)`` numbers is what book-keeping has to hold until the clip factors are known. Materialising costs the one
product that the weight gradient needs anyway, and afterwards the two factors can go; the Gram route needs the two Grams
and then that product. A factor of 2 would save a few percent of time on small models and cost more memory than
ordinary training has.
"""

CANCELLATION = 1e-2
"""Share of its diagonal below which a Gram sum has cancelled so far that float32 may be wrong by more than 1e-5."""

EXTREME = 1e16
"""Squared norm of one side of an outer product above which the square of the other may have been lost to underflow."""

_GRAM_BYTES = 1 << 26
_BLOCK = 1 << 22


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float32 or better: squares and sums of bfloat16 numbers are not kept in bfloat16."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def squared_norms(rows: Tensor) -> Tensor:
    """Return the squared L2 norm of each row of ``[B, ...]`` in float64.

    The norm of the last dimension in the native type, then float64: a flat float32 norm over millions of elements
    is biased by 1e-4 on CPU, which would let clipped records exceed C.
    """
    if rows.numel() == 0:
        return torch.zeros(rows.shape[0], dtype=torch.float64, device=rows.device)
    rows = wide(rows)
    inner = torch.linalg.vector_norm(rows.reshape(rows.shape[0], -1, rows.shape[-1] if rows.dim() > 1 else 1), dim=-1)
    return inner.double().square_().sum(1)


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
        kept = values.nonzero().reshape(-1)
        self._kept = None if kept.numel() == values.numel() else kept
        self.values = values if self._kept is None else values[kept]

    def pick(self, records: Tensor) -> Tensor:
        """The records ``[B, ...]`` that have a weight."""
        return records if self._kept is None else records[self._kept]


def keeps(positions: int, rows: int, columns: int) -> bool:
    """Whether a dense gradient ``[rows, columns]`` of ``positions`` outer products is materialised."""
    return rows * columns <= KEEP_FACTOR * positions * (rows + columns)


@dataclass
class Gram:
    """The inner products of all pairs of positions, of which those below the diagonal need not be computed.

    For an even number of positions the matrix is kept as its two diagonal blocks and the one above them, which saves
    a quarter of the work.
    """

    blocks: Tensor
    """``[B, T, T]``, or ``[2 B, T / 2, T / 2]``."""
    above: Tensor | None
    """``[B, T / 2, T / 2]``, or None where ``blocks`` is everything."""

    @classmethod
    def of(cls, x: Tensor) -> Gram:
        """Of ``x`` ``[B, T, d]``."""
        x = wide(x)
        batch, positions, width = x.shape
        half = positions // 2
        halved = positions % 2 == 0 and positions >= _HALVED[0] and width <= _HALVED[1] and x.is_contiguous()
        if not halved or inner_is_faster(x, x):
            return cls(inner(x, x), None)
        halves = x.view(2 * batch, half, width)
        return cls(torch.bmm(halves, halves.transpose(1, 2)), torch.bmm(x[:, :half], x[:, half:].transpose(1, 2)))

    def whole(self) -> Tensor:
        """``[B, T, T]``."""
        if self.above is None:
            return self.blocks
        batch, half = self.above.shape[:2]
        first, second = self.blocks.view(batch, 2, half, half).unbind(1)
        return torch.cat([torch.cat([first, self.above], 2), torch.cat([self.above.transpose(1, 2), second], 2)], 1)


_HALVED = (64, 4096)
"""Fewest positions and greatest width for which computing a Gram matrix by halves is faster, as measured."""


class GramCache:
    """Gram matrices of the last few inputs: the projections of one input share theirs.

    Keyed by storage address; the tensors are held, so that an address cannot come back as another tensor.
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._grams: OrderedDict[tuple[int, tuple[int, ...], tuple[int, ...]], tuple[Tensor, Gram]] = OrderedDict()

    def gram(self, x: Tensor) -> Gram:
        """That of ``x`` ``[B, T, d]``; not to be written to."""
        key = (x.data_ptr(), tuple(x.shape), x.stride())
        if key in self._grams:
            self._grams.move_to_end(key)
            return self._grams[key][1]
        gram = Gram.of(x)
        self._grams[key] = (x, gram)
        if len(self._grams) > self._size:
            self._grams.popitem(last=False)
        return gram


def _products(left: Gram, right: Gram) -> tuple[Tensor, Tensor, Tensor]:
    """Of two Gram matrices ``[B, T, T]``: the sum and the diagonal sum of their elementwise product, float64 ``[B]``.

    And the largest square on the diagonal of either.
    """
    if (left.above is None) != (right.above is None):
        left, right = Gram(left.whole(), None), Gram(right.whole(), None)
    product = left.blocks * right.blocks
    total = product.sum((1, 2), dtype=torch.float64)
    trace = product.diagonal(dim1=1, dim2=2).sum(-1, dtype=torch.float64)
    largest = torch.maximum(*(g.blocks.diagonal(dim1=1, dim2=2).amax(-1) for g in (left, right)))
    if left.above is None or right.above is None:
        return total, trace, largest
    above = (left.above * right.above).sum((1, 2), dtype=torch.float64)
    return total.view(-1, 2).sum(1) + 2 * above, trace.view(-1, 2).sum(1), largest.view(-1, 2).amax(1)


@dataclass
class ParameterBook:
    """What the records of one backward pass contribute to the gradient of one parameter.

    Squared norms are added up as the terms arrive, while what they are computed from is still in the processor's cache.
    """

    shape: torch.Size
    dense: list[Dense] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    rows: Tensor | None = None
    _total: Tensor | None = None
    """Squared norms so far, ``[B]`` float64; meaningless once there are rows."""
    _trace: Tensor | None = None
    """The diagonal's share of them, ``[B]`` float64."""
    _extreme: Tensor | None = None
    """Records with a side so large that float32 may have lost the other one, ``[B]``."""

    def add(self, term: Term, cache: GramCache) -> None:
        """Add one use of the parameter."""
        if isinstance(term, Rows):
            self._add_rows(term.values)
        elif isinstance(term, Dense) and (self.rows is not None or (not self.dense and term.worth_keeping)):
            self._keep(term)
        elif self.rows is not None:
            assert isinstance(term, Lookup)
            self.lookups.append(term)
        elif isinstance(term, Dense):
            crosses = [_dense_cross(term, other) for other in self.dense]
            total, trace, largest = _dense_squares(term, cache)
            self._count((total, trace), crosses + [_cross(term, other) for other in self.lookups])
            self._extreme = largest > EXTREME if self._extreme is None else self._extreme | (largest > EXTREME)
            self.dense.append(term)
        else:
            crosses = [_lookup_cross(term, other) for other in self.lookups]
            self._count(_lookup_squares(term), crosses + [_cross(other, term) for other in self.dense])
            self.lookups.append(term)

    def _count(self, own: tuple[Tensor, Tensor], crosses: list[Tensor]) -> None:
        total, trace = own
        for cross in crosses:
            total = total + 2 * cross
        self._total = total if self._total is None else self._total + total
        self._trace = trace if self._trace is None else self._trace + trace

    def _add_rows(self, values: Tensor) -> None:
        values = wide(values)
        # Not in place: a rule may have returned a view of something that is still needed.
        self.rows = values if self.rows is None else self.rows + values

    def _keep(self, term: Dense) -> None:
        rows = inner(wide(term.left).transpose(1, 2), wide(term.right).transpose(1, 2))
        self.rows = rows if self.rows is None else self.rows + rows.view(self.rows.shape)

    def squares(self) -> Tensor:
        """Squared norm of each record's gradient, ``[B]`` float64."""
        if self.rows is not None:
            self._materialise()
            return squared_norms(self.rows)
        assert self._total is not None
        assert self._trace is not None
        total = self._total.cpu()
        doubtful = total < CANCELLATION * self._trace.cpu()
        if self._extreme is not None:
            extreme = self._extreme.cpu()
            doubtful |= extreme
            self._extreme = extreme if bool(extreme.any()) else None
        for record in doubtful.nonzero().reshape(-1).tolist():
            total[record] = self._exact_square(record)
        return total

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

    def _exact_square(self, record: int) -> float:
        """Squared norm of one record's gradient written down in float64, some rows at a time."""
        height, width = self.shape
        step = max(1, _BLOCK // width)
        total = 0.0
        for first in range(0, height, step):
            last = min(first + step, height)
            device = (self.dense[0].right if self.dense else self.lookups[0].right).device
            block = torch.zeros(last - first, width, dtype=torch.float64, device=device)
            for d in self.dense:
                block.addmm_(d.left[record, :, first:last].double().t(), d.right[record].double())
            for entry in self.lookups:
                inside = (entry.ids[record] >= first) & (entry.ids[record] < last)
                block.index_add_(0, entry.ids[record][inside] - first, entry.right[record][inside].double())
            total += float(block.square_().sum())
        return total

    def weighted_sum(self, weights: Weights, out: Tensor) -> None:
        """Write ``sum_i weights[i] G_i`` into ``out``, of the parameter's shape; contiguous."""
        if weights.values.numel() == 0:
            out.zero_()
            return
        factors = weights.values.to(device=out.device, dtype=out.dtype)
        if self.rows is not None:
            rows = weights.pick(self.rows)
            torch.mv(rows.reshape(rows.shape[0], -1).to(out.dtype).t(), factors, out=out.view(-1))
            return
        if self._extreme is not None and bool(weights.pick(self._extreme.to(weights.values.device)).any()):
            # The factor times one side might overflow, and infinity times the other side, zero, is no number.
            exact = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
            self._add_terms(weights, exact, weights.values.to(exact).view(-1, 1, 1))
            out.copy_(exact)
        else:
            self._add_terms(weights, out, factors.view(-1, 1, 1))

    def _add_terms(self, weights: Weights, out: Tensor, factors: Tensor) -> None:
        """Write the weighted sum of all outer products into ``out``; factors ``[kept, 1, 1]`` in its type."""
        if not self.dense:
            out.zero_()
        for i, d in enumerate(self.dense):
            left, right = wide(weights.pick(d.left)), wide(weights.pick(d.right))
            if out.dtype == torch.float64:
                left, right = left.double(), right.double()
            _add_product(out, left, right, factors, first=i == 0)
        for entry in self.lookups:
            values = wide(weights.pick(entry.right)).to(out.dtype) * factors
            out.index_add_(0, weights.pick(entry.ids).reshape(-1), values.reshape(-1, out.shape[-1]))

    @property
    def routes(self) -> str:
        """How the norm is computed, for tests and reports."""
        names = ["kept"] * (self.rows is not None) + ["gram"] * bool(self.dense) + ["lookup"] * bool(self.lookups)
        return "+".join(names)


def _slices(batch: int, *positions: int) -> list[slice]:
    """Stretches of records whose ``[T, T']`` matrices fit into the memory set aside for them."""
    step = max(1, _GRAM_BYTES // max(1, 4 * math.prod(positions)))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _dense_squares(term: Dense, cache: GramCache) -> tuple[Tensor, Tensor, Tensor]:
    batch, positions = term.left.shape[:2]
    slices = _slices(batch, positions, positions)
    if len(slices) == 1:
        return _products(cache.gram(term.left), cache.gram(term.right))
    # Slices of long sequences: too large to hold, and nobody shares them.
    parts = [_products(Gram.of(term.left[i]), Gram.of(term.right[i])) for i in slices]
    total, trace, largest = (torch.cat(values) for values in zip(*parts, strict=True))
    return total, trace, largest


def _lookup_squares(term: Lookup) -> tuple[Tensor, Tensor]:
    total = _lookup_cross(term, term)
    # Squares of the positions' own rows.
    return total, wide(term.right).square().sum((1, 2), dtype=torch.float64)


def _lookup_cross(one: Lookup, other: Lookup) -> Tensor:
    """``sum_{s,t} [ids_s = ids'_t] <right_s, right'_t>`` per record, ``[B]`` float64."""
    parts = []
    for i in _slices(one.ids.shape[0], one.ids.shape[1], other.ids.shape[1]):
        same = one.ids[i].unsqueeze(2) == other.ids[i].unsqueeze(1)
        angles = inner(wide(one.right[i]), wide(other.right[i]))
        parts.append((same * angles).sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)


def _dense_cross(one: Dense, other: Dense) -> Tensor:
    """``sum_{s,t} <left_s, left'_t> <right_s, right'_t>`` per record, ``[B]`` float64."""
    parts = []
    for i in _slices(one.left.shape[0], one.left.shape[1], other.left.shape[1]):
        left, right = (inner(wide(x[i]), wide(y[i])) for x, y in ((one.left, other.left), (one.right, other.right)))
        parts.append((left * right).sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)


def _cross(dense: Dense, lookup: Lookup) -> Tensor:
    """``<G_dense, G_lookup>`` per record: ``sum_{s,t} left_s[ids_t] <right_s, e_t>``, ``[B]`` float64."""
    parts = []
    for i in _slices(dense.left.shape[0], dense.left.shape[1], lookup.ids.shape[1]):
        ids, right = lookup.ids[i], wide(dense.right[i])
        picked = dense.left[i].gather(2, ids.unsqueeze(1).expand(-1, dense.left.shape[1], -1))
        angles = inner(right, wide(lookup.right[i]).to(right.dtype))
        parts.append((wide(picked) * angles).sum((1, 2), dtype=torch.float64))
    return torch.cat(parts)


def _add_product(out: Tensor, left: Tensor, right: Tensor, scale: Tensor, *, first: bool) -> None:
    """Add ``sum_i scale[i] left_i^T right_i`` to ``out``, or write it there when ``first``; scale ``[B, 1, 1]``."""
    # The weights go into the narrower side: the other may be as wide as the vocabulary.
    if left.shape[2] < right.shape[2]:
        left = left * scale
    else:
        right = right * scale
    add_outer(left.to(out.dtype), right.to(out.dtype), out, first=first)
