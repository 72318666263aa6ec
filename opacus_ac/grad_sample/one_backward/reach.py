"""The reach of many layers at once: sums over positions of the products of the lengths of both sides.

The bounds of norms need it for every use of a parameter (:mod:`bounds`). It is computed from two small tensors per use.
On a GPU, an operation on one of them takes as long to ask for as on all of them. So they are kept until the end of the
backward pass, and uses of one length are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ENTRIES = 1 << 22
"""Entries of the lengths of one side that are computed together."""


@dataclass(frozen=True)
class Sides:
    """Lengths of the positions of both sides of one use of a parameter.

    Attributes:
        left: ``[B, T]``.
        right: ``[B, T]``, of the same type, on the same device.
        squared: whether both are squared lengths, and the largest of them is asked for.
    """

    left: Tensor
    right: Tensor
    squared: bool


@dataclass(frozen=True)
class Reach:
    """What a bound needs of the lengths, ``[B]`` in float64 each.

    Attributes:
        total: the sum over positions of the product of both lengths.
        largest: the largest squared length; None where it is not asked for.
    """

    total: Tensor
    largest: Tensor | None

    def plus(self, other: Reach) -> Reach:
        """Return the reach of both uses."""
        one, two = self.largest, other.largest
        largest = two if one is None else one if two is None else torch.maximum(one, two)
        return Reach(self.total + other.total, largest)


def reaches(sides: Sequence[Sides]) -> list[Reach]:
    """Return the reach of each use, with one computation for all uses of the same length."""
    found: dict[int, Reach] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, own in enumerate(sides):
        key = own.squared, own.left.shape, own.left.dtype, own.right.dtype, own.left.device
        groups.setdefault(key, []).append(place)
    for places in groups.values():
        step = max(1, _ENTRIES // max(1, sides[places[0]].left.numel()))
        for first in range(0, len(places), step):
            some = places[first : first + step]
            found.update(zip(some, _together([sides[place] for place in some]), strict=True))
    return [found[place] for place in range(len(sides))]


def _together(sides: Sequence[Sides]) -> list[Reach]:
    left, right = (torch.stack([getattr(own, name) for own in sides]).double() for name in ("left", "right"))
    largest: Sequence[Tensor | None] = [None] * len(sides)
    if not sides[0].squared:
        return [Reach(total, None) for total in left.mul_(right).sum(-1).unbind()]
    if left.shape[-1]:
        largest = torch.maximum(left.amax(-1), right.amax(-1)).unbind()
    totals = left.mul_(right).sqrt_().sum(-1).unbind()
    return [Reach(total, most) for total, most in zip(totals, largest, strict=True)]
