"""The noise of the steps of a run as it trains: what each step released, less the sum that it had before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from opacus_ac.audit.noise import std_finding
from opacus_ac.audit.result import Finding
from opacus_ac.distributed.reducers import Source
from opacus_ac.grad_sample.source import Place
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer


class StepNoise:
    """Watches a private optimizer, and adds up the squares of the noise in each tensor, in units of its claimed std.

    The sums are those that the optimizer holds: whether records were clipped rightly is not seen here.

    Args:
        optimizer: the private optimizer of the run. Its noise must be Gaussian, and its gradients kept until the inner
            optimizer has used them (``fused_step=False``).
        names: the name of each trained parameter, by its ``id``.

    Raises:
        ValueError: If the noise of this optimizer cannot be watched.
    """

    def __init__(self, optimizer: AdaptiveClipDPOptimizer, names: Mapping[int, str]) -> None:
        if not can_be_watched(optimizer):
            raise ValueError("only Gaussian noise without fused_step can be watched")
        self._optimizer, self._names = optimizer, names
        self._squares: dict[str, float] = {}
        self._entries: dict[str, int] = {}
        self.steps = 0
        private = optimizer._private
        release = private.add_noise

        def watched() -> None:
            scale, source = private._gradient_scale(), private.source
            seen = _SeenSums(source)
            private.source = seen
            try:
                release()
            finally:
                private.source = source
            self._note(seen.totals, scale)

        private.add_noise = watched  # type: ignore[method-assign]

    def _note(self, sums: list[Tensor | None], scale: float) -> None:
        """Note the noise of one step."""
        stds = self._optimizer._private.gradients().stds
        self.steps += 1
        for parameter, total in zip(self._optimizer.params, sums, strict=True):
            std = stds.get(id(parameter))
            if std is None or parameter.grad is None:
                continue  # frozen
            noise = parameter.grad.detach().to(torch.float64)
            if total is not None:
                noise = noise - scale * total.to(torch.float64).view_as(noise)
            name = self._names.get(id(parameter), "a parameter")
            self._squares[name] = self._squares.get(name, 0.0) + float(noise.square().sum()) / std**2
            self._entries[name] = self._entries.get(name, 0) + noise.numel()

    def finding(self, alpha: float) -> Finding:
        """Return whether every tensor got the noise that was claimed; correct noise is refuted with at most ``alpha``.

        Raises:
            ValueError: If no step was seen.
        """
        if not self.steps:
            raise ValueError("no step was seen, so there is no noise to judge")
        return std_finding({name: (self._squares[name], self._entries[name]) for name in self._squares}, alpha)


class _SeenSums:
    """A source that keeps copies of the sums which it hands out."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.totals: list[Tensor | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def sums(self, place: Place | None = None) -> Iterator[Tensor | None]:
        """Hand on the sums of the logical batch, which the source then forgets."""
        for total in self._source.sums(place):
            self.totals.append(None if total is None else total.clone())
            yield total


def can_be_watched(optimizer: AdaptiveClipDPOptimizer) -> bool:
    """Say whether each step leaves its noised gradients, with Gaussian noise of a std that is not 0."""
    gaussian = optimizer.mechanism.name == "gaussian" and optimizer.noise_multiplier > 0
    return gaussian and not optimizer.fused_step
