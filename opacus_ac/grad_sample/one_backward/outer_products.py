"""Terms: the contribution of one use of a parameter, as a sum of outer products for each record.

Each use of a matrix parameter adds ``sum_t left_t (x) right_t`` to the gradient of a record. For a dense layer, both
sides are dense (output gradient and input). For an embedding, the left side is one-hot (the token id). A layer whose
gradients have another form gives them as rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KEEP_FACTOR = 1.0
"""Dense gradients ``[I, J]`` are written down if ``I J <= KEEP_FACTOR T (I + J)``.

Otherwise ``T (I + J)`` numbers per record are kept until the clip factors are known. Writing down costs one product,
which the weight gradient needs anyway, and afterwards the two factors are not needed. With Gram matrices, two Gram
matrices and that product are computed. A factor of 2 would save a few per cent of time on small models, and would need
more memory than ordinary training.
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
        """Whether the written-down gradient needs less memory than its factors."""
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
    """Per-sample gradients that are written down."""

    values: Tensor
    """``[B, *shape]``."""


Term = Dense | Lookup | Rows


def keeps(positions: int, rows: int, columns: int) -> bool:
    """Say whether a dense gradient ``[rows, columns]`` of ``positions`` outer products is written down."""
    return rows * columns <= KEEP_FACTOR * positions * (rows + columns)
