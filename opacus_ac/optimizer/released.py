"""The released gradients of a step: what the private side hands to the public side beside the ``StepRelease``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

Apply = Callable[[list[nn.Parameter], list[Tensor]], None]
"""Takes parameters with their released gradients."""


@dataclass(frozen=True)
class ReleasedGradients:
    """Gradients with their noise, and public constants about it.

    Attributes:
        parameters: those that the release moves.
        stds: std of the noise in the gradient of each parameter, by its ``id``.
        unit: factor of the released gradients on the sums of the records.
        in_turns: calls its argument with some parameters and their gradients, which it may use until it returns, until
            all have come; None where every gradient is in ``.grad``.
    """

    parameters: list[nn.Parameter]
    stds: dict[int, float]
    unit: float
    in_turns: Callable[[Apply], None] | None
