"""Float32 products of matrices on the processor, by the faster of the two libraries that torch has for them.

torch multiplies with MKL. On processors of AMD with AVX-512, oneDNN, which torch has for convolutions and for compiled
models, took little more than half its time (``examples/benchmarks/benchmark_products.py``). Elsewhere, and where little
is to be done, the products are torch's own.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

_WORTH = 1 << 22
"""Multiplications below which a call of the other library is not worth it."""
_WORTH_A_RECORD = 1 << 23
"""The same for each record of a batch, which take a call each."""
_WHOLE = 1 << 20
"""Numbers of a result that are computed at once."""
_ROWS = 512
"""Rows of a larger one that are: it is written twice, and the second time from the cache."""
_MANY = 512
"""Rows of the factors from which on transposing them costs more than oneDNN's own layout of the result."""


def add_outer(left: Tensor, right: Tensor, out: Tensor, *, first: bool) -> None:
    """Add ``sum_i left_i^T right_i`` to ``out``, or write it there when ``first``.

    Args:
        left: ``[B, T, I]``.
        right: ``[B, T, J]``, of the same type and device as ``left`` and ``out``.
        out: ``[I, J]``.
        first: whether what ``out`` holds is to be overwritten.
    """
    worth = left.numel() * right.shape[2] >= _WORTH
    if worth and left.is_contiguous() and right.is_contiguous() and may_be_faster(left):
        _add_outer_by_onednn(left, right, out, first=first)
        return
    a, b = left.reshape(-1, left.shape[2]).t(), right.reshape(-1, right.shape[2])
    if first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a_i b_i^T`` for every record, ``[B, M, N]``.

    Args:
        a: ``[B, M, K]``.
        b: ``[B, N, K]``, of the same type and device.
    """
    return _inner_by_onednn(a, b) if inner_is_faster(a, b) else torch.bmm(a, b.transpose(1, 2))


def inner_is_faster(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN is faster at :func:`inner`."""
    worth = a.shape[1] * a.shape[2] * b.shape[1] >= _WORTH_A_RECORD
    return worth and all(_is_plain(x) for x in (a, b)) and may_be_faster(a)


def _is_plain(x: Tensor) -> bool:
    """Whether every record is a matrix that lies in memory as it is, or transposed.

    oneDNN has fast code for these layouts only: of a transposed slice it may take a thousand times longer.
    """
    return x.is_contiguous() or x.transpose(1, 2).is_contiguous()


def may_be_faster(x: Tensor) -> bool:
    """Whether oneDNN's products may be faster for tensors of this kind, where there is enough to be done."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and onednn_is_faster()


def _inner_by_onednn(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(len(a), a.shape[1], b.shape[1])
    for record in range(len(a)):
        out[record] = _multiply(a[record], b[record])
    return out


def _add_outer_by_onednn(left: Tensor, right: Tensor, out: Tensor, *, first: bool) -> None:
    """As :func:`add_outer`, of contiguous factors."""
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

    The weight gradient of a convolution over one pixel, whose input is ``right`` with its channels last.
    """
    if left.shape[0] * left.shape[1] < _MANY:
        return _multiply(left.flatten(0, 1).t(), right.flatten(0, 1).t())
    pixels = (x.unsqueeze(2).permute(0, 3, 1, 2) for x in (right, left))
    product: Tensor = conv2d_weight(next(pixels), (left.shape[2], right.shape[2], 1, 1), next(pixels))
    return product.flatten(1)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b^T`` of ``[M, K]`` and ``[N, K]``, by the operator that torch's own compiler has for it."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN is there, faster than MKL (AVX-512 on a processor of AMD), and right, for which it is tried once.

    The choice depends on the machine alone, so that a run can be repeated to the last digit.
    """
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return _made_by_amd() and onednn_is_right()


def _made_by_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")


def onednn_is_right() -> bool:
    """Whether this build of torch has oneDNN's products and they have float32's precision."""
    generator = torch.Generator().manual_seed(0)
    for positions in (_MANY // 4, _MANY):
        left, right = (torch.randn(2, positions, width, generator=generator) for width in (260, 200))
        want = torch.einsum("bti,btj->ij", left.double(), right.double())
        try:
            got = _outer(left, right)
        except (AttributeError, RuntimeError):  # another build of torch
            return False
        # A sum of a thousand roundings at size 30 is right to 1e-4; factors in bfloat16 would be off by 0.1.
        if not float((got - want).abs().max()) < 1e-3:
            return False
    return True
