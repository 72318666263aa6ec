"""A record is alone: what the records of a batch are given is what each would get by itself."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from opacus_ac.forward_randomness import ForwardRandomness
from opacus_ac.grad_sample.sources import GradientSource


class RecordsAlone:
    """Keeps the records of a batch apart.

    Args:
        model: the model that is trained.
        step: tells the number of the logical step in hand.
    """

    def __init__(self, model: nn.Module, step: Callable[[], int]) -> None:
        self.randomness = ForwardRandomness(model, step)

    def remove(self) -> None:
        """Take all hooks off; doing so twice is harmless."""
        self.randomness.remove()

    def check(self, source: GradientSource) -> None:
        """Look at the physical batch that was finished."""
        self.randomness.next_batch()
