"""A moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from opacus_ac.protocols.part import Part

AVERAGE_FROM = 1000
"""Number of planned steps from which the average is taken for better than the last weights."""


def average_is_better(steps: int) -> bool:
    """Say whether the averaged weights of a run of so many planned steps are known to be better than the last ones.

    In every run that was measured with 10 to 30 steps the average was worse. It lags behind by about a tenth of the
    run, which only matters little once the loss has stopped falling. The page on choosing settings has the figures.

    >>> average_is_better(30), average_is_better(5000)
    (False, True)
    """
    return steps >= AVERAGE_FROM


class WeightEMA(Part):
    """Exponential moving average of the trainable weights, with a warm-up for short runs.

    The decay of update ``t`` (from 0) is ``min(decay, (1 + t) / (10 + t))``.

    References:
        arXiv 2510.05288, section 3 (EMA smoothing).
    """

    by_parameter = ("average",)

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {decay!r}; pass None for no EMA")
        self.decay = decay
        self._parameters: list[torch.Tensor] = list(parameters)
        self.reset()

    def reset(self) -> None:
        """Begin again from the current weights."""
        self.updates = 0
        self._average = [p.clone() for p in self._here()]

    def _here(self) -> list[torch.Tensor]:
        """Return the weights, of sharded ones what this rank holds."""
        held = [p.detach() for p in self._parameters]
        return [p.to_local() if hasattr(p, "to_local") else p for p in held]

    @property
    def average(self) -> list[torch.Tensor]:
        """The averages, in the order of the parameters; of sharded ones what this rank holds."""
        return self._average

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._average, self._here(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the model for the length of the context."""
        kept = [p.clone() for p in self._here()]
        with torch.no_grad():
            torch._foreach_copy_(self._here(), self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._here(), kept)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, in the order of the parameters."""
        return {"updates": self.updates, "average": [a.clone() for a in self._average]}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` when ``state`` does not fit these parameters."""
        int(state["updates"])
        shapes = [tuple(a.shape) for a in state["average"]]
        if shapes != [tuple(a.shape) for a in self._average]:
            raise ValueError("the checkpoint's EMA weights have other shapes than this optimizer's parameters")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.check_state(state)
        self.updates = int(state["updates"])
        for mine, theirs in zip(self._average, state["average"], strict=True):
            mine.copy_(theirs)


def average_of(parameters: Iterable[torch.nn.Parameter], decay: float | None) -> WeightEMA | None:
    """Return an average of the weights; None without a decay."""
    return None if decay is None else WeightEMA(parameters, decay)
