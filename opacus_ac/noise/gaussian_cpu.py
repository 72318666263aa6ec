"""Gaussian noise in float64, made and added a block at a time while the block is in cache.

The Box-Muller transform has no branches that a processor could mispredict. The angle is a direction from a table,
turned by the remaining angle, because ``numpy`` has no vectorised float64 sine on most processors. The logarithm is
numpy's: torch's is vectorised too, but runs in threads of its own, and the threads here would wait for them. A pair of
values is a complex number: one product turns and stretches it.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

# Values in a block: its work space (4 MB a thread) stays in the shared cache. Smaller blocks fit into that of a core,
# but every call of numpy ends with the threads waiting for the interpreter in turn, which costs more.
BLOCK = 1 << 17
# The upper bits of a word choose a direction of the table, the others what remains of the angle.
_CHOICE = 12
_ANGLE = 2 * math.pi / (1 << _CHOICE)
_DIRECTIONS = np.exp(1j * (np.arange(1 << _CHOICE) + 0.5) * _ANGLE)
_REST = np.uint64((1 << (64 - _CHOICE)) - 1)
# The bits of 1.0: with 52 bits below, a number in [1, 2).
_ONE = np.uint64(0x3FF << 52)

Floats = npt.NDArray[np.float64]
Pairs = npt.NDArray[np.complex128]
Words = npt.NDArray[np.uint64]


class Bits(Protocol):
    """Source of uniform random bits."""

    def fill(self, words: Words) -> None:
        """Overwrite ``words [n]`` with independent uniform 64-bit integers."""


def uniform(words: Words, out: Floats) -> None:
    """Write ``k / 2^53`` with k the upper 53 bits of each word, in [0, 1); ``words`` are spoilt."""
    np.right_shift(words, np.uint64(11), out=words)
    np.multiply(words.view(np.int64), 2.0**-53, out=out)


class GaussianSampler:
    """Adds float64 Gaussian noise to arrays; for one thread at a time.

    Args:
        bits: source of the draws; nobody else may use it meanwhile.
        summed: number of independent Gaussians that are summed for one draw; the sum is divided by the square root of
            that number. With 4, the low-order bits of a draw no longer tell which floating-point numbers it was made
            from.

    Guarantees:
        Every Gaussian is float64, from 64 random bits for the angle and 53 for the radius: it reaches to 8.57 standard
        deviations, and the probability of more is 1e-17. The direction is off by less than 1e-15. Added in float64, the
        result is rounded once, to the target's type.

    References:
        Box and Muller 1958 (Annals of Mathematical Statistics 29); Holohan and Braghin 2021 (arXiv 2107.10138,
        section 5: sums of Gaussians against attacks on floating-point noise).
    """

    def __init__(self, bits: Bits, summed: int = 1) -> None:
        self._bits, self._summed = bits, summed
        half = BLOCK // 2
        self._words, self._nearest = np.empty(half, np.uint64), np.empty(half, np.intp)
        self._noise, self._turns = np.empty(half, np.complex128), np.empty(half, np.complex128)
        self._sum = np.empty(BLOCK if summed > 1 else 0)
        self._work = np.empty((2, half))
        self._directions, self._std = _DIRECTIONS, math.nan  # of the last draw; sqrt(2) std is in the table

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
        noise, turns = self._noise[:half], self._turns[:half]
        tangent, radius = self._work[:, :half]
        if std != self._std:
            self._directions, self._std = _DIRECTIONS * (math.sqrt(2) * std), std
        self._angles(noise, tangent, radius)
        self._logarithms(radius)
        # The turn 1 + i t has length sqrt(1 + t^2), which the radius takes away.
        scratch = turns.view(np.float64)[:half]
        np.multiply(tangent, tangent, out=scratch)
        np.subtract(-1.0, scratch, out=scratch)
        np.divide(radius, scratch, out=radius)
        np.sqrt(radius, out=turns.real)
        np.multiply(turns.real, tangent, out=turns.imag)
        np.multiply(noise, turns, out=noise)
        return noise.view(np.float64)[:size]

    def _angles(self, nearest: Pairs, tangent: Floats, scratch: Floats) -> None:
        """Draw angles; write the nearest direction of the table and the tangent of the remaining angle."""
        words, choice = self._words[: tangent.size], self._nearest[: tangent.size]
        self._bits.fill(words)
        np.right_shift(words, np.uint64(64 - _CHOICE), out=choice.view(np.uint64))
        # "clip" only because it lets numpy write to the output directly: every index is in range.
        np.take(self._directions, choice, out=nearest, mode="clip")
        np.bitwise_and(words, _REST, out=words)
        np.bitwise_or(words, _ONE, out=words)
        np.subtract(words.view(np.float64), 1.5, out=tangent)  # in [-1/2, 1/2) steps of the table
        # tan(x) = x + x^3/3 is exact to 4e-17 here.
        np.multiply(tangent, tangent, out=scratch)
        np.multiply(scratch, _ANGLE**3 / 3, out=scratch)
        np.add(scratch, _ANGLE, out=scratch)
        np.multiply(tangent, scratch, out=tangent)

    def _logarithms(self, out: Floats) -> None:
        """Draw uniform values in (0, 1], zero excluded, and write their logarithms."""
        words = self._words[: out.size]
        self._bits.fill(words)
        np.right_shift(words, np.uint64(11), out=words)
        np.add(words, np.uint64(1), out=words)
        np.multiply(words.view(np.int64), 2.0**-53, out=out)
        np.log(out, out=out)

    def add_to(self, block: npt.NDArray[np.floating], std: float, scale: float) -> None:
        """Set ``block [n]``, ``n <= BLOCK``, to ``(block + N(0, std^2)) * scale``, rounded once.

        A std of 0 draws nothing.
        """
        if std == 0:
            np.multiply(block, scale, out=block, dtype=np.float64, casting="same_kind")
            return
        noise = self.draw(block.size, std)
        np.add(noise, block, out=noise)
        np.multiply(noise, scale, out=block, casting="same_kind")
