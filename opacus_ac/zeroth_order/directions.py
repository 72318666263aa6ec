"""Public random directions: drawn from a seed, a block at a time, and never stored."""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

BLOCK = 1 << 17
"""Values of a direction that exist at a time."""

_SHIFTS = torch.arange(8, dtype=torch.uint8)


def derived_seed(*numbers: int) -> int:
    """Return 63 bits that depend on all of ``numbers``, each in [0, 2^64)."""
    packed = struct.pack(f"<{len(numbers)}Q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


class Directions:
    """Directions of a run: direction ``k`` of step ``t`` follows from (seed, t, k) alone.

    Args:
        kind: "gaussian", "sphere" (not normalised here, see :class:`Coordinates`) or "rademacher".
        seed: public 63-bit seed.

    Guarantees:
        Nothing here is secret. No draw of these generators enters noise or sampling. The privacy proof holds for any
        fixed directions, known to everybody.

    The generators of torch are used, one seed per (direction, tensor, block). On the CPU they keep 32 bits of it, so
    that a few of the many blocks of a long run may coincide by chance. This costs no privacy, because directions are
    public.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def seeds(self, step: int, count: int) -> list[int]:
        """Return the 63-bit seeds of the ``count`` directions of ``step``."""
        return [derived_seed(self.seed, step, k) for k in range(count)]

    def block(self, seed: int, tensor: int, number: int, like: Tensor) -> Tensor:
        """Return a block of the direction ``seed``.

        Args:
            seed: seed of the direction.
            tensor: number of the tensor that it belongs to.
            number: number of the block in that tensor.
            like: its size, type and device, ``[n]``, ``n <= BLOCK``.

        Returns:
            ``[n]`` values of mean 0 and variance 1; float32 draws, whatever the type of the weights.
        """
        generator = self._generators.get(like.device)
        if generator is None:
            generator = self._generators[like.device] = torch.Generator(like.device)
        generator.manual_seed(derived_seed(seed, tensor, number))
        if self.kind == "rademacher":
            return _signs(like, generator)
        return torch.randn(like.numel(), generator=generator, device=like.device).to(like.dtype)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return ``[n]`` values of -1 and 1, eight to a random byte."""
    count = (like.numel() + 7) // 8
    packed = torch.empty(count, dtype=torch.uint8, device=like.device).random_(0, 256, generator=generator)
    bits = packed[:, None].bitwise_right_shift(_SHIFTS.to(like.device)).bitwise_and_(1)
    return bits.view(-1)[: like.numel()].to(like.dtype).mul_(2).sub_(1)
