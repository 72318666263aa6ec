"""Gradients of records that are written down: of all records, or of single ones in float64, some rows at a time.

The latter is expensive and seldom needed. It is needed if the norm from float32 products is as small as its rounding
error, because terms cancel. It is also needed if one side of an outer product is so large that the square of the other
side, or a clip factor times it, is lost to underflow. The norm and the sum then use the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward.bounds import ROWS, in_pairs
from opacus_ac.grad_sample.one_backward.matmul import inner

_BLOCK = 1 << 22
"""Number of entries that are written down at a time."""

_UNIT = 2.0**-53


class _Dense(Protocol):
    left: Tensor
    right: Tensor


class _Lookup(Protocol):
    ids: Tensor
    right: Tensor


def gradients(left: Tensor, right: Tensor) -> Tensor:
    """Return ``sum_t left[i, t] (x) right[i, t]`` for every record, ``[B, I, J]`` in float32 or float64.

    Outer products are added up ``ROWS`` at a time, so that the error does not grow with the number of positions.

    Args:
        left: ``[B, T, I]``.
        right: ``[B, T, J]``.
    """

    def product(positions: slice) -> Tensor:
        return inner(left[:, positions].transpose(1, 2), right[:, positions].transpose(1, 2))

    return in_pairs(max(left.shape[1], 1), ROWS, product)


def blocks(
    shape: torch.Size, dense: Sequence[_Dense], lookups: Sequence[_Lookup], record: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows of one record's gradient, each ``[rows, J]`` in float64."""
    height, width = shape
    step = max(1, _BLOCK // max(width, 1))
    device = (dense[0].right if dense else lookups[0].right).device
    for first in range(0, height, step):
        part = slice(first, min(first + step, height))
        block = torch.zeros(part.stop - first, width, dtype=torch.float64, device=device)
        for d in dense:
            block.addmm_(d.left[record, :, part].double().t(), d.right[record].double())
        for entry in lookups:
            ids = entry.ids[record] - first
            inside = (ids >= 0) & (ids < len(block))
            values = entry.right[record].double().masked_fill(~inside.unsqueeze(1), 0)
            block.index_add_(0, ids.clamp(0, len(block) - 1), values)
        yield part, block


def bound(shape: torch.Size, dense: Sequence[_Dense], lookups: Sequence[_Lookup], record: int, unit: float) -> Tensor:
    """Return an upper bound of the norm of one record's contribution, and its squared norm as computed, ``[2]``.

    The result is on the device, in float64.

    Args:
        shape: shape of the parameter, ``[I, J]``.
        dense: uses of the parameter by dense layers.
        lookups: uses of the parameter by embeddings.
        record: number of the record.
        unit: unit roundoff of the type of the sum.
    """
    sizes = [_sizes(d.left[record]) * _sizes(d.right[record]) for d in dense]
    sizes += [_sizes(entry.right[record]) for entry in lookups]
    positions = sum(len(size) for size in sizes)
    reach = torch.stack([size.sum() for size in sizes]).sum()
    parts = [block.square_().sum() for _, block in blocks(shape, dense, lookups, record)]
    square = torch.stack(parts).sum()
    return torch.stack([square.sqrt() * (1 + 8 * unit) + 2 * (positions + 8) * _UNIT * reach, square])


def _sizes(side: Tensor) -> Tensor:
    return torch.linalg.vector_norm(side.double(), dim=-1)
