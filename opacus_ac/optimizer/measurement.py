"""How a step measures the records of a batch: the private half of a method of training; the other is its update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from opacus_ac.allocation.weights import GroupWeights
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.grad_sample.source import GradientSource
from opacus_ac.noise.streams import RandomStream
from opacus_ac.protocols.part import Part
from opacus_ac.release.mechanism import GaussianMechanism
from opacus_ac.release.statistics import StepStatistics

if TYPE_CHECKING:
    from opacus_ac.optimizer.private_side import PrivateSide


class Measurement:
    """Measures records by the gradients of a backward pass. Other ways of training are subclasses.

    Args:
        source: gives the norms of the records, and sums them.
        parameters: the parameters whose sums a step releases.
        moved: the weights that a release may move; None for ``parameters``.

    Attributes:
        forward_only: whether the step needs no backward pass, and calls a closure itself.
        sum_description: what the sum that a step releases is, for reports.
        too_few: error message for fewer records than the loader's batch has.
        too_many: error message for more of them.
    """

    forward_only: ClassVar[bool] = False
    sum_description = "the sum of clipped gradients"
    too_few: ClassVar[str] = (
        "the backward pass has fewer per-sample gradients than the loader's batch has records: "
        "records were left out, or parts of the batch went through the model one after the other, which adds "
        "their gradients up pairwise. Pass each batch through the model whole; use max_physical_batch_size"
    )

    too_many: ClassVar[str] = (
        "more rows went through the model than the loader's batch has records, so that clipping would bound rows and "
        "not records. Several rows of one record (pairs, augmented copies): let the dataset return them as one item, "
        "let collate_fn put them one after the other, and pass max_rows_per_user to make_private. Public rows: add "
        "them to the dataset, where they are records like all others"
    )

    def __init__(
        self,
        source: GradientSource,
        parameters: Sequence[nn.Parameter],
        moved: Sequence[nn.Parameter] | None = None,
    ) -> None:
        self.source, self.parameters = source, list(parameters)
        self.moved = self.parameters if moved is None else list(moved)

    # ---------------------------------------------------------------- what the step is built from

    def mechanism(self, noise_multiplier: float, stream: RandomStream) -> GaussianMechanism:
        """Return the mechanism that adds the noise."""
        return GaussianMechanism(noise_multiplier, stream)

    def statistics(
        self, given: StepStatistics | None, policy: ClipPolicy, allocation: GroupWeights | None
    ) -> StepStatistics:
        """Return what a step releases beside the sums.

        Args:
            given: what the caller asked for; None for the policy's own needs.
            policy: the clip policy.
            allocation: the noise allocation, which may need statistics of its own.

        Raises:
            ValueError: If the policy or the allocation needs other statistics.
        """
        statistics = given or StepStatistics(
            histogram=policy.needs_histogram, **({} if allocation is None else allocation.statistics())
        )
        if policy.needs_histogram and not statistics.histogram:
            raise ValueError(f"clip_policy={policy.name!r} needs the norm histogram: histogram=True")
        if allocation is not None:
            allocation.check_statistics(statistics.groups)
        elif statistics.groups:
            raise ValueError(
                "statistics with groups need the noise allocation whose groups they are: pass allocation too"
            )
        return statistics

    @property
    def further(self) -> Mapping[str, Part]:
        """Parts of the method that have public settings and a state of their own, by their names in a checkpoint."""
        return {}

    def compared_at_start(self) -> dict[str, Any]:
        """Return arguments that all ranks have to be given alike, beside the public settings."""
        return {}

    # ---------------------------------------------------------------- a step

    def is_measuring(self) -> bool:
        """Return whether a forward pass now is one that a step may use."""
        return torch.is_grad_enabled()

    def looking(self) -> AbstractContextManager[Any]:
        """Return a context in which a batch is looked at as it is."""
        return nullcontext()

    def measure(self, closure: Callable[[], Any] | None, side: PrivateSide) -> None:
        """Measure the records of the batch in hand: by the closure's backward pass, or by that of the user's loop."""
        if closure is not None:
            with torch.enable_grad():
                closure()

    def begin(self, bound: float) -> None:
        """Note C of the logical batch that opens."""

    def constants(self, step: int) -> dict[str, float]:
        """Return what must be the same to the last bit on all ranks, by name, beside the constants of every method."""
        return {}

    def close(self) -> None:
        """Forget the logical batch: it was applied, or given up."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Measurement:
        """Return a copy without the source: a copy takes no step."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            copied.__dict__[name] = None if name == "source" else copy.deepcopy(value, memo)
        return copied
