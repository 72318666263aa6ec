"""Learning-rate control from the released clip rate.

It reads released values and public constants only, so it costs no privacy (post-processing).
"""

from __future__ import annotations

from typing import Any

from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.protocols.part import Part


class ClipRateControl(Part):
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


def choose_control(
    lr_control: bool | ClipRateControl, policy: ClipPolicy, target_clip_rate: float
) -> ClipRateControl | None:
    """Return the control that the argument ``lr_control`` means; a policy's own target comes first."""
    if lr_control is True:
        return ClipRateControl(getattr(policy, "target_clip_rate", target_clip_rate))
    return lr_control or None
