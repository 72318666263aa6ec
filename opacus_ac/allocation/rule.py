"""The rule of noise allocation: the weights with the least noise energy, and those that public records ask for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def group_of(groups: str | Callable[[str], str], name: str) -> str:
    """Return the group of a parameter by its name."""
    if callable(groups):
        return str(groups(name))
    return name if groups == "parameter" else name.rpartition(".")[0]


def optimal_weights(
    sizes: Sequence[float], norms: Sequence[float], importance: Sequence[float] | None = None, clamp: float = 4.0
) -> list[float]:
    """Return the weight of each group that minimises the noise energy.

    It is proportional to ``(I_g d_g)^(1/4) / G_g^(1/2)``, with geometric mean 1 and inside ``[1/clamp, clamp]``.

    The noise energy is ``sum_g I_g d_g (sigma C / w_g)^2``, where C is in proportion to the root mean square of the
    records' scaled norms.

    Args:
        sizes: ``d_g``, numbers of coordinates.
        norms: ``G_g``, root mean squares of the records' gradient norms, > 0.
        importance: ``I_g`` > 0; None for 1.
        clamp: largest factor away from 1.

    References:
        The rule of AdaClip (arXiv 1908.07643) at the level of groups.

    >>> optimal_weights([900, 100], [0.1, 1.0])[0] / optimal_weights([900, 100], [0.1, 1.0])[1]
    5.477...
    """
    ones = [1.0] * len(sizes) if importance is None else importance
    raw = [math.log(i * d) / 4 - math.log(g) / 2 for i, d, g in zip(ones, sizes, norms, strict=True)]
    logs, limit = np.asarray(raw), math.log(clamp)
    centre = logs.mean()
    for _ in range(60):  # the mean of the clipped logarithms falls with their centre, at most as fast as it
        centre += np.clip(logs - centre, -limit, limit).mean()
    return [float(w) for w in np.exp(np.clip(logs - centre, -limit, limit))]
