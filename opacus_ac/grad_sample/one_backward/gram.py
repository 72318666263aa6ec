"""Gram matrices of positions, from which norms of sums of outer products are computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from opacus_ac.grad_sample.one_backward import half_products
from opacus_ac.grad_sample.one_backward.bounds import squared_norms, stretches, wide
from opacus_ac.grad_sample.one_backward.matmul import inner, inner_is_faster
from opacus_ac.grad_sample.one_backward.reach import Sides

T = TypeVar("T")

_WIDE = 1 << 13
"""Width above which a float32 norm may be wrong by more than a thousandth."""

_HALVED = (64, 4096)
"""Smallest number of positions and largest width for which a Gram matrix in halves is faster, as measured."""


def inner_by_pieces(a: Tensor, b: Tensor, size: int) -> Tensor:
    """Return ``a_i b_i^T`` for every record ``[B, M, N]`` in float32 or float64.

    The error is that of :func:`bounds.inner_terms`.

    Args:
        a: ``[B, M, K]``.
        b: ``[B, N, K]``.
        size: number of terms that are added up at a time.
    """
    parts = stretches(a.shape[2], size)
    total: Tensor | None = None
    for part in parts:
        x = a[:, :, part]
        y = x if a is b else b[:, :, part]
        if len(parts) > 1 and inner_is_faster(x, y):  # oneDNN is slow with matrices that have gaps between their rows
            x = x.contiguous()
            y = x if a is b else y.contiguous()
        product = inner(x, y)
        total = product if total is None else total.add_(product)
    assert total is not None
    return total


@dataclass
class Gram:
    """The inner products of all pairs of positions. The matrix is symmetric, so one half of it is enough.

    For an even number of positions, the matrix is kept as its two diagonal blocks and the block above them, which saves
    a quarter of the work.
    """

    blocks: Tensor
    """The matrix ``[B, T, T]``, or its diagonal blocks ``[2 B, T / 2, T / 2]``."""
    above: Tensor | None
    """The block above the diagonal blocks ``[B, T / 2, T / 2]``; None if ``blocks`` is the matrix."""
    _squares: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, size: int = 1 << 60) -> Gram:
        """Return the Gram matrix of ``x``.

        Args:
            x: ``[B, T, d]``.
            size: number of terms that are added up at a time.
        """
        positions, width = x.shape[1:]
        halved = positions % 2 == 0 and positions >= _HALVED[0] and width <= _HALVED[1] and x.is_contiguous()
        if not halved or inner_is_faster(x, x):
            return cls(inner_by_pieces(x, x, size), None)
        first, *others = stretches(width, size)
        blocks, above = cls._halves(x[:, :, first])
        for part in others:
            more = cls._halves(x[:, :, part])
            blocks, above = blocks.add_(more[0]), above.add_(more[1])
        return cls(blocks, above)

    @staticmethod
    def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if half_products.available(x) else wide(x)
        multiply = torch.bmm if x.dtype in (torch.float32, torch.float64) else half_products.multiply
        half = x.shape[1] // 2
        halves = x.unflatten(1, (2, half)).flatten(0, 1)
        return multiply(halves, halves.transpose(1, 2)), multiply(x[:, :half], x[:, half:].transpose(1, 2))

    def whole(self) -> Tensor:
        """Return the whole matrix ``[B, T, T]``."""
        if self.above is None:
            return self.blocks
        batch, half = self.above.shape[:2]
        first, second = self.blocks.view(batch, 2, half, half).unbind(1)
        return torch.cat([torch.cat([first, self.above], 2), torch.cat([self.above.transpose(1, 2), second], 2)], 1)

    def squares(self) -> Tensor:
        """Return the squared norms of the positions, ``[B, T]`` in float64. They must not be written to."""
        if self._squares is None:
            # A copy, because it is kept for longer than the matrix.
            diagonal = self.blocks.diagonal(dim1=1, dim2=2).to(torch.float64, copy=True)
            self._squares = diagonal if self.above is None else diagonal.reshape(self.above.shape[0], -1)
        return self._squares


def sizes(x: Tensor) -> Tensor:
    """Return the norms of the positions of ``x`` ``[B, T, d]``, ``[B, T]`` in float32 or wider, to a thousandth."""
    rows, width = x.flatten(0, 1), x.shape[2]  # which may be 0
    dtype = wide(x[:0]).dtype
    if width <= _WIDE and x.dtype == dtype:
        return torch.linalg.vector_norm(x, dim=-1)
    # Some rows at a time, because the CPU widens them.
    found = [
        squared_norms(part).sqrt_() if width > _WIDE else torch.linalg.vector_norm(part, dim=-1, dtype=dtype)
        for part in rows.split(max(1, _NUMBERS // max(width, 1)))
    ]
    return (found[0] if len(found) == 1 else torch.cat(found)).view(x.shape[:2])


_NUMBERS = 1 << 22
"""Numbers of a tensor of half precision that are widened at a time."""


class GramCache:
    """Gram matrices and norms of positions of the last few inputs, which the projections of one input share.

    The key is the storage address. The tensors are held, so that an address cannot become that of another tensor.
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._held: OrderedDict[tuple[object, ...], tuple[Tensor, Any]] = OrderedDict()

    def gram(self, x: Tensor, size: int = 1 << 60) -> Gram:
        """Return the result of :meth:`Gram.of`, which must not be written to."""
        return self._get(Gram.of, x, size)

    def sizes(self, x: Tensor) -> Tensor:
        """Return the norms of the positions of ``x`` ``[B, T, d]``, ``[B, T]``, which must not be written to."""
        return self._get(sizes, x)

    def _get(self, compute: Callable[..., T], x: Tensor, *settings: int) -> T:
        key = (compute, *settings, x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x._version)
        if key not in self._held:
            self._held[key] = (x, compute(x, *settings))
        self._held.move_to_end(key)
        if len(self._held) > self._size:
            self._held.popitem(last=False)
        result: T = self._held[key][1]
        return result


