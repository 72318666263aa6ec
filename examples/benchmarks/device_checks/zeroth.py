"""A zeroth-order step beside the forward passes that it consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from step_benchmark.shapes import Shape
from step_benchmark.variants import PLAIN, Options, Trial, Variant
from torch import Tensor

from opacus_ac import PrivacyEngine
from opacus_ac.zeroth_order import preset, record_losses

DIRECTIONS = 1


class Passes(Trial):
    """As many forward passes as a zeroth-order step has, or such a step."""

    def __init__(self, shape: Shape, variant: Variant, options: Options) -> None:
        super().__init__(shape, Variant(), options)
        self.model.eval()
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-6)
        self.zeroth = bool(variant.engine)
        if self.zeroth:
            self.model, self.optimizer, _ = PrivacyEngine().make_private(
                module=self.model,
                optimizer=self.optimizer,
                data_loader=self._loader(shape),
                noise_multiplier=variant.noise_multiplier,
                zeroth_order=preset("aggzo", num_directions=DIRECTIONS),
            )
            self.optimizer.plan = None  # steps are taken by hand, without the loader

    def losses(self) -> Tensor:
        """Return the losses of the records in the type that people evaluate in."""
        with torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.autocast):
            return record_losses(self.model, self.batch)

    def step(self) -> Any:
        """Take one step; return the mean of the losses before it."""
        with torch.no_grad():
            if not self.zeroth:
                losses = [self.losses().mean() for _ in range(2 * DIRECTIONS)]
                return losses[0]
            before = self.losses().mean() if self.first else None
        self.optimizer.step(lambda: record_losses(self.model, self.batch))
        return before

    first = True

    def warm_up(self) -> float:
        """Take the first steps and return the loss before them."""
        loss = float(self.step())
        self.first = False
        self.step()
        self.note_own_memory()
        return loss


@dataclass(frozen=True)
class ForwardOnly(Variant):
    """A variant without a backward pass."""

    def ready(self, shape: Shape, options: Options) -> Passes:
        """Return the variant on a model."""
        return Passes(shape, self, options)


VARIANTS = {PLAIN: ForwardOnly(), "zeroth-order": ForwardOnly("opacus_ac")}
