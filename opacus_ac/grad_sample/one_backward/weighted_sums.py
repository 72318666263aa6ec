"""Weighted sums over records, which are the sums of clipped gradients. They are added up in pieces (:mod:`bounds`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import half_products
from opacus_ac.grad_sample.one_backward.bounds import RECORDS, ROWS, in_pairs, wide
from opacus_ac.grad_sample.one_backward.matmul import add_outer, sum_is_faster
from opacus_ac.grad_sample.transfers import on_device

_PIECE = 1 << 20
"""Number of entries of a result that are computed at a time, if it is added to another."""

_LARGE_PIECE = 1 << 24
"""The same on other devices than the CPU, where small products leave most of the device idle."""


class Weights:
    """One weight per record, for many sums.

    Records with weight 0 are left out, not multiplied by zero, because their gradients may not be finite. Which ones
    these are is known on the host, so that no sum has to wait for a device.

    Args:
        values: ``[B]``, on the CPU.
    """

    def __init__(self, values: Tensor) -> None:
        self._all = values
        self._numbers: list[float] = values.tolist()
        self._kept = [record for record, number in enumerate(self._numbers) if number != 0]
        self._places: dict[torch.device, Tensor] = {}
        self._copies: dict[tuple[bool, torch.device, torch.dtype], Tensor] = {}
        self._others: dict[tuple[int, ...], Weights] = {}

    @property
    def any_zero(self) -> bool:
        """Whether a record is left out."""
        return len(self._kept) < len(self._numbers)

    def _kept_on(self, device: torch.device) -> Tensor:
        if device not in self._places:
            self._places[device] = on_device(torch.tensor(self._kept, dtype=torch.long), device)
        return self._places[device]

    def pick(self, records: Tensor) -> Tensor:
        """Return the records of ``[B, ...]`` whose weight is not 0."""
        return records[self._kept_on(records.device)] if self.any_zero else records

    def like(self, out: Tensor) -> Tensor:
        """Return the weights that are not 0, with the type of ``out`` and on its device."""
        return self._copy(out, every=False)

    def every_like(self, out: Tensor) -> Tensor:
        """Return all weights ``[B]``, with the type of ``out`` and on its device."""
        return self._copy(out, every=True)

    def _copy(self, out: Tensor, *, every: bool) -> Tensor:
        key = every, out.device, out.dtype
        if key not in self._copies:
            values = self._all if every or not self.any_zero else self._all[self._kept]
            self._copies[key] = on_device(values.to(out.dtype), out.device)
        return self._copies[key]

    def of(self, record: int) -> float:
        """Return the weight of one record."""
        return self._numbers[record]

    def without(self, records: Sequence[int]) -> Weights:
        """Return the same weights, but 0 for some records."""
        if not records:
            return self
        key = tuple(records)
        if key not in self._others:  # a record with extreme values is often one of several parameters
            values = self._all.clone()
            values[list(key)] = 0
            self._others[key] = Weights(values)
        return self._others[key]


def add_rows(rows: Tensor, factors: Tensor, out: Tensor, *, first: bool = False) -> None:
    """Add ``sum_i factors[i] rows[i]`` to ``out``, in the type of ``out``; with ``first``, overwrite ``out``.

    Args:
        rows: ``[B, ...]``.
        factors: ``[B]``.
        out: the sum.
        first: whether ``out`` is overwritten.
    """
    flat, total, factors = rows.unsqueeze(-1).flatten(1), out.view(-1), factors.to(out)
    if first and 0 < len(flat) <= RECORDS and out.dtype == flat.dtype:
        torch.mv(flat.t(), factors, out=total)
        return
    if first:
        total.zero_()
    if out.dtype != flat.dtype:  # one by one, to avoid a copy of all in another type
        for row, factor in zip(flat, factors, strict=True):
            total.addcmul_(row.to(out.dtype), factor)
    elif len(flat):
        for start in range(0, len(total), _PIECE):
            entries = slice(start, start + _PIECE)
            product = partial(_weighted, flat[:, entries], factors)
            total[entries] += in_pairs(len(flat), RECORDS, product)


def _weighted(rows: Tensor, factors: Tensor, records: slice) -> Tensor:
    return torch.mv(rows[records].t(), factors[records])


def add_product(out: Tensor, left: Tensor, right: Tensor, scale: Tensor, *, first: bool) -> None:
    """Add ``sum_i scale[i] left_i^T right_i`` to ``out``; with ``first``, overwrite ``out``.

    Args:
        out: ``[I, J]``.
        left: ``[B, T, I]``, in the type of ``out`` or in a narrower one.
        right: ``[B, T, J]``, likewise.
        scale: ``[B, 1, 1]``, in the type of ``out``.
        first: whether ``out`` is overwritten.
    """
    rows = left.shape[0] * left.shape[1]
    if not rows:
        if first:
            out.zero_()
        return
    # The narrower side is multiplied by the weights, because the other may be as wide as the vocabulary.
    if left.shape[2] < right.shape[2]:
        left = _times(left, scale)
    else:
        right = _times(right, scale)
    if rows <= ROWS and first and left.dtype == right.dtype:
        add_outer(left, right, out, first=True)
        return
    left, right = left.flatten(0, 1), right.flatten(0, 1)
    # The result is computed in pieces along its wider dimension. A wide side in half precision is widened in pieces.
    along = int(left.shape[1] < right.shape[1])
    widened = left.dtype != right.dtype and not any(half_products.has_sums(side, out) for side in (left, right))
    piece = _PIECE if out.device.type == "cpu" else _LARGE_PIECE
    step = max(1, piece // max(out.shape[1 - along], min(rows, ROWS) * widened, 1))
    for start in range(0, out.shape[along], step):
        part = slice(start, start + step)
        sides = (left, right[:, part]) if along else (left[:, part], right)
        product = in_pairs(rows, ROWS, partial(_product, *sides, out))
        into = out[:, part] if along else out[part]
        # Added after it was computed. A product that starts from the sum so far rounds once per row.
        into.copy_(product if first else product.add_(into))


def _times(side: Tensor, scale: Tensor) -> Tensor:
    """Return ``side`` times ``scale``, in the type of ``scale``."""
    widens = torch.promote_types(side.dtype, scale.dtype) == scale.dtype  # so the product does it
    return (side if widens else side.to(scale.dtype)) * scale


def _product(left: Tensor, right: Tensor, out: Tensor, rows: slice) -> Tensor:
    """Return ``sum_r left_r (x) right_r`` in the type of ``out``, over some rows of sides ``[R, I]`` and ``[R, J]``."""
    left, right = left[rows].unsqueeze(0), right[rows].unsqueeze(0)
    if half_products.has_sums(left, out):
        high, low = half_products.split(right)
        return _of_halves(left, high).add_(_of_halves(left, low))
    if half_products.has_sums(right, out):
        high, low = half_products.split(left)
        return _of_halves(high, right).add_(_of_halves(low, right))
    left, right = wide(left).to(out.dtype), wide(right).to(out.dtype)
    if sum_is_faster(left, right):  # with oneDNN, which wants contiguous factors
        left, right = left.contiguous(), right.contiguous()
    product = left.new_empty(left.shape[2], right.shape[2])
    add_outer(left, right, product, first=True)
    return product


def _of_halves(left: Tensor, right: Tensor) -> Tensor:
    return half_products.multiply(left.transpose(1, 2), right)[0]


def add_lookups(ids: Tensor, values: Tensor, out: Tensor) -> None:
    """Add ``values`` ``[R, D]`` (float64) to the rows ``ids`` ``[R]`` of ``out``.

    Each row is added up in float64 and rounded once.
    """
    if not len(ids):
        return
    order = ids.argsort()
    ids = ids[order]
    # Each run of equal ids has a number. There may be fewer runs than rows; unused numbers add zeros to row 0.
    stretch = torch.cat([ids.new_zeros(1), (ids[1:] != ids[:-1]).cumsum(0)])
    sums = torch.zeros_like(values).index_add_(0, stretch, values[order])
    out.index_add_(0, torch.zeros_like(ids).scatter_(0, stretch, ids), sums.to(out.dtype))
