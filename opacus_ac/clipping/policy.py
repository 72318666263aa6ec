"""Clip policies: each owns the clipping norm C, turns norms into factors, and learns from releases.

A new rule is a subclass of :class:`ClipPolicy` and a row in :data:`POLICIES`; it then gets the whole test battery.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch

from opacus_ac._validate import fraction, positive
from opacus_ac.protocols.part import Part
from opacus_ac.release.values import FloatArray, StepRelease


class ClipPolicy(Part):
    """Keeps the clipping norm fixed; base of the adaptive policies.

    Args:
        max_grad_norm: C0, the clipping norm of the first step.
        min_norm: smallest C that the policy may choose.
        max_norm: largest C that the policy may choose.

    Guarantees:
        ``norm * factor <= C`` for every record; records with a non-finite norm get the factor 0.
    """

    name: ClassVar[str] = "fixed"
    needs_histogram: ClassVar[bool] = False
    is_private: ClassVar[bool] = True

    def __init__(self, max_grad_norm: float, *, min_norm: float = 1e-10, max_norm: float = 1e10) -> None:
        self.initial_bound = positive(max_grad_norm=max_grad_norm)
        self.min_norm, self.max_norm = positive(min_norm=min_norm), positive(max_norm=max_norm)
        if min_norm > max_norm:
            raise ValueError(f"min_norm {min_norm!r} must not exceed max_norm {max_norm!r}")
        self._bound = float(np.clip(self.initial_bound, self.min_norm, self.max_norm))

    @property
    def bound(self) -> float:
        """C, the clipping norm of the step that comes next."""
        return self._bound

    @bound.setter
    def bound(self, value: float) -> None:
        self._bound = positive(max_grad_norm=value)

    def begin(self) -> None:
        """Start from the first C, brought into its range."""
        self.bound = min(max(self.initial_bound, self.min_norm), self.max_norm)

    @property
    def searching(self) -> bool:
        """Whether the last release served to find C only: its gradient was mostly noise, and no weights should move."""
        return False

    def factors(self, norms: torch.Tensor) -> torch.Tensor:
        """Return the clip factor of each record, ``[B]`` in, ``[B]`` out."""
        factors = self._factors(norms)
        return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))

    def _factors(self, norms: torch.Tensor) -> torch.Tensor:
        return (self._bound / norms).clamp(max=1.0)

    def gradient_share(self, ratio: FloatArray) -> FloatArray:
        """Return the largest clipped norm over C of records with norm / C up to ``ratio``."""
        return np.minimum(1.0, ratio)

    def true_share(self, ratio: FloatArray) -> FloatArray:
        """Return the larger of :meth:`gradient_share` and the share that the factors leave of norms up to ``ratio``.

        The second one is computed on a fine grid of norms. A user's own rule may enlarge small gradients and inherit a
        share that says otherwise. Each step holds its factors to what is returned here.

        Args:
            ratio: increasing norms over C; the last may be infinite.
        """
        declared = np.asarray(self.gradient_share(ratio))
        edges = ratio[np.isfinite(ratio)]
        pieces = [
            np.geomspace(low, high, 17) for low, high in zip(np.append(edges[0] * 1e-12, edges), edges, strict=False)
        ]
        grid = np.concatenate(pieces)
        left = np.maximum.accumulate(self.factors(torch.from_numpy(grid * self._bound)).numpy() * grid)
        found = left[np.searchsorted(grid, edges, side="right") - 1]
        return np.asarray(np.maximum(declared, np.append(found, declared[edges.size :])))

    def update(self, release: StepRelease) -> None:
        """Choose the next C from the released values."""

    def clip_rate(self, release: StepRelease) -> float | None:
        """Return the clip rate that steers the learning rate: the released one."""
        return release.clip_rate

    def observe_private(self, norms: torch.Tensor) -> None:
        """Read un-noised norms; only a policy with ``is_private = False`` may."""

    def public_settings(self) -> dict[str, Any]:
        """Return C0 and the name of the rule."""
        return {"max_grad_norm": self.initial_bound, "clip_policy": self.name}

    def released(self) -> list[str]:
        """Return in words that C is released un-noised, where it is."""
        return [] if self.is_private else ["a clipping norm computed from un-noised gradient norms"]

    def warnings(self) -> list[str]:
        """Return what a reader of the report must know."""
        if self.is_private:
            return []
        return ["the clip policy reads un-noised gradient norms: no finite epsilon holds"]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the policy (plain numbers and lists)."""
        return {"name": self.name, "bound": self._bound, "initial_bound": self.initial_bound}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``.

        Raises:
            ValueError: If the state belongs to another policy.
        """
        if state["name"] != self.name:
            raise ValueError(
                f"the checkpoint was written with clip_policy={state['name']!r}, this optimizer has {self.name!r}: "
                "build it with the same clip_policy"
            )
        self._bound, self.initial_bound = float(state["bound"]), float(state["initial_bound"])


class AutomaticPolicy(ClipPolicy):
    """AUTO-S: every gradient is scaled to C norm / (norm + gamma).

    References:
        Bu et al. 2023 (arXiv 2206.07136), equation 4.2.
    """

    name = "automatic"

    def __init__(self, max_grad_norm: float, *, gamma: float = 0.01, **limits: float) -> None:
        super().__init__(max_grad_norm, **limits)
        self.gamma = positive(gamma=gamma)

    def _factors(self, norms: torch.Tensor) -> torch.Tensor:
        return self._bound / (norms + self.gamma)

    def gradient_share(self, ratio: FloatArray) -> FloatArray:
        """Return 1: small gradients are enlarged, so no bin leaves room."""
        return np.ones_like(ratio)


class GeometricPolicy(ClipPolicy):
    """C follows a quantile geometrically: ``C *= exp(rate * (clip_rate - target_clip_rate))``.

    References:
        Andrew et al. 2021 (arXiv 1905.03871), equation 1, with the clip rate read from the noisy histogram.
    """

    name = "geometric"
    needs_histogram = True

    def __init__(
        self, max_grad_norm: float, *, target_clip_rate: float = 0.9, rate: float = 0.5, **limits: float
    ) -> None:
        super().__init__(max_grad_norm, **limits)
        self.target_clip_rate = fraction(target_clip_rate=target_clip_rate)
        self.rate = positive(rate=rate)

    def update(self, release: StepRelease) -> None:
        """Move C towards the target by the released clip rate."""
        assert release.clip_rate is not None
        moved = self._bound * math.exp(self.rate * (release.clip_rate - self.target_clip_rate))
        self._bound = float(np.clip(moved, self.min_norm, self.max_norm))
