"""One use of a parameter, as a sum of outer products for each record.

Every use of a matrix parameter adds ``sum_t left_t (x) right_t`` to a record's gradient. For a dense layer both sides
are dense (output gradient and input), for an embedding the left side is one-hot (the token id). A layer whose gradients
have another form hands them over as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KEEP_FACTOR = 1.0
"""A dense gradient ``[I, J]`` is materialised when ``I J <= KEEP_FACTOR T (I + J)``.

``T (I + J)`` numbers is what book-keeping has to hold until the clip factors are known. Materialising costs the one
product that the weight gradient needs anyway, and afterwards the two factors can go; the Gram route needs the two Grams
and then that product. A factor of 2 would save a few percent of time on small models and cost more memory than
ordinary training has.
"""


@dataclass
class Dense:
    """``G_i = sum_t left[i, t] (x) right[i, t]``, the gradient of a weight stored ``[I, J]``."""

    left: Tensor
    """``[B, T, I]``."""
    right: Tensor
    """``[B, T, J]``."""

    @property
    def worth_keeping(self) -> bool:
        """Whether the materialised gradient is cheaper than its factors."""
        positions, rows, columns = self.left.shape[1], self.left.shape[2], self.right.shape[2]
        return keeps(positions, rows, columns)


@dataclass
class Lookup:
    """``G_i = sum_t onehot(ids[i, t]) (x) right[i, t]``, the gradient of an embedding table ``[V, D]``."""

    ids: Tensor
    """``[B, T]`` integers."""
    right: Tensor
    """``[B, T, D]``."""


@dataclass
class Rows:
    """Materialised per-sample gradients."""

    values: Tensor
    """``[B, *shape]``."""


Term = Dense | Lookup | Rows


def keeps(positions: int, rows: int, columns: int) -> bool:
    """Whether a dense gradient ``[rows, columns]`` of ``positions`` outer products is materialised."""
    return rows * columns <= KEEP_FACTOR * positions * (rows + columns)
