"""How a release moves the weights: the public half of a method of training. Only noised values come in here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from opacus_ac.optimizer.fused import apply_some
from opacus_ac.optimizer.released import ReleasedGradients
from opacus_ac.release.values import StepRelease

Announce = Callable[[list[nn.Parameter], list[Any]], None]
"""Takes parameters with their released gradients, before the inner optimizer applies them."""


class Update(Protocol):
    """Moves the weights by what a step released."""

    def apply(self, release: StepRelease, gradients: ReleasedGradients, announce: Announce) -> float | None:
        """Move the weights; return what the inner optimizer's step returns."""


class GradientUpdate:
    """Has the inner optimizer apply the released gradients.

    Args:
        inner: the optimizer over the trained weights.
    """

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    def apply(self, release: StepRelease, gradients: ReleasedGradients, announce: Announce) -> float | None:
        """Move the weights by all gradients at once, or by some at a time in memory that is used again."""
        if gradients.in_turns is None:
            announce(gradients.parameters, [p.grad for p in gradients.parameters])
            result: float | None = self.inner.step()
            return result

        def apply(parameters: list[nn.Parameter], released: list[Tensor]) -> None:
            announce(parameters, released)
            apply_some(self.inner, parameters, released)

        gradients.in_turns(apply)
        return None
