"""The public side of a zeroth-order step: the weights move along the directions by the released coefficients."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from opacus_ac.optimizer.public_side import PublicSide
from opacus_ac.optimizer.released import ReleasedGradients
from opacus_ac.release.values import StepRelease
from opacus_ac.zeroth_order import checks
from opacus_ac.zeroth_order.coordinates import Coordinates
from opacus_ac.zeroth_order.settings import ZerothOrderSettings


class DirectionalUpdate(PublicSide):
    """Moves the weights along the directions of the step that was released, which costs no privacy.

    Args:
        inner: optimizer over the trained weights.
        settings: directions and stages.
        coordinates: the weights that move.
        **parts: all other arguments of :class:`PublicSide`.

    Attributes:
        stage_and_seeds: stage and directions of the step that is released.
    """

    def __init__(self, inner: Optimizer, settings: ZerothOrderSettings, coordinates: Coordinates, **parts: Any) -> None:
        super().__init__(inner, **parts)
        self.settings, self.coordinates = settings, coordinates
        self.stage_and_seeds: tuple[int, list[int]] = (0, [])

    def apply(self, release: StepRelease, gradients: ReleasedGradients) -> None:
        """Move the weights, and all that follows releases."""
        self.move(gradients)
        self.follow(release)
        if self.ema is not None:
            self.ema.update()

    def move(self, gradients: ReleasedGradients) -> None:
        """Update the weights along the directions."""
        (stage, seeds), stages = self.stage_and_seeds, self.settings.stages
        (released,) = (p.grad for p in gradients.parameters)
        assert released is not None
        coefficients = (released / self.settings.num_directions).tolist()
        proximal = 0.0 if stages is None else stages.proximal
        factor = 1.0 if stages is None else stages.lr_factor(stage)
        with self.controlled_learning_rate():
            self._apply(seeds, coefficients, factor, proximal)
        self.coordinates.forget_lengths()

    def _apply(self, seeds: list[int], coefficients: list[float], factor: float, proximal: float) -> None:
        groups = self.inner.param_groups
        if checks.moves_in_place(self.inner):
            owner = {p: group for group in groups for p in group["params"]}
            own = [owner[p] for p in self.coordinates.parameters]
            rates = [float(group["lr"]) * factor for group in own]
            decays = [float(group["weight_decay"]) for group in own]
            self.coordinates.descend(seeds, coefficients, rates, decays, proximal)
            return
        checks.check_inner_optimizer(self.inner, self.settings)
        self.coordinates.write_gradients(seeds, coefficients, proximal)
        before = [group["lr"] for group in groups]
        try:
            for group in groups:
                group["lr"] = group["lr"] * factor
            self.inner.step()
        finally:
            for group, lr in zip(groups, before, strict=True):
                group["lr"] = lr
            self.inner.zero_grad(set_to_none=True)
