"""The private side of a zeroth-order step: what it sums are differences of losses along directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from opacus_ac.optimizer.private_side import PrivateSide
from opacus_ac.sampling.delivery import Delivery, Draw
from opacus_ac.zeroth_order.arithmetic import unwatched
from opacus_ac.zeroth_order.coordinates import Coordinates
from opacus_ac.zeroth_order.source import DifferenceSource


class DirectionalPrivateSide(PrivateSide):
    """Clips, charges and releases the coefficients of a step's directions.

    Args:
        differences: the source.
        coordinates: the weights that move along the directions.
        **parts: all other arguments of :class:`PrivateSide`.

    Attributes:
        measuring: whether the losses of a closure are being measured.
    """

    def __init__(self, *, differences: DifferenceSource, coordinates: Coordinates, **parts: Any) -> None:
        super().__init__(**parts)
        self.differences, self.coordinates = differences, coordinates
        self.measuring = False

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note which batch a forward pass of the model runs on, by its content as it is."""
        with unwatched():
            super().see(module, args, kwargs)

    def seen(self, output: Any) -> None:
        """Note the output of a forward pass."""
        with unwatched():
            super().seen(output)

    def measures(self) -> bool:
        """Whether a forward pass now is one of a closure whose losses are being measured."""
        return self.measuring

    def moved(self) -> list[nn.Parameter]:
        """The weights that move along the directions."""
        return self.coordinates.parameters

    def _begin(self, delivery: Delivery | None) -> None:
        super()._begin(delivery)
        self.differences.bound = self.policy.bound

    def _shared_constants(self, draw: Draw | None) -> dict[str, float]:
        """Return what must be the same on all ranks: beside the base class's, whatever the differences depend on."""
        return {
            **super()._shared_constants(draw),
            "number of the step": self.steps_taken,
            "direction seed": self.coordinates.directions.seed,
            "checksum of the trained weights": self.coordinates.checksum(),
        }

    def _check_records(self, draw: Draw | None, norms: Tensor) -> None:
        """Refuse another number of losses than the batch that the loader handed out has records."""
        if self.plan is None or draw is None:
            return
        if draw.records and norms.shape[0] != draw.records:
            raise ValueError(
                "the closure returned another number of losses than the loader's batch has records: return one loss for every "
                "record of the batch, and split batches with max_physical_batch_size only"
            )
