"""Slope of the loss at the start of a path, from releases times the part of the path that other releases made.

A release is the gradient of the whole data, plus noise, plus what is special about the records that were drawn. The
path is a weighted sum of releases. So the product of a release with the path holds the square of its own noise and of
its own draw, which looks like a slope; in small batches that is most of it. What a release has of itself in the path is
taken off here. With the rest it has only the gradient in common: noise and draws of different steps are independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from opacus_ac.optimizer.path_length import Slopes

State = dict[str, Any]
_NOTHING = 1e-9  # share of a path that is rounding
_ROUNDING = 1e-6  # of a product: what is left of it after most was taken off may be that

FRESH: Mapping[str, float] = {
    "anchored": 0,  # number of releases in the anchor
    "total_weight": 0.0,  # sum over all releases j of their weight a_j in the path
    "anchor_weight": 0.0,  # sum of a_i over the releases i of the anchor
    "own": 0.0,  # sum over the anchor of a_i |g_i|^2: the product of each of its releases with its own part of the path
    "anchor_variance": 0.0,  # sum over the anchor of the variance of the noise
    "recent": 0.0,  # sum over the anchor of beta1^(t - i)
    "recent_squares": 0.0,  # sum over the anchor of beta1^(t - i) |g_i|^2
}
"""Numbers that the state of a tensor has for its anchor, before the first release."""


def join(state: State, gradient: Tensor, squares: float, std: float) -> None:
    """Take a release into the anchor, the sum of those that stand for the start.

    Args:
        state: state of the tensor; ``state["anchor"]`` has its shape.
        gradient: the release.
        squares: its squared norm.
        std: std of the noise in it.
    """
    state["anchor"].add_(gradient)
    state["anchored"] += 1
    state["anchor_variance"] += std**2
    state["recent"] += 1.0
    state["recent_squares"] += squares


def moved(state: State, *, kept: float, further: float, beta1: float) -> None:
    """Note that the path is now ``kept`` times itself, plus ``further`` times the average of releases.

    Args:
        state: state of the tensor, which has taken in the last release.
        kept: factor on the path.
        further: factor on the bias-corrected average of ``beta1``.
        beta1: momentum.
    """
    correction = 1 - beta1 ** state["step"]
    mine = further * (1 - beta1) / correction
    state["total_weight"] = kept * state["total_weight"] + further
    state["anchor_weight"] = kept * state["anchor_weight"] + mine * state["recent"]
    state["own"] = kept * state["own"] + mine * state["recent_squares"]
    state["recent"] *= beta1
    state["recent_squares"] *= beta1


def slopes(
    measured: Sequence[Sequence[float]], states: Sequence[State], stds: Sequence[float], sizes: Sequence[int]
) -> Slopes:
    """Return the slopes along the whole path, at its start and at its end.

    Args:
        measured: of each tensor, ``<g, Delta>``, the product of anchor and path, and ``|Delta|^2``, as its first three.
        states: their states.
        stds: std of the noise in the last release of each.
        sizes: their numbers of entries.
    """
    start = variance = rounding = 0.0
    single = True
    for row, state, size in zip(measured, states, sizes, strict=True):
        if not state["anchored"]:
            continue
        others = state["total_weight"] - state["anchor_weight"] / state["anchored"]
        if others > _NOTHING * state["total_weight"]:
            single = single and not row[2]
            whole = state["total_weight"] / others / state["anchored"]
            start += whole * (row[1] - state["own"])
            rounding += whole * _ROUNDING * (abs(row[1]) + state["own"])
            variance += whole**2 * state["anchor_variance"] * row[2]
        else:  # the path is this release and no other: of what they have in common, only the noise is known
            start += row[1] - state["anchor_weight"] * size * state["first_std"] ** 2
            variance += state["first_std"] ** 2 * row[2]
    here = sum(row[0] for row in measured)
    noise = math.sqrt(sum(std**2 * row[2] for row, std in zip(measured, stds, strict=True)))
    return Slopes(start, here, noise, max(math.sqrt(variance), rounding), single)
