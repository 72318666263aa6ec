"""Carries the losses of the records of a batch from the loss function to the private side of the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class LossTape:
    """Passes the losses of the records of a physical batch from the loss function to the optimizer.

    The losses are private values.
    """

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context in which losses are not kept."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def record(self, losses: torch.Tensor) -> None:
        """Keep the losses ``[B]`` of the records of one forward pass.

        Raises:
            ValueError: If ``losses`` does not have one dimension.
        """
        if losses.dim() != 1:
            raise ValueError(f"record_losses takes one loss per record, shape [B], got shape {tuple(losses.shape)}")
        if not self._paused:
            self._losses.append(losses.detach())

    def take(self) -> torch.Tensor | None:
        """Return the losses since the last call, and forget them. None if there are none."""
        taken, self._losses = self._losses, []
        return torch.cat(taken) if taken else None
