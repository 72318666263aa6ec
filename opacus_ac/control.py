"""Learning-rate control from the released clip rate, and exponential moving averages of the weights.

Both read released values and public constants only, so they cost no privacy (post-processing).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class ClipRateControl:
    """Multiplies the learning rate by a factor that follows the released clip rate.

    Above ``target + band`` the factor shrinks by ``down``, below ``target - band`` it grows by ``up``; inside the
    band it stays. It acts on the learning rate: Adam does not see the scale of its gradient.

    Args:
        target: clip rate aimed at.
        band: half width of the band of rates that change nothing.
        up: factor below the band.
        down: factor above the band.
        smallest: smallest multiplier.
        largest: largest multiplier.
        smoothing: decay of a running mean of the released rates, which starts at the target. The rates are noisy,
            and as ``up`` outweighs ``down`` their noise alone would drive the multiplier up. 0 uses each rate as it is.

    References:
        arXiv 2510.05288, section 3 (clip-based learning rate), with its constants as defaults, except ``smoothing``.
    """

    def __init__(
        self,
        target: float,
        *,
        band: float = 0.10,
        up: float = 1.01,
        down: float = 0.995,
        smallest: float = 0.1,
        largest: float = 2.0,
        smoothing: float = 0.9,
    ) -> None:
        if not 0 < target < 1 or band < 0:
            raise ValueError(f"lr_control needs 0 < target < 1 and band >= 0, got {target!r} and {band!r}")
        if not 0 < down <= 1 <= up:
            raise ValueError(f"lr_control needs 0 < down <= 1 <= up, got {down!r} and {up!r}")
        if not 0 < smallest <= 1 <= largest:
            raise ValueError(f"lr_control needs 0 < smallest <= 1 <= largest, got {smallest!r} and {largest!r}")
        self.target, self.band, self.up, self.down = target, band, up, down
        if not 0 <= smoothing < 1:
            raise ValueError(f"lr_control needs 0 <= smoothing < 1, got {smoothing!r}")
        self.smallest, self.largest, self.smoothing = smallest, largest, smoothing
        self.multiplier = 1.0
        self._mean = target

    def update(self, clip_rate: float | None) -> None:
        """Move the multiplier by a released clip rate; without one it stays."""
        if clip_rate is None:
            return
        self._mean = self.smoothing * self._mean + (1 - self.smoothing) * clip_rate
        if self._mean > self.target + self.band:
            self.multiplier = max(self.smallest, self.multiplier * self.down)
        elif self._mean < self.target - self.band:
            self.multiplier = min(self.largest, self.multiplier * self.up)

    def state_dict(self) -> dict[str, Any]:
        """Return multiplier and running mean."""
        return {"multiplier": self.multiplier, "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.multiplier, self._mean = float(state["multiplier"]), float(state["mean"])


class WeightEMA:
    """Exponential moving average of the trainable weights, with a warm-up so that short runs are not stuck at the start.

    The decay of update ``t`` (from 0) is ``min(decay, (1 + t) / (10 + t))``.

    References:
        arXiv 2510.05288, section 3 (EMA smoothing).
    """

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
        shapes = [tuple(a.shape) for a in state["average"]]
        if shapes != [tuple(a.shape) for a in self._average]:
            raise ValueError("the checkpoint's EMA weights have other shapes than this optimizer's parameters")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.check_state(state)
        self.updates = int(state["updates"])
        for mine, theirs in zip(self._average, state["average"], strict=True):
            mine.copy_(theirs)
