"""Products of float32 matrices on the CPU, by the faster of two libraries of torch.

torch multiplies matrices with MKL, and has oneDNN for convolutions and for compiled models. On AMD processors with
AVX-512, oneDNN took little more than half the time (``examples/benchmarks/benchmark_products.py``). On others, and for
small products, torch's own functions are used.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

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
    """Say whether oneDNN is faster for :func:`inner`."""
    worth = a.shape[1] * a.shape[2] * b.shape[1] >= _WORTH_A_RECORD
    return worth and all(_is_plain(x) for x in (a, b)) and may_be_faster(a)


def _is_plain(x: Tensor) -> bool:
    """Say whether every record is a contiguous matrix, or the transpose of one.

    oneDNN has fast code for these layouts only. For a transposed slice it may take a thousand times longer.
    """
    return x.is_contiguous() or x.transpose(1, 2).is_contiguous()


def may_be_faster(x: Tensor) -> bool:
    """Say whether oneDNN may be faster for tensors of this type and device, if the product is large enough."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and onednn_is_faster()


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


@functools.cache
def onednn_is_faster() -> bool:
    """Say whether oneDNN is available, faster than MKL (on AMD processors with AVX-512), and right in a trial.

    The choice depends on the machine only, so a run can be repeated exactly.
    """
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return _made_by_amd() and onednn_is_right()


def _made_by_amd() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8", errors="replace")


def onednn_is_right() -> bool:
    """Say whether this build of torch has oneDNN's products, with the precision of float32."""
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
