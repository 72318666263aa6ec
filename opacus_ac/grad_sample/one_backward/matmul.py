"""Products of matrices; those of float32 on the CPU by the faster of two libraries of torch.

torch multiplies matrices with MKL on x86, and has oneDNN for convolutions and for compiled models. On some AMD
processors with AVX-512 oneDNN took little more than half the time, on others up to twice as long
(``examples/benchmarks/benchmark_products.py``). So large products of each size are tried once (:mod:`trial`), and
torch's own functions are used unless oneDNN is clearly faster. Small products are torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from opacus_ac.grad_sample.one_backward import half_products, trial
from opacus_ac.grad_sample.one_backward.bounds import wide

_WORTH = 1 << 22
"""Number of multiplications below which oneDNN is not used."""
_WORTH_A_RECORD = 1 << 23
"""The same number for each record, where each record needs a call of its own."""
_WHOLE = 1 << 20
"""Largest number of entries of a result that is computed in one piece."""
_ROWS = 512
"""Number of rows of a piece of a larger result. A piece is copied into the result while it is in the cache."""
_MANY = 512
"""Number of rows of the factors above which a transposition costs more than oneDNN's own layout of the result."""


def add_outer(left: Tensor, right: Tensor, out: Tensor, *, first: bool) -> None:
    """Add ``sum_i left_i^T right_i`` to ``out``; with ``first``, overwrite ``out``.

    Args:
        left: ``[B, T, I]``.
        right: ``[B, T, J]``, of the same type and device as ``left`` and ``out``.
        out: ``[I, J]``.
        first: whether ``out`` is overwritten.
    """
    if left.is_contiguous() and right.is_contiguous() and sum_is_faster(left, right):
        _add_outer_by_onednn(left, right, out, first=first)
        return
    a, b = left.reshape(-1, left.shape[2]).t(), right.reshape(-1, right.shape[2])
    if first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a_i b_i^T`` for every record, ``[B, M, N]`` in float32 or float64.

    Args:
        a: ``[B, M, K]``.
        b: ``[B, N, K]``, on the same device. Of two types, the wider one is taken.
    """
    if a.dtype != b.dtype:
        dtype = torch.promote_types(wide(a[:0]).dtype, wide(b[:0]).dtype)
        a, b = a.to(dtype), b.to(dtype)
    if a.dtype in (torch.bfloat16, torch.float16):
        return half_products.multiply(a, b.transpose(1, 2)) if half_products.available(a) else _widened_inner(a, b)
    plain = _is_plain(a) and _is_plain(b)
    return _inner_by_onednn(a, b) if plain and inner_is_faster(a, b) else torch.bmm(a, b.transpose(1, 2))


def _widened_inner(a: Tensor, b: Tensor) -> Tensor:
    """Do the same as :func:`inner` with factors in half precision, which are widened some records at a time."""
    step = max(1, _WIDENED // max(a.shape[1] * a.shape[2], b.shape[1] * b.shape[2], 1))
    if step >= len(a):
        widened = wide(a)
        return inner(widened, widened if a is b else wide(b))
    out = torch.empty(len(a), a.shape[1], b.shape[1], dtype=torch.float32, device=a.device)
    for start in range(0, len(a), step):
        some = slice(start, start + step)
        out[some] = inner(wide(a[some]), wide(b[some]))
    return out


_WIDENED = 1 << 21
"""Number of entries of a factor in half precision that are widened at a time."""


def sum_is_faster(left: Tensor, right: Tensor) -> bool:
    """Say whether oneDNN is faster for :func:`add_outer` of contiguous factors of these sizes."""
    if left.numel() * right.shape[2] < _WORTH or not _has_choice(left):
        return False
    return onednn_is_faster("sum", left.shape[0] * left.shape[1], left.shape[2], right.shape[2])


def inner_is_faster(a: Tensor, b: Tensor) -> bool:
    """Say whether oneDNN is faster for :func:`inner` of contiguous factors of these sizes.

    For products of a tensor with itself it must be faster than three quarters of the work (:class:`gram.Gram`).
    """
    if a.shape[1] * a.shape[2] * b.shape[1] < _WORTH_A_RECORD or not _has_choice(a):
        return False
    return onednn_is_faster("Gram" if a is b else "inner", a.shape[1], b.shape[1], a.shape[2])


def _has_choice(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _is_plain(x: Tensor) -> bool:
    """Say whether every record is a contiguous matrix, or the transpose of one.

    oneDNN has fast code for these layouts only. For a transposed slice it may take a thousand times longer.
    """
    return x.is_contiguous() or x.transpose(1, 2).is_contiguous()


def _inner_by_onednn(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(len(a), a.shape[1], b.shape[1])
    for record in range(len(a)):
        out[record] = _multiply(a[record], b[record])
    return out


def _add_outer_by_onednn(left: Tensor, right: Tensor, out: Tensor, *, first: bool) -> None:
    """Do the same as :func:`add_outer` with oneDNN, for contiguous factors."""
    height, width = out.shape
    pieces = 1 if height * width <= _WHOLE else -(-height // _ROWS)
    rows = -(-height // pieces)
    for top in range(0, height, rows):
        part = slice(top, min(top + rows, height))
        product = _outer(left if pieces == 1 else left[:, :, part].contiguous(), right)
        if first:
            out[part].copy_(product)
        else:
            out[part].add_(product)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return ``sum_i left_i^T right_i``, ``[I, J]``.

    This is the weight gradient of a convolution with a 1 x 1 kernel, whose input is ``right`` with channels last.
    """
    if left.shape[0] * left.shape[1] < _MANY:
        return _multiply(left.flatten(0, 1).t(), right.flatten(0, 1).t())
    pixels = (x.unsqueeze(2).permute(0, 3, 1, 2) for x in (right, left))
    product: Tensor = conv2d_weight(next(pixels), (left.shape[2], right.shape[2], 1, 1), next(pixels))
    return product.flatten(1)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b^T`` of ``[M, K]`` and ``[N, K]``, with the operator that torch's compiler uses."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


