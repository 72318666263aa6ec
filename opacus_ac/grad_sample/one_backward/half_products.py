"""Products of bfloat16 and float16 matrices with float32 results, on devices that have them.

The product of two such numbers is exact in float32, and tensor cores add up in float32. So nothing is lost beside
widening both factors first, but the order in which terms are added up, which the bounds leave open. Tensor cores may
truncate, for which :func:`bounds.unit` allows. torch has these products since version 2.8, for GPUs of CUDA and ROCm,
and later for xpu. Where it has none, as on CPUs, factors are widened.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SPLIT = 2.0**-16
"""Relative error of a float32 number as the sum of two bfloat16 numbers, each of which is rounded by ``2^-8``."""


def available(x: Tensor) -> bool:
    """Say whether ``x`` can be multiplied as it is, with a float32 result."""
    return x.dtype in (torch.bfloat16, torch.float16) and _are_right(x.device.type, x.dtype)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a_i b_i`` for every record, ``[B, M, N]`` in float32.

    Args:
        a: ``[B, M, K]`` in half precision.
        b: ``[B, K, N]``, of the same type and device.
    """
    product: Tensor = torch.bmm(a, b, out_dtype=torch.float32)
    return product


def has_sums(wide_side: Tensor, out: Tensor) -> bool:
    """Say whether weighted sums into ``out`` take one side as it is, and the weighted side in two parts."""
    return wide_side.dtype == torch.bfloat16 and out.dtype == torch.float32 and available(wide_side)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return two bfloat16 tensors whose sum is the float32 tensor ``x`` up to ``SPLIT``."""
    high = x.to(torch.bfloat16)
    return high, (x - high).to(torch.bfloat16)


def sum_error(left: Tensor, right: Tensor) -> float:
    """Return the error of weighted sums that comes from weighted sides in two parts, for the sides of a layer."""
    in_parts = any(side.dtype == torch.bfloat16 and available(side) for side in (left, right))
    # The sum of both products is rounded, too.
    return SPLIT + 2.0**-22 if in_parts else 0.0


@functools.cache
def _are_right(device: str, dtype: torch.dtype) -> bool:
    """Say whether the device has these products, with the precision of float32, from one trial."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 48, 512, generator=generator).to(dtype) for _ in range(2))
    try:
        got = multiply(a.to(device), b.to(device).transpose(1, 2)).cpu()
    except (TypeError, RuntimeError):  # torch is too old, or the device has none
        return False
    want = a.double() @ b.double().transpose(1, 2)
    # The terms are positive. Results in bfloat16 would be wrong by up to 4e-3, partial sums in it by more.
    return got.dtype == torch.float32 and bool(((got - want).abs() <= 512 * 2.0**-23 * want).all())
