"""Losses of the records of a batch, on their way from the loss function to the private side of the step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class LossTape:
    """Hands the records' losses of a physical batch from the loss function to the optimizer. Private values."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return a context in which nothing is kept."""
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
        """Return and forget what was recorded since the last call, or None."""
        taken, self._losses = self._losses, []
        return torch.cat(taken) if taken else None