def onednn_is_faster(kind: str, rows: int, height: int, width: int) -> bool:
    """Say whether oneDNN was clearly faster than torch in a trial of about this size, and right.

    Args:
        kind: "sum" for :func:`add_outer`, "inner" for :func:`inner`, "Gram" for that of a tensor with itself.
        rows: for a sum, the number of outer products; else the number of rows of the first factor.
        height: for a sum, the number of rows of the result; else the number of rows of the second factor.
        width: for a sum, the number of columns of the result; else the number of terms of an inner product.
    """
    limits = _SUM_LIMITS if kind == "sum" else _INNER_LIMITS
    size = tuple(min(1 << (n - 1).bit_length(), most) for n, most in zip((rows, height, width), limits, strict=True))
    return _onednn_was_right() and trial.is_faster((kind, *size), functools.partial(_candidates, kind, *size))


_SUM_LIMITS = (1024, 512, 512)
"""Largest sizes of a trial of sums. It takes about a millisecond for every product."""
_INNER_LIMITS = (256, 256, 512)
"""Largest sizes of a trial of inner products, for each of ``_TRIED`` records."""
_TRIED = 4


def _candidates(kind: str, rows: int, height: int, width: int) -> tuple[Callable[[], object], Callable[[], object]]:
    if kind == "sum":
        left, right, out = torch.ones(1, rows, height), torch.ones(1, rows, width), torch.empty(height, width)
        usual = functools.partial(torch.mm, left[0].t(), right[0], out=out)
        return usual, functools.partial(_add_outer_by_onednn, left, right, out, first=True)
    a, b = torch.ones(_TRIED, rows, width), torch.ones(_TRIED, height, width)
    # Without oneDNN, three of the four quarters of a symmetric matrix are computed.
    part = b[:, : height * 3 // 4] if kind == "Gram" else b
    return functools.partial(torch.bmm, a, part.transpose(1, 2)), functools.partial(_inner_by_onednn, a, b)


@functools.cache
def _onednn_was_right() -> bool:
    return onednn_is_right()


def onednn_is_right() -> bool:
    """Say whether this build of torch has oneDNN's products, with the precision of float32.

    It must be called with torch's settings at full precision, as :func:`precision.exact` makes them.
    """
    generator = torch.Generator().manual_seed(0)
    for positions in (_MANY // 4, _MANY):
        left, right = (torch.randn(2, positions, width, generator=generator) for width in (260, 200))
        want = torch.einsum("bti,btj->ij", left.double(), right.double())
        try:
            got = _outer(left, right)
        except (AttributeError, RuntimeError):  # another build of torch
            return False
        # With a thousand roundings at size 30, float32 is right to 1e-4. Factors in bfloat16 would be wrong by 0.1.
        if not float((got - want).abs().max()) < 1e-3:
            return False
    return True
