"""The sums of a logical batch, and how the records of a physical batch get into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.allocation.weights import GroupWeights
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.grad_sample.source import GradientSource
from opacus_ac.optimizer.loss_tape import LossTape
from opacus_ac.optimizer.origin import Origin
from opacus_ac.release.statistics import StepStatistics
from opacus_ac.sampling.delivery import Draw


class RecordSums:
    """Adds clipped gradients and statistics of records to the sums of a logical batch. All of it is private.

    Args:
        params: the parameters whose gradients are released.
        source: where per-sample gradients come from.
        policy: gives the clip factors, and C.
        statistics: what is released beside the gradient.
        allocation: public weights of the parameters; None for 1.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        source: GradientSource,
        policy: ClipPolicy,
        statistics: StepStatistics,
        allocation: GroupWeights | None,
    ) -> None:
        self.params, self.source, self.policy = params, source, policy
        self.statistics, self.allocation = statistics, allocation
        self.tape, self.origin = LossTape(), Origin()
        self.private_nonfinite_records = 0
        self._before: Any = None

    def _weights(self) -> list[float] | None:
        """Return the public weights of the parameters, by which the release is scaled; None for 1."""
        return None if self.allocation is None else self.allocation.weights

    def _add_records(self, draw: Draw | None, norms: Tensor, losses: Tensor | None) -> None:
        """Add the records of a physical batch to the sums of the open logical batch."""
        if self.origin.is_stand_in or (draw is not None and draw.records == 0):
            # The stand-in for an empty batch: it must leave no trace in any sum.
            self.source.accumulate(torch.zeros_like(norms))
            return
        if not self.statistics.needs_losses:
            losses = None
        self.private_nonfinite_records += int((~torch.isfinite(norms)).sum())
        squares = None
        if self.allocation is not None and self.statistics.groups:
            squares = self.allocation.by_groups(self.source.parameter_squares().numpy())
        self.statistics.observe(norms.numpy(), None if losses is None else losses.double().cpu().numpy(), squares)
        if not self.policy.is_private:
            self.policy.observe_private(norms)
        self.source.accumulate(self._factors(norms))

    def _factors(self, norms: Tensor) -> Tensor:
        """Return the policy's clip factors; a policy may be anybody's, so they are held to its own C."""
        factors = self.policy.factors(norms)
        kept = torch.where(factors == 0, torch.zeros_like(norms), factors * norms)  # 0 of what is infinite is 0
        if factors.shape != norms.shape or not bool((kept.abs() <= self.policy.bound * (1 + 1e-6)).all()):
            raise ValueError(
                f"{type(self.policy).__name__}.factors left a gradient longer than C = {self.policy.bound:g}, or gave "
                "no finite factor per record: nothing was released. opacus_ac.testing.policies.check_clip_policy says "
                "which"
            )
        self.statistics.check_kept(norms.numpy(), (kept.abs() / self.policy.bound).numpy())
        return factors

    def _restore(self) -> None:
        """Take the records of the physical batch in hand out of all sums again."""
        self.source.withdraw()
        self.statistics.restore(self._before)
