"""What a step publishes, read from the weights: the noised sum in units of C, whatever the method that computed it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.release.values import FloatArray
from opacus_ac.zeroth_order.optimizer import ZerothOrderDPOptimizer


class Published:
    """Reads the sum that a step released from the weights that it left, and puts the weights back.

    Args:
        bare: the model that is trained.
        optimizer: the private optimizer around plain gradient descent with learning rate 1.
    """

    def __init__(self, bare: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> None:
        self.bare, self.optimizer = bare, optimizer
        self.parameters = {name: p for name, p in bare.named_parameters() if p.requires_grad}
        self.forward_only = optimizer.forward_only
        self.start = self.weights()
        self._directions: FloatArray | None = None

    def weights(self) -> FloatArray:
        """Return all trained weights, ``[D]``."""
        flat = [p.detach().double().reshape(-1) for p in self.parameters.values()]
        return np.asarray(torch.cat(flat).numpy())

    def put_back(self) -> None:
        """Restore the initial weights."""
        values, first = torch.from_numpy(self.start), 0
        with torch.no_grad():
            for parameter in self.parameters.values():
                last = first + parameter.numel()
                parameter.copy_(values[first:last].view_as(parameter))
                first = last

    def before_step(self) -> None:
        """Note the public directions of the step that comes next, where the method has some."""
        if isinstance(self.optimizer, ZerothOrderDPOptimizer):
            self._directions = np.stack([self._direction(seed) for seed in self.optimizer.direction_seeds], 1)

    def _direction(self, seed: int) -> FloatArray:
        assert isinstance(self.optimizer, ZerothOrderDPOptimizer)
        before = self.weights()
        self.optimizer.coordinates.move(seed, 1.0)
        direction = self.weights() - before
        self.put_back()
        return direction

    def read(self) -> FloatArray:
        """Return the released sum in units of C, noise included: ``[D]``, or ``[K]`` for K directions.

        The weights are restored.
        """
        release = self.optimizer.released
        assert release is not None
        scale = release.lr_multiplier
        if self.optimizer.loss_reduction == "mean":
            scale /= release.expected_batch_size
        if self.optimizer.normalize:
            scale *= self.optimizer.policy.initial_bound / release.max_grad_norm
        moved = (self.start - self.weights()) / (scale * release.max_grad_norm)
        self.put_back()
        if self._directions is None:
            return np.asarray(moved)
        found, *_ = np.linalg.lstsq(self._directions, moved * self._directions.shape[1], rcond=None)
        return np.asarray(found)

    def statistics(self) -> FloatArray:
        """Return what was released beside the gradient.

        In its units, a record adds at most ``sqrt(a^2 + b^2 + c^2)``.
        """
        release = self.optimizer.released
        assert release is not None
        return self.optimizer.statistics.published(release)
