"""Laplace noise on whole numbers: pure differential privacy that no rounding can break."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.noise.streams import RandomStream
from opacus_ac.release.mechanism import GaussianMechanism
from opacus_ac.release.statistics import StepStatistics

GRID = 1 << 20
"""Steps of the grid in C: a record's clipped values are multiples of C / GRID, cut towards zero."""

_WORD = 53


class WholeNumbers:
    """Uniform whole numbers from a random stream, without rounding."""

    def __init__(self, stream: RandomStream) -> None:
        self._stream = stream
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """Return a uniform whole number in [0, bound), ``bound <= 2^53``."""
        bits = (bound - 1).bit_length()
        if bits > _WORD:
            raise ValueError(
                f"the noise scale needs whole numbers up to {bound}, above 2^53: use a smaller noise_multiplier"
            )
        while True:
            if not self._words:
                self._words = (self._stream.uniform(256) * 2.0**_WORD).long().tolist()
            word = self._words.pop() >> (_WORD - bits)
            if word < bound:
                return word

    def occurs(self, numerator: int, denominator: int) -> bool:
        """Return True with probability ``exp(-numerator / denominator)``, a ratio in [0, 1].

        References:
            arXiv 2004.00010, algorithm 1.
        """
        k = 1
        while self.below(denominator * k) < numerator:
            k += 1
        return k % 2 == 1

    def laplace(self, scale: int) -> int:
        """Return ``n`` with probability proportional to ``exp(-|n| / scale)``, exactly.

        References:
            arXiv 2004.00010, algorithm 2.
        """
        while True:
            rest = self.below(scale)
            if not self.occurs(rest, scale):
                continue
            whole = 0
            while self.occurs(1, 1):
                whole += 1
            value = rest + scale * whole
            negative = self.below(2) == 1
            if not (negative and value == 0):
                return -value if negative else value


class LaplaceMechanism(GaussianMechanism):
    """Adds discrete Laplace noise to the sum of vectors clipped in L1 and cut to a grid.

    Args:
        noise_multiplier: scale b of the noise over C, the L1 sensitivity of the sum.
        stream: random stream of the noise.

    Guarantees:
        One release of a whole batch is (1 / noise_multiplier, 0)-differentially private under adding or removing one
        record. Sums and noise are whole numbers of C / GRID, drawn without floating-point arithmetic: the bound is not
        up to rounding. The scale is rounded up to the grid.

    References:
        Dwork et al. 2006 (Laplace mechanism); arXiv 2004.00010 (discrete Laplace); Mironov 2012 (attack on rounding).
    """

    name = "laplace"

    def check_hook(self, hook: object) -> None:
        """Check that a step hook is that of the accountant of Laplace noise.

        Raises:
            ValueError: If it is of another accountant, which would take the noise for Gaussian.
        """
        if getattr(hook, "accountant", None) != "pure":
            raise ValueError(
                "this accountant takes the noise for Gaussian: with mechanism='laplace' use the accountant 'pure' "
                "(opacus_ac.accounting.PureDPAccountant)"
            )

    def gradient_multiplier(self, statistics: StepStatistics) -> float:
        """Return the noise scale in units of C; nothing else may be released with it."""
        if statistics.histogram or statistics.loss_bound is not None:
            raise ValueError(
                "Laplace noise releases the differences alone: no norm histogram and no loss (histogram=False, "
                "loss_bound=None)"
            )
        return self.noise_multiplier

    def noise_in_place(self, totals: Sequence[Tensor], std: float | Sequence[float], scale: float = 1.0) -> None:
        """Set sums to ``(total + Laplace(std)) * scale``.

        Args:
            totals: sums ``[K]`` float64 of vectors on the grid.
            std: scale b of the noise (of the sum, before ``scale``).
            scale: public factor.
        """
        assert isinstance(std, float | int)  # there is one tensor, that of the coefficients
        if std == 0:
            super().noise_in_place(totals, 0.0, scale)
            return
        unit = std / self.noise_multiplier / GRID
        width = math.ceil(self.noise_multiplier * GRID)
        numbers = WholeNumbers(self.stream)
        for total in totals:
            whole = (total / unit).round_().long()  # exactly the sum of whole numbers that it was computed from
            noise = torch.tensor([numbers.laplace(width) for _ in range(total.numel())], dtype=torch.long)
            total.copy_((whole + noise.to(whole.device).view_as(whole)).double().mul_(unit * scale))


def laplace_statistics(given: StepStatistics | None, policy: ClipPolicy) -> StepStatistics:
    """Return the statistics of a Laplace release, which are none.

    Raises:
        ValueError: If the policy, or what was given, needs a histogram or a loss.
    """
    if policy.needs_histogram:
        raise ValueError(
            f"clip_policy={policy.name!r} needs a norm histogram, which has no room in a Laplace release: use "
            "clip_policy='fixed' or 'automatic'"
        )
    if given is not None and (given.histogram or given.loss_bound is not None):
        raise ValueError("a Laplace release holds no norm histogram and no loss: leave statistics and loss_bound out")
    return StepStatistics(histogram=False)
