"""The public half of zeroth-order training: the weights move along the directions by the released coefficients."""

from __future__ import annotations

from torch.optim import Optimizer

from opacus_ac.optimizer.released import ReleasedGradients
from opacus_ac.optimizer.update import Announce
from opacus_ac.release.values import StepRelease
from opacus_ac.zeroth_order import checks
from opacus_ac.zeroth_order.course import Course


class DirectionalUpdate:
    """Moves the weights along the directions of the step that was released, which costs no privacy.

    Args:
        inner: optimizer over the trained weights. Plain SGD updates them in place; any other one gets gradients.
        course: stage and directions of each step, and the weights that move.
    """

    def __init__(self, inner: Optimizer, course: Course) -> None:
        self.inner, self.course = inner, course

    def apply(self, release: StepRelease, gradients: ReleasedGradients, announce: Announce) -> None:
        """Move the weights by the released coefficients."""
        step = release.step - 1  # releases count from 1
        (released,) = (p.grad for p in gradients.parameters)
        assert released is not None
        coefficients = (released / self.course.settings.num_directions).tolist()
        seeds, factor = self.course.seeds(step), self.course.lr_factor(step)
        if checks.moves_in_place(self.inner):
            self._descend(seeds, coefficients, factor)
        else:
            self._step(seeds, coefficients, factor)
        self.course.coordinates.forget_lengths()

    def _descend(self, seeds: list[int], coefficients: list[float], factor: float) -> None:
        """Update the weights in place, without gradients in memory."""
        coordinates = self.course.coordinates
        owner = {p: group for group in self.inner.param_groups for p in group["params"]}
        own = [owner[p] for p in coordinates.parameters]
        rates = [float(group["lr"]) * factor for group in own]
        decays = [float(group["weight_decay"]) for group in own]
        coordinates.descend(seeds, coefficients, rates, decays, self.course.proximal)

    def _step(self, seeds: list[int], coefficients: list[float], factor: float) -> None:
        """Give the inner optimizer gradients for a step of its own."""
        checks.check_inner_optimizer(self.inner, self.course.settings)
        self.course.coordinates.write_gradients(seeds, coefficients, self.course.proximal)
        groups = self.inner.param_groups
        before = [group["lr"] for group in groups]
        try:
            for group in groups:
                group["lr"] = group["lr"] * factor
            self.inner.step()
        finally:
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr
            self.inner.zero_grad(set_to_none=True)
