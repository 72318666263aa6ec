"""The clipping rule as arXiv 2510.05288 publishes it."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import torch

from opacus_ac._validate import fraction, positive
from opacus_ac.clipping.percentile import PercentilePolicy
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.release.values import StepRelease


class RawPercentilePolicy(ClipPolicy):
    """The published rule exactly as printed: the percentile of un-noised norms. NOT private.

    Kept for comparison. C depends on the data without noise, so no finite epsilon holds and none is reported.

    References:
        arXiv 2510.05288, section 3.
    """

    name = "raw_percentile"
    is_private = False

    def __init__(
        self, max_grad_norm: float, *, target_clip_rate: float = 0.2, history: int = 1000, **limits: float
    ) -> None:
        super().__init__(max_grad_norm, **limits)
        self.target_clip_rate = fraction(target_clip_rate=target_clip_rate)
        self._norms: deque[float] = deque(maxlen=int(positive(history=history)))
        self._seen = self._clipped = 0
        self._last_rate: float | None = None

    def observe_private(self, norms: torch.Tensor) -> None:
        """Remember un-noised norms."""
        known = norms[torch.isfinite(norms)]
        self._norms.extend(known.tolist())
        self._seen += known.numel()
        self._clipped += int((known > self._bound).sum())

    def clip_rate(self, release: StepRelease) -> float | None:
        """Return the un-noised clip rate of the last logical batch, as the published algorithm does."""
        return self._last_rate

    def update(self, release: StepRelease) -> None:
        """Set C to the percentile of the remembered norms."""
        self._last_rate = self._clipped / self._seen if self._seen else None
        self._seen = self._clipped = 0
        if self._norms:
            wanted = np.quantile(np.asarray(self._norms), 1 - self.target_clip_rate)
            self._bound = float(np.clip(wanted, self.min_norm, self.max_norm))

    def state_dict(self) -> dict[str, Any]:
        """Return bound and un-noised norms; private, as everything of this policy."""
        return {**super().state_dict(), "private_norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        super().load_state_dict(state)
        self._norms = deque(state["private_norms"], maxlen=self._norms.maxlen)


def paper_policy(name: str, max_grad_norm: float, expected_batch_size: float) -> ClipPolicy:
    """Return the percentile rule with the published constants, private ("percentile") or as printed.

    References:
        arXiv 2510.05288: target clip rate 0.20, history of 1000 norms, C in [0.1, 10].
    """
    limits = {"target_clip_rate": 0.20, "min_norm": 0.1, "max_norm": 10.0}
    if name == "raw_percentile":
        return RawPercentilePolicy(max_grad_norm, history=1000, **limits)
    if name == "percentile":
        window = max(1, math.ceil(1000 / expected_batch_size))
        return PercentilePolicy(max_grad_norm, window=window, search=False, **limits)
    raise ValueError(f'preset="paper" goes with clip_policy "percentile" or "raw_percentile", not {name!r}')
