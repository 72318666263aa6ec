"""The plan of a private loader: with which probability each record enters a step, and what the step costs.

Every physical batch that reaches the training loop is tied to its :class:`~opacus_ac.sampling.delivery.Draw`. So a step
is charged for the rate at which its batch was drawn, whatever batches the loop skips, repeats or interrupts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from opacus_ac.accounting import Event, ShuffledEpochs
from opacus_ac.protocols.part import Part
from opacus_ac.sampling.delivery import RECOGNITION, Delivery, Draw, Sight, content_of, unknown
from opacus_ac.sampling.passes import Pass, Worker

RateSchedule = Callable[[int], float] | Sequence[float]

SAMPLING = ("poisson", "truncated_poisson", "fixed_size", "shuffled")
"""Ways to draw batches for which a privacy bound is known."""


class BatchSizes:
    """The expected batch size of every step: a constant, or a public schedule.

    Args:
        dataset_size: number of records N, a public constant.
        batch_size: expected batch size without a schedule.
        schedule: a function from the step (from 0) to the expected batch size, or a sequence whose last entry holds
            from then on. It may depend on the step and on released values, never on data.
        whole: whether batch sizes must be whole numbers.

    Raises:
        ValueError: If an expected batch size is outside (0, N], or is not whole.
    """

    def __init__(
        self, dataset_size: int, batch_size: float, schedule: RateSchedule | None = None, *, whole: bool = False
    ) -> None:
        self.dataset_size = dataset_size
        self._constant = batch_size
        # A copy, because changes to a list during the run might depend on data.
        self._schedule = schedule if callable(schedule) or schedule is None else tuple(schedule)
        self._whole = whole
        self.expected(0)
        if isinstance(schedule, Sequence):
            for step in range(len(schedule)):
                self.expected(step)

    @property
    def is_function(self) -> bool:
        """Whether the schedule is a function, which may depend on past releases."""
        return callable(self._schedule)

    @property
    def varies(self) -> bool:
        """Whether there is a schedule."""
        return self._schedule is not None

    def expected(self, step: int) -> float:
        """Return the expected batch size of ``step``."""
        size: float = self._constant
        if callable(self._schedule):
            size = self._schedule(step)
        elif self._schedule is not None:
            if not self._schedule:
                raise ValueError("batch_size_schedule is empty: give at least one expected batch size")
            size = self._schedule[min(step, len(self._schedule) - 1)]
        if not (isinstance(size, int | float) and math.isfinite(size) and 0 < size <= self.dataset_size):
            raise ValueError(
                f"the expected batch size of step {step} is {size!r}; it must be > 0 and at most the number of "
                f"records ({self.dataset_size}), or the sample rate would exceed 1"
            )
        if self._whole and size != int(size):
            raise ValueError(f"the batch size of step {step} is {size!r}: batches of a fixed size need a whole number")
        return float(size)

    def rate(self, step: int) -> float:
        """Return the sampling rate of ``step``, expected batch size / N."""
        return self.expected(step) / self.dataset_size


class SamplingPlan(Part):
    """Connects sampler, loader and optimizer: the draw of the current batch, and the cost of its step.

    Args:
        sizes: expected batch sizes.
        sampling: one of :data:`SAMPLING`.
        steps_per_pass: number of logical batches in one pass of the loader.
        max_batch_size: largest logical batch, for "truncated_poisson" only.
        max_rows_per_user: largest number of rows of a user, if a record is a user; None if a record is a row.

    Raises:
        ValueError: If ``max_batch_size`` does not fit ``sampling``, or is below 1.
    """

    def __init__(
        self,
        sizes: BatchSizes,
        sampling: str,
        steps_per_pass: int,
        max_batch_size: int | None = None,
        max_rows_per_user: int | None = None,
    ) -> None:
        if (sampling == "truncated_poisson") != (max_batch_size is not None):
            raise ValueError(
                'max_batch_size belongs to sampling="truncated_poisson", which needs it: give both or none'
            )
        if max_batch_size is not None and max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {max_batch_size!r}")
        self.sizes, self.sampling, self.steps_per_pass = sizes, sampling, steps_per_pass
        self.max_batch_size, self.max_rows_per_user = max_batch_size, max_rows_per_user
        self.step = 0
        self.passes = 0
        self.own_loader = False
        self.length_is_fixed: Callable[[], bool] = lambda: False
        self._batches = 0
        self.latest = Pass(0, own=True)
        self._pulled = self.latest
        self._split: list[Pass] = []
        self._of_worker: dict[int, Pass] = {}
        self._current: Delivery | None = None
        self._ahead = False
        self._epochs = ShuffledEpochs()

    # ---------------------------------------------------------------- announcing

    def begin_pass(self) -> Pass:
        """Count a new pass of the sampler: of our loader if ``own_loader`` is set, else of another loader around it."""
        self.passes += 1
        self.latest = Pass(self.passes, own=self.own_loader)
        self._current, self._ahead = None, False
        return self.latest

    def emit(self, passing: Pass, step_in_pass: int, expected: float, sizes: Sequence[int], selection: int = 0) -> None:
        """Announce the physical batches of the next logical batch.

        Args:
            passing: the pass.
            step_in_pass: number of the logical batch within the pass.
            expected: expected size of the logical batch.
            sizes: number of records of each physical batch.
            selection: hash of the records of the logical batch.
        """
        self._batches += 1
        self._pulled = passing
        rate = 1.0 if self.sampling == "shuffled" else expected / self.sizes.dataset_size
        for part, records in enumerate(sizes):
            last = part == len(sizes) - 1
            draw = Draw(self._batches, rate, expected, records, last, passing.number, step_in_pass, selection, part)
            passing.announce(draw)

    def split(self, last: bool) -> None:
        """Note that a loader around our sampler splits a physical batch off the logical batch that was announced last.

        While two passes take turns, it is unknown to which of them the physical batch belongs.

        Args:
            last: whether it is the last physical batch of the logical batch.
        """
        passing = self._pulled
        self._split = [p for p in self._split if not p.ended and p is not passing]
        mixed_up = [p for p in self._split if p.is_within_a_batch or p.is_mixed_up]
        for one in [passing, *mixed_up] if mixed_up else []:
            one.is_mixed_up = True
        if not passing.own:
            passing.split(last)
            self._split.append(passing)

    # ---------------------------------------------------------------- delivering

    def deliver(self, passing: Pass, batch: Any, records: int) -> None:
        """Note that our loader hands the next announced physical batch to the loop.

        Args:
            passing: the pass.
            batch: the batch.
            records: number of its records; fewer than announced if the loader's ``collate_fn`` left some out.

        Raises:
            RuntimeError: If the loop took no step on the physical batch before, so that a part of its logical batch
                would be lost.
        """
        before = self._current
        if before is not None and not before.used and not before.draw.last:
            raise RuntimeError(
                "a physical batch was not followed by optimizer.step(): with max_physical_batch_size every batch "
                "of the loader needs its own backward() and step(), or part of the logical batch is lost"
            )
        draw = replace(passing.announced.popleft(), records=records)
        self._hand_out(Delivery(draw, owner=self), batch)

    def arrive(self, batch: Any, records: int, worker: Worker | None = None) -> None:
        """Note that a loader around our sampler has collated a physical batch.

        Args:
            batch: the batch.
            records: number of its records; 0 for the stand-in of an empty batch.
            worker: the worker that collated it; None for this process, which hands out a batch at once.
        """
        passing = self._pulled if worker is None else self._pass_of(worker)
        draw = None if passing.own else passing.take(worker)
        if any(p.is_mixed_up and not p.ended for p in self._split):
            # It is a part of one of several draws, and is never used by itself.
            RECOGNITION.remember(Delivery(Draw(0, 1.0, 1.0, records, False, 0, 0, part=1)), batch)
            self._ahead = True
            return
        if draw is None:
            return
        delivery = Delivery(replace(draw, records=records), split=passing.is_split, owner=self)
        if worker is None:
            self._hand_out(delivery, batch)
        else:
            RECOGNITION.remember(delivery, batch)

    def _pass_of(self, worker: Worker) -> Pass:
        """Return the pass of a worker. A worker stays with a pass until it has ended."""
        known = self._of_worker.get(worker.process)
        if known is None or known.ended:
            known = self._of_worker[worker.process] = self.latest
        return known

    def _hand_out(self, delivery: Delivery, batch: Any) -> None:
        if self._current is not None and not self._current.used:
            self._ahead = True  # the batch before was skipped, or this one is fetched ahead
        self._current = delivery
        RECOGNITION.remember(delivery, batch)

    # ---------------------------------------------------------------- in hand

    @property
    def in_hand(self) -> Delivery | None:
        """The current batch: the one that was handed out last, unless a step has used it."""
        return None if self._current is None or self._current.used else self._current

    def current(self) -> Draw | None:
        """Return the draw of the current batch; None if there is no batch, or a step has used it."""
        return None if self.in_hand is None else self.in_hand.draw

    def see(self, tensors: list[Tensor]) -> Sight:
        """Recognise the batch of a forward pass of the model.

        Args:
            tensors: the inputs of the model.
        """
        found, known = RECOGNITION.find(tensors, self._current)
        if found is None and not known and not self._ahead:
            found = self.in_hand  # the batch was changed on its way, and no other batch matches
            if found is None and self._current is not None and self._current.draw.records == 0:
                found = self._current  # a copy of a stand-in that was used before has no records either
        if found is None or found.owner is not self:
            sight = unknown(tensors)
            sight.is_part = found is not None and (found.draw.part > 0 or not found.draw.last)
            return sight
        RECOGNITION.follow(found, tensors)
        return Sight(found)

    def keeps_length(self, tensors: list[Tensor]) -> bool:
        """Say whether a batch is as our loader made it, and the loader gives every record the same length.

        Args:
            tensors: the inputs of the model.
        """
        found, _ = RECOGNITION.find(tensors, self._current)
        if found is None or found.owner is not self:
            return False
        return any(t.dim() > 1 and content_of(t) in found.contents for t in tensors) and self.length_is_fixed()

    def price(self, draw: Draw | None, noise_multiplier: float) -> Event | None:
        """Return the event that a step on ``draw`` costs, without noting it. None if its pass has been charged.

        A batch of unknown origin (``draw`` is None) is charged at rate 1, without amplification by sampling.
        """
        if draw is None:
            return Event(noise_multiplier, 1.0, "shuffled" if self.sampling == "shuffled" else "poisson")
        if self.sampling == "shuffled":
            return self._epochs.price(draw.pass_index, draw.step_in_pass, self.steps_per_pass, noise_multiplier)
        return self.event(noise_multiplier, draw.sample_rate)

    def paid(self, draw: Draw | None, noise_multiplier: float) -> None:
        """Note that the price of a step has been charged."""
        if draw is not None and self.sampling == "shuffled":
            self._epochs.paid(draw.pass_index, draw.step_in_pass, self.steps_per_pass, noise_multiplier)

    def event(self, noise_multiplier: float, sample_rate: float) -> Event:
        """Return the event of one step at ``sample_rate``; for "shuffled" batches, the event of one pass."""
        if self.sampling == "shuffled":
            return Event(noise_multiplier, 1.0, "shuffled")
        if self.sampling == "truncated_poisson":
            sizes = self.sizes.dataset_size, self.max_batch_size
            return Event(noise_multiplier, sample_rate, self.sampling, *sizes)
        return Event(noise_multiplier, sample_rate, self.sampling)

    def public_settings(self) -> dict[str, Any]:
        """Return how batches are drawn, and from how many records."""
        return {
            "sampling": self.sampling,
            "dataset_size": self.sizes.dataset_size,
            "expected_batch_size": self.sizes.expected(0),
            "max_batch_size": self.max_batch_size,
            "max_rows_per_user": self.max_rows_per_user,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the public counters."""
        return {"step": self.step, "passes": self.passes, "epochs": self._epochs.state_dict()}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ``ValueError`` unless ``state`` has the counters of a plan."""
        int(state["step"]), int(state["passes"])
        ShuffledEpochs().load_state_dict(state["epochs"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting from ``state``."""
        self.step, self.passes = int(state["step"]), int(state["passes"])
        self._epochs.load_state_dict(state["epochs"])
