"""How far rounding carries one record over into the differences of another, and the smallest C that this allows.

The loss of a record is computed in a batch, and a matrix product of 32 rows rounds otherwise than one of 31. A record
that joins changes the losses of all others by about one rounding, and a difference divides that by ``2 lambda``. In
float32, with losses around 1 and lambda = 1e-3, this is 6e-5 per record and direction, whatever C is. At C = 1e-4 a
record would move the sum by many C.

Three things keep what the other records add below :data:`SHARE` of C:

* **Physical batches of one record** (``max_physical_batch_size=1``): a record is computed by itself, from the same
  weights, in the same way whoever else is in the batch. Nothing is left to bound. This is exact as far as the forward
  pass repeats itself to the last bit.
* **float64** otherwise: every operation of the closure is done in float64, whatever types weights and inputs have.
* **A smallest C and a size of losses**: a loss ``f`` is taken to be known up to
  ``SAFETY * eps * max(|f|, largest_loss)``. C is never below the value at which losses of up to ``largest_loss``, of as
  many records as a batch can have, carry over :data:`SHARE` of C. Differences of a record with a larger loss count in
  proportion less. Both are functions of public numbers and of that record.

``SAFETY`` is not proved. A model whose activations are many times larger than its loss loses more digits. At most 1.5
roundings of the loss were measured for transformers and multilayer perceptrons. The first step measures what a model
really loses (:mod:`trial`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from opacus_ac.sampling.plan import SamplingPlan
from opacus_ac.zeroth_order.settings import ZerothOrderSettings

SAFETY = 8.0
"""Roundings of its own size by which a loss may be off."""

SHARE = 1e-3
"""Largest part of C by which rounding moves the records beside the one that joins, all together."""

WIDE = torch.finfo(torch.float64).eps


def most_records(expected: float, sampling: str, most: int | None = None) -> float:
    """Return how many records a batch has at most, for Poisson sampling up to a chance of about 1e-9."""
    if sampling == "truncated_poisson" and most is not None:
        return float(most)
    return expected if sampling in ("fixed_size", "shuffled") else expected + 6 * math.sqrt(expected) + 6


@dataclass(frozen=True)
class Room:
    """What rounding leaves room for, of public numbers alone.

    Args:
        records: most records of a batch.
        loss: size up to which losses count in full whatever C is.
        smoothing: lambda.
        directions: K.
        order: norm by which records are clipped, 2 or 1.
        eps: distance of 1 to the next number, of the type in which losses are computed.
    """

    records: float
    loss: float
    smoothing: float
    directions: int
    order: int
    eps: float

    @property
    def smallest_bound(self) -> float:
        """The C of which the rounding of all records, with losses up to ``loss``, carries over :data:`SHARE`."""
        each = SAFETY * self.eps * self.loss / self.smoothing  # of two losses, over twice lambda
        return self.records * each * float(self.directions) ** (1.0 / self.order) / SHARE

    def largest_loss(self, bound: float) -> float:
        """Return the size up to which losses count in full at C = ``bound``."""
        return self.loss * bound / self.smallest_bound

    def slack(self, bound: float) -> float:
        """Return by how much each loss of a batch may be off at C = ``bound``."""
        return SAFETY * self.eps * self.largest_loss(bound)

    def check(self, bound: float) -> None:
        """Raise ``ValueError`` for a C that is too small."""
        if bound >= self.smallest_bound:
            return
        native = "" if self.eps == WIDE else ", precision=None, which computes losses in float64"
        raise ValueError(
            f"max_grad_norm={bound:g} is below {self.smallest_bound:.3g}: rounding, which depends on who else is in "
            "the batch, would move the differences of the other records by more than C / 1000. Use a larger "
            f"max_grad_norm or smoothing, a smaller largest_loss{native}, or max_physical_batch_size=1, which "
            "computes each record by itself"
        )


def room_of(settings: ZerothOrderSettings, plan: SamplingPlan | None, expected: float, eps: float) -> Room:
    """Return the room of a step of ``expected`` records whose losses are computed with ``eps``."""
    sampling, most = ("fixed_size", None) if plan is None else (plan.sampling, plan.max_batch_size)
    return Room(
        records=most_records(expected, sampling, most),
        loss=settings.largest_loss,
        smoothing=settings.least_smoothing,
        directions=settings.num_directions,
        order=1 if settings.mechanism == "laplace" else 2,
        eps=eps,
    )


def coarsest(tensors: Iterable[torch.Tensor]) -> float:
    """Return eps of the coarsest floating-point type among ``tensors``."""
    return max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=WIDE)
