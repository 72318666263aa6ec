"""How a zeroth-order step measures records: by differences of their losses along directions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from opacus_ac.allocation.weights import GroupWeights
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.grad_sample.alone.outputs import OutputsAlone
from opacus_ac.noise.streams import RandomStream
from opacus_ac.optimizer.measurement import Measurement
from opacus_ac.protocols.part import Part
from opacus_ac.release.mechanism import GaussianMechanism
from opacus_ac.release.statistics import StepStatistics
from opacus_ac.sampling.delivery import Delivery
from opacus_ac.sampling.plan import SamplingPlan
from opacus_ac.zeroth_order import checks
from opacus_ac.zeroth_order.arithmetic import Evaluation, unwatched
from opacus_ac.zeroth_order.course import Course
from opacus_ac.zeroth_order.laplace import GRID, LaplaceMechanism, laplace_statistics
from opacus_ac.zeroth_order.rounding import WIDE, Room, coarsest, room_of
from opacus_ac.zeroth_order.source import Closure, DifferenceSource
from opacus_ac.zeroth_order.trial import try_closure

if TYPE_CHECKING:
    from opacus_ac.optimizer.private_side import PrivateSide


class DirectionalMeasurement(Measurement, Part):
    """Has a closure compute the losses of the records along the directions of a step.

    The parameters of the step are the K coefficients of its directions, and what a record adds to their "gradient" are
    the differences of its loss along the directions.

    Args:
        course: stage, smoothing and directions of each step.
        coefficients: the coefficients ``[K]``, float64.
        plan: sampling plan of the private loader; None for batches by hand.
        single: whether physical batches are single records, which rounding then cannot couple.

    Attributes:
        outputs: compares what the model returns for a batch with what it returns for single records.
        wide: whether losses are computed in float64.
        measuring: whether the losses of a closure are being measured.
    """

    source: DifferenceSource
    forward_only: ClassVar[bool] = True
    too_few: ClassVar[str] = (
        "the closure returned another number of losses than the loader's batch has records: return one loss for every "
        "record of the batch, and split batches with max_physical_batch_size only"
    )
    too_many = too_few
    by_parameter = ("indices", "anchor")

    def __init__(self, course: Course, coefficients: nn.Parameter, plan: SamplingPlan | None, single: bool) -> None:
        settings, module = course.settings, course.module
        self.course, self.module, self.single = course, module, single
        self.is_laplace = settings.mechanism == "laplace"
        self.wide = settings.precision == "float64" or (settings.precision is None and not single)
        source = DifferenceSource(
            course.coordinates,
            coefficients,
            1 if self.is_laplace else 2,
            GRID if self.is_laplace else None,
            Evaluation(module, wide=self.wide),
        )
        super().__init__(source, [coefficients], moved=course.coordinates.parameters)
        noise = ", with Laplace noise" if self.is_laplace else ""
        self.sum_description = (
            f"the sum of the records' clipped differences along {settings.num_directions} public directions{noise}"
        )
        self.outputs = OutputsAlone(module, lambda tensors: plan is not None and plan.keeps_length(tensors))
        self.measuring = False
        self._rounded: list[Tensor] | None = None
        self._tried: int | None = None

    # ---------------------------------------------------------------- what the step is built from

    def mechanism(self, noise_multiplier: float, stream: RandomStream) -> GaussianMechanism:
        """Return the mechanism that the settings name."""
        kind = LaplaceMechanism if self.is_laplace else GaussianMechanism
        return kind(noise_multiplier, stream)

    def statistics(
        self, given: StepStatistics | None, policy: ClipPolicy, allocation: GroupWeights | None
    ) -> StepStatistics:
        """Return what a step releases beside the coefficients: nothing with Laplace noise."""
        if self.is_laplace:
            return laplace_statistics(given, policy)
        return super().statistics(given, policy, allocation)

    @property
    def further(self) -> Mapping[str, Part]:
        """This object, which keeps the state of the course."""
        return {"zeroth_order": self}

    def compared_at_start(self) -> dict[str, Any]:
        """Return the seed of the directions that the caller gave."""
        return {"direction_seed": self.course.settings.direction_seed}

    # ---------------------------------------------------------------- a step

    def is_measuring(self) -> bool:
        """Return whether a forward pass now is one of a closure whose losses are being measured."""
        return self.measuring

    def looking(self) -> AbstractContextManager[Any]:
        """Return a context in which a batch keeps the type that it has."""
        return unwatched()

    def begin(self, bound: float) -> None:
        """Note C of the logical batch that opens, for the grid of Laplace noise."""
        self.source.bound = bound

    def constants(self, step: int) -> dict[str, float]:
        """Return what the differences depend on, which all ranks compare to the last bit."""
        return {
            "number of the step": step,
            "direction seed": self.course.coordinates.directions.seed,
            "checksum of the trained weights": self.course.coordinates.checksum(),
        }

    def close(self) -> None:
        """Forget the logical batch, and the weights that its physical batches started from."""
        self._rounded = None
        self.source.clear(sums=True)

    def measure(self, closure: Closure | None, side: PrivateSide) -> None:
        """Measure the records of the batch in hand along the directions of the step that comes next.

        Args:
            closure: computes the losses of the records of the batch in hand, ``[B]``, with the weights as they are. It
                is called 2K times without gradients, and up to three times more in the first step. What it returns is
                private.
            side: the private side of the step.

        Raises:
            ValueError: If there is no closure; if its losses are not one per record, or not the same again; if it
                draws at random or writes into the model; if rounding leaves no room for C; or if the model is in
                training mode with dropout. Nothing was charged then.
            PrivacyBudgetExceeded: If the step would exceed the target budget. The weights are as before.
        """
        if closure is None:
            raise ValueError(
                "a zeroth-order step needs optimizer.step(closure), whose closure returns the losses of the batch's "
                "records"
            )
        checks.check_not_random(self.module)
        self._look_ahead(side)
        self.course.enter(side.steps_taken)
        side.tape.take()
        side.look_away()
        self.measuring = True
        try:
            losses = self._losses(closure, side, None if side.plan is None else side.plan.in_hand)
        except Exception:
            side.die_together()
            raise
        finally:
            self.measuring = False
        if self.single and losses.numel() > 1:
            self.source.clear(sums=False)
            raise ValueError(
                f"physical batches are single records, and the closure returned {losses.numel()} losses: pass each "
                "batch of the loader by itself, or make private without max_physical_batch_size=1"
            )
        side.tape.record(losses)

    def _losses(self, closure: Closure, side: PrivateSide, delivery: Delivery | None) -> Tensor:
        """Measure a physical batch, from the weights from which the first one of its logical batch was."""
        room, step = None if self.single else self.room(side), side.steps_taken
        self._try(closure, side, 0.0 if room is None else room.slack(side.policy.bound))
        if not side.continues(delivery):
            # How many physical batches follow is private. All start from the same weights, so that the weights show
            # the roundings of one.
            self._rounded = self.course.coordinates.copy() if side.is_skipped(delivery) else None
        elif self._rounded is not None:
            self.course.coordinates.restore(self._rounded)
        self.source.largest_loss = math.inf if room is None else room.largest_loss(side.policy.bound)
        return self.source.measure(self.outputs.noting(closure), self.course.seeds(step), self.course.smoothing(step))

    def _try(self, closure: Closure, side: PrivateSide, slack: float) -> None:
        """Look at the closure of the first batch, and of the first one after the model's mode changed."""
        mode = hash(tuple(inner.training for inner in self.module.modules()))
        if side.plan is None or mode == self._tried:
            return
        loss = self.course.settings.largest_loss
        try_closure(closure, self.module, wide=self.wide, single=self.single, loss=loss, slack=slack)
        delivery = side.plan.in_hand
        if delivery is None or delivery.draw.records:
            self._tried = mode

    def room(self, side: PrivateSide) -> Room:
        """Return what rounding leaves room for in the step that comes next, where batches are not single records."""
        plan = side.plan
        expected = float(side.expected_batch_size or 1) if plan is None else plan.sizes.expected(plan.step)
        return room_of(self.course.settings, plan, expected, WIDE if self.wide else coarsest(self.module.parameters()))

    def _look_ahead(self, side: PrivateSide) -> None:
        """Refuse a step that cannot be paid for, or whose C is too small, before the weights are touched at all."""
        plan = side.plan
        if not self.single:
            self.room(side).check(side.policy.bound)
        if plan is None or plan.sampling == "shuffled":
            return
        draw = plan.current()
        side.look_ahead(plan.event(side.noise_multiplier, 1.0 if draw is None else draw.sample_rate))

    # ---------------------------------------------------------------- state

    def public_settings(self) -> dict[str, Any]:
        """Return the public settings of directions, stages and pruning, for ledger and checkpoint."""
        return {"zeroth_order": self.course.settings.configuration()}

    def state_dict(self) -> dict[str, Any]:
        """Return settings, seed, stage, mask and anchor."""
        return self.course.state_dict()

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that ``state`` is that of a zeroth-order run with these settings and tensors.

        Raises:
            ValueError: If it is not.
        """
        self.course.check_state(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue along the directions of a state that :meth:`check_state` has accepted."""
        self._rounded = self._tried = None
        self.course.load_state_dict(state)
