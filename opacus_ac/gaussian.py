"""Gaussian noise in float64, made and added a block at a time while the block is in cache.

``numpy``'s own normal draw costs 10 ns, half of it for a sign that no processor can predict. Box and Muller's transform
has no branches; its radius comes from ``numpy``'s exponential draw, and its angle from a table of directions turned by
the rest of the angle, because ``numpy`` has no vectorised float64 sine on most processors.
"""

from __future__ import annotations

import math

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


class GaussianSampler:
    """Adds float64 Gaussian noise to arrays; for one thread at a time.

    Args:
        generator: source of the draws; nobody else may use it meanwhile.

    Guarantees:
        Noise is float64 from 53 random bits for the angle and a float64 exponential draw for the squared radius; the
        angle is off by less than 1e-16. Added in float64, the result is rounded once, to the target's type.

    References:
        Box and Muller 1958 (Annals of Mathematical Statistics 29).
    """

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator
        self._noise = np.empty(BLOCK)
        self._work = np.empty((3, BLOCK // 2))
        self._nearest = np.empty(BLOCK // 2, np.intp)

    def draw(self, size: int, std: float) -> Floats:
        """Return ``[size]`` independent values of N(0, std^2), ``size <= BLOCK``; the next draw overwrites them."""
        half = (size + 1) // 2
        cos, sin, radius = self._work[:, :half]
        # The two halves of the result serve as work space before.
        first, second = self._noise[:half], self._noise[half : 2 * half]
        self._directions(cos, sin)
        tangent = self._tangent(second, first)
        # The turned direction (cos - t sin, sin + t cos) has length sqrt(1 + t^2), which the radius takes away.
        self._generator.standard_exponential(out=radius)
        np.multiply(tangent, tangent, out=first)
        np.add(first, 1.0, out=first)
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
        self._generator.random(out=rest)
        np.multiply(rest, float(_DIRECTIONS), out=rest)
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

    def add_to(self, block: npt.NDArray[np.floating], std: float, scale: float) -> None:
        """Set ``block [n]``, ``n <= BLOCK``, to ``(block + N(0, std^2)) * scale``, rounded once; std 0 draws nothing."""
        if std == 0:
            np.multiply(block, scale, out=block, dtype=np.float64, casting="same_kind")
            return
        noise = self.draw(block.size, std)
        np.add(noise, block, out=noise)
        np.multiply(noise, scale, out=block, casting="same_kind")
