"""Gaussian noise in float64, made and added a block at a time while the block is in cache.

Box and Muller's transform has no branches that a processor could predict wrongly. Its angle comes from a table of directions
turned by the rest of the angle, because ``numpy`` has no vectorised float64 sine on most processors. torch's logarithm is
vectorised, but it works in threads of its own, which the threads here would wait for.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

# Values in a block: its work space (3.3 MB a thread) stays in the shared cache. Smaller blocks fit into that of a core,
# but every call of numpy ends with the threads waiting for the interpreter in turn, which costs more.
BLOCK = 1 << 17
_DIRECTIONS = 1 << 12
_ANGLE = 2 * math.pi / _DIRECTIONS
# One more than a turn: a fraction of a turn rounds to 0 ... _DIRECTIONS, both ends included.
_COS = np.cos(np.arange(_DIRECTIONS + 1) * _ANGLE)
_SIN = np.sin(np.arange(_DIRECTIONS + 1) * _ANGLE)

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]


class Bits(Protocol):
    """Source of uniform random bits."""

    def fill(self, words: Words) -> None:
        """Overwrite ``words [n]`` with independent uniform 64-bit integers."""


def uniform(words: Words, out: Floats, scale: float = 1.0) -> None:
    """Write ``scale k / 2^53`` with k the upper 53 bits of each word, in [0, scale); ``words`` are spoilt."""
    np.right_shift(words, np.uint64(11), out=words)
    np.multiply(words, scale * 2.0**-53, out=out, casting="unsafe")


class GaussianSampler:
    """Adds float64 Gaussian noise to arrays; for one thread at a time.

    Args:
        bits: source of the draws; nobody else may use it meanwhile.
        summed: number of independent Gaussians that make up one draw, divided by its root. With 4, the low-order bits of a
            draw no longer tell which floating-point numbers it was made from.

    Guarantees:
        Every Gaussian is float64, from 53 random bits for the angle and 53 for the radius: it reaches to 8.57 standard
        deviations, and the probability of more is 1e-17. The angle is off by less than 1e-16. Added in float64, the
        result is rounded once, to the target's type.

    References:
        Box and Muller 1958 (Annals of Mathematical Statistics 29); Holohan and Braghin 2021, arXiv 2107.10138, section 5
        (sums of Gaussians against attacks on floating-point noise).
    """

    def __init__(self, bits: Bits, summed: int = 1) -> None:
        self._bits, self._summed = bits, summed
        self._words = np.empty(BLOCK // 2, np.uint64)
        self._noise = np.empty(BLOCK)
        self._sum = np.empty(BLOCK if summed > 1 else 0)
        self._work = np.empty((3, BLOCK // 2))
        self._nearest = np.empty(BLOCK // 2, np.intp)

    def draw(self, size: int, std: float) -> Floats:
        """Return ``[size]`` independent values of N(0, std^2), ``size <= BLOCK``; the next draw overwrites them."""
        each = std / math.sqrt(self._summed)
        noise = self._draw(size, each)
        if self._summed == 1:
            return noise
        total = self._sum[:size]
        np.copyto(total, noise)
        for _ in range(self._summed - 1):
            np.add(total, self._draw(size, each), out=total)
        return total

    def _draw(self, size: int, std: float) -> Floats:
        """Return ``[size]`` values by one transform."""
        half = (size + 1) // 2
        cos, sin, radius = self._work[:, :half]
        # The two halves of the result serve as work space before.
        first, second = self._noise[:half], self._noise[half : 2 * half]
        self._directions(cos, sin)
        tangent = self._tangent(second, first)
        self._logarithms(radius)
        # The turned direction (cos - t sin, sin + t cos) has length sqrt(1 + t^2), which the radius takes away.
        np.multiply(tangent, tangent, out=first)
        np.subtract(-1.0, first, out=first)
        np.divide(radius, first, out=radius)
        np.sqrt(radius, out=radius)
        np.multiply(radius, math.sqrt(2) * std, out=radius)
        np.multiply(cos, radius, out=cos)
        np.multiply(sin, radius, out=sin)
        np.multiply(sin, tangent, out=first)
        np.subtract(cos, first, out=first)
        np.multiply(cos, tangent, out=second)
        np.add(sin, second, out=second)
        return self._noise[:size]

    def _directions(self, cos: Floats, sin: Floats) -> None:
        """Draw angles; write the directions nearest to them, and to the second half of the noise what remains."""
        half = cos.size
        rest, rounded, nearest = self._noise[half : 2 * half], self._noise[:half], self._nearest[:half]
        words = self._words[:half]
        self._bits.fill(words)
        uniform(words, rest, _DIRECTIONS)
        np.rint(rest, out=rounded)
        np.subtract(rest, rounded, out=rest)
        np.copyto(nearest, rounded, casting="unsafe")
        # "clip" only because it lets numpy write to the output directly: every index is in range.
        np.take(_COS, nearest, out=cos, mode="clip")
        np.take(_SIN, nearest, out=sin, mode="clip")

    def _tangent(self, rest: Floats, scratch: Floats) -> Floats:
        """Turn ``rest``, in [-1/2, 1/2] steps of the table, into the tangent of its angle: x + x^3/3 is exact to 4e-17."""
        np.multiply(rest, rest, out=scratch)
        np.multiply(scratch, _ANGLE**3 / 3, out=scratch)
        np.add(scratch, _ANGLE, out=scratch)
        return np.multiply(rest, scratch, out=rest)

    def _logarithms(self, out: Floats) -> None:
        """Draw uniform values in (0, 1], zero excluded, and write their logarithms."""
        words = self._words[: out.size]
        self._bits.fill(words)
        np.right_shift(words, np.uint64(11), out=words)
        np.add(words, np.uint64(1), out=words)
        np.multiply(words, 2.0**-53, out=out, casting="unsafe")
        np.log(out, out=out)

    def add_to(self, block: npt.NDArray[np.floating], std: float, scale: float) -> None:
        """Set ``block [n]``, ``n <= BLOCK``, to ``(block + N(0, std^2)) * scale``, rounded once; std 0 draws nothing."""
        if std == 0:
            np.multiply(block, scale, out=block, dtype=np.float64, casting="same_kind")
            return
        noise = self.draw(block.size, std)
        np.add(noise, block, out=noise)
        np.multiply(noise, scale, out=block, casting="same_kind")