def products(left: Gram, right: Gram) -> tuple[Tensor, Sides]:
    """Return the values from which the norm of ``sum_t left_t (x) right_t`` is computed.

    Args:
        left: Gram matrix ``[B, T, T]`` of the left sides.
        right: Gram matrix ``[B, T, T]`` of the right sides.

    Returns:
        The sum of the elementwise product, ``[B]`` in float64, and the squares on the diagonals.
    """
    if (left.above is None) != (right.above is None):
        left, right = Gram(left.whole(), None), Gram(right.whole(), None)
    total = (left.blocks * right.blocks).sum((1, 2), dtype=torch.float64)
    if left.above is not None and right.above is not None:
        above = (left.above * right.above).sum((1, 2), dtype=torch.float64)
        total = total.view(-1, 2).sum(1) + 2 * above
    return total, Sides(left.squares(), right.squares(), squared=True)


def products_by_tiles(left: Tensor, right: Tensor, pieces: tuple[int, int]) -> tuple[Tensor, Sides]:
    """Return the same as :func:`products`, without Gram matrices larger than tiles of ``TILE`` by ``TILE`` positions.

    Args:
        left: left sides ``[B, T, I]``.
        right: right sides ``[B, T, J]``.
        pieces: number of terms of an inner product that are added up at a time, for either side.
    """
    batch, positions = left.shape[:2]
    total = torch.zeros(batch, dtype=torch.float64, device=left.device)
    tiles, sides = stretches(positions, TILE), []
    for number, rows in enumerate(tiles):
        square, own = products(Gram.of(left[:, rows], pieces[0]), Gram.of(right[:, rows], pieces[1]))
        total += square
        sides.append(own)
        for columns in tiles[number + 1 :]:
            a = inner_by_pieces(left[:, rows], left[:, columns], pieces[0])
            b = inner_by_pieces(right[:, rows], right[:, columns], pieces[1])
            total += 2 * a.mul_(b).sum((1, 2), dtype=torch.float64)
    return total, Sides(torch.cat([s.left for s in sides], 1), torch.cat([s.right for s in sides], 1), squared=True)


TILE = 1024
"""Number of positions of a tile of a Gram matrix that is too large to be computed at once."""
