"""The private side of a step: everything up to and including the release. Whatever is not noised yet stays in here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from opacus_ac.accounting import Event
from opacus_ac.distributed.reducers import LOCAL
from opacus_ac.grad_sample.alone.records import RecordsAlone
from opacus_ac.grad_sample.opacus_hooks import PerSampleSource
from opacus_ac.optimizer import step_checks
from opacus_ac.optimizer.agreement import meet, report_failure
from opacus_ac.optimizer.logical_batch import APPLIED, CHARGED, OPEN, RELEASED, LogicalBatch, Terms
from opacus_ac.optimizer.measurement import Measurement
from opacus_ac.optimizer.model_watch import ModelWatch
from opacus_ac.optimizer.origin import Origin
from opacus_ac.optimizer.sum_release import SumRelease
from opacus_ac.release.values import StepRelease
from opacus_ac.sampling.delivery import Delivery, Draw
from opacus_ac.sampling.plan import SamplingPlan

_NOT_COPIED = (
    "charge", "groups", "look_ahead", "on_unknown_batch", "origin", "plan", "reducer", "source", "watch", "_batch",
    "_delivery",
)  # fmt: skip
"""What a copy must not have: the account, the draws, the records, the processes."""

_IS_COPY = "a copy of a private optimizer takes no steps, which nobody would account for: step the original"


class PrivateSide(SumRelease):
    """Clips, counts, charges and releases a logical batch, which is a transaction: applied as a whole or not at all.

    Args:
        measurement: measures the records of a physical batch.
        plan: sampling plan of the private loader; None for batches by hand.
        groups: returns the parameter groups of the inner optimizer.
        **release: the other arguments of :class:`SumRelease` and :class:`RecordSums`.

    Attributes:
        charge: pays for an event, or raises; None where nothing is accounted.
        look_ahead: raises where :attr:`charge` would, and charges nothing; for work that should not begin in vain.
        watch: compares the model with what the last release left behind; None without a model.
        alone: runs records by themselves; None without a model.
    """

    def __init__(
        self,
        measurement: Measurement,
        *,
        plan: SamplingPlan | None,
        groups: Callable[[], Sequence[Mapping[str, Any]]],
        **release: Any,
    ) -> None:
        super().__init__(measurement.parameters, source=measurement.source, **release)
        self.measurement, self.plan, self.groups = measurement, plan, groups
        self.charge: Callable[[Event | None], None] | None = None
        self.look_ahead: Callable[[Event], None] = lambda event: None
        self.on_unknown_batch: Callable[[], None] = lambda: None
        self.alone: RecordsAlone | None = None
        self.watch: ModelWatch | None = None
        self.current_event: Event | None = None
        self.skip_signals: list[bool] = []
        self.is_last_skipped = self.is_copy = False
        self._batch: LogicalBatch | None = None
        self._delivery: Delivery | None = None

    def clear(self) -> None:
        """Clear per-sample gradients, and, unless a logical batch is under way, the clipped sums."""
        self.source.clear(sums=not self.is_last_skipped)
        if not self.is_last_skipped:
            self.reducer.clear()
        unused = self.origin.gradients_cleared()
        if isinstance(self.source, PerSampleSource):
            self.source.mark()
            if unused:  # they may be of a backward pass that an exception ended
                self.source.forget_interrupted()

    def see(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note which batch a forward pass of the model runs on; a hook before it."""
        if not self.measurement.is_measuring():
            return
        if isinstance(self.source, PerSampleSource):
            step_checks.check_none_frozen(self.params)
            if self.origin.given_up():
                self.source.forget_interrupted()
        with self.measurement.looking():
            another = self.plan is None or self.origin.enter(self.plan, (args, kwargs))
        if self.watch is not None:
            if another:
                self.watch.end()  # the model was the caller's since a pass that no backward pass followed
            self.watch.begin()

    def seen(self, output: Any) -> None:
        """Note the output of a forward pass; a hook after it, with None where it failed."""
        if self.measurement.is_measuring():
            with self.measurement.looking():
                self.origin.leave(output)

    def look_away(self) -> None:
        """Forget what was seen: what comes next belongs to another physical batch."""
        self.origin.forget()
        if self.watch is not None:
            self.watch.end()

    def is_skipped(self, delivery: Delivery | None) -> bool:
        """Return whether more physical batches of the logical one follow."""
        return step_checks.more_follow(self.plan, delivery, bool(self.skip_signals) and self.skip_signals[0])

    def _check_outside(self) -> None:
        """Refuse what would move weights without a release."""
        step_checks.check_outside(self.groups(), self.measurement.moved, self.watch)

    def _check_records(self, draw: Draw | None, norms: Tensor) -> None:
        """Refuse measurements that are not one per record of the batch that the loader handed out."""
        measurement = self.measurement
        step_checks.check_records(self.plan, self.source, draw, norms, measurement.too_few, measurement.too_many)

    # ---------------------------------------------------------------- the transaction

    def measure(self, closure: Callable[[], Any] | None) -> None:
        """Measure the records of the batch in hand, by the closure if there is one."""
        self._refuse_copies()
        self.measurement.measure(closure, self)

    def _refuse_copies(self) -> None:
        if self.is_copy:
            raise ValueError(_IS_COPY)

    def finish(self, charged: Callable[[], None]) -> StepRelease | None:
        """Clip and count the batch in hand; on the last physical one account for the step and release it.

        A physical batch is added whole or not at all: what fails before the release begins takes it out again, so that
        it can be tried again. What fails later, or between two physical batches, kills the logical batch.

        Args:
            charged: called between charge and noise.
        """
        self.clip_and_accumulate()
        delivery, batch = self._delivery, self._batch
        assert batch is not None
        try:
            skip = self.is_skipped(delivery)
            if not skip:
                self._account(None if delivery is None else delivery.draw, charged)
        except BaseException:
            self._withdraw()
            raise
        if self.skip_signals:
            self.skip_signals.pop(0)  # it has been followed
        if delivery is not None:
            delivery.used = True
        if skip:
            self._settle()
            self.is_last_skipped = True
            self.look_away()
            return None
        self.is_last_skipped = False
        batch.advance(RELEASED)
        try:
            self.add_noise()
        except BaseException:
            self._drop()
            raise
        return self.released

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients and the statistics of the batch in hand to those of its logical batch."""
        self._refuse_copies()
        try:
            delivery = None if self.plan is None else self.origin.delivery(self.plan)
            draw = None if delivery is None else delivery.draw
            self._check_outside()
            weights = self._weights()
            norms = self.source.finish_batch() if weights is None else self.source.finish_batch(weights)
            losses = self.tape.take()
            self._check_records(draw, norms)
            if self.alone is not None:
                self.alone.check(self.source)
            self._begin(delivery)
        except Exception:
            self.die_together()
            raise
        self._delivery = delivery
        self._before = self.statistics.sums()
        try:
            self._add_records(draw, norms, losses)
        except BaseException as error:
            # Part of the batch may be in the sums: were it retried, its records would count twice.
            self._restore()
            if isinstance(error, Exception):
                self.die_together()
            raise
        assert self._batch is not None
        self._batch.parts += 1

    def _withdraw(self) -> None:
        """Take the physical batch in hand out of its logical batch again: its release has not begun."""
        assert self._batch is not None
        self._restore()
        self._batch.parts -= 1
        if self._batch.state == CHARGED:
            self._batch.advance(OPEN)

    def _drop(self) -> None:
        """Give up the logical batch that is open, with all of its sums."""
        if self._batch is not None:
            self._batch.kill()
        self._batch = None
        self.is_last_skipped = False
        self.statistics.finish()
        self.source.clear(sums=True)
        self.measurement.close()
        self.reducer.clear()

    def _terms(self) -> Terms:
        """Return what has to stay as it is while a logical batch is open."""
        weights = self._weights()
        return Terms(
            max_grad_norm=self.policy.bound,
            noise_multiplier=self.mechanism.noise_multiplier,
            weights=None if weights is None else tuple(weights),
            trained=tuple(p.requires_grad for p in self.params),
        )

    def _settle(self) -> None:
        """Turn the physical batch into sums before the next one comes."""
        try:
            self.reducer.settle(self.source)
        except BaseException:
            self._drop()  # some parameters have the records in their sums, others not
            raise

    def continues(self, delivery: Delivery | None) -> bool:
        """Whether the batch in hand belongs to the logical batch that is open."""
        batch = self._batch
        if batch is None or batch.state != OPEN or not self.statistics.started:
            return False
        if delivery is None:
            return batch.key is None and self.is_last_skipped
        return batch.key == delivery.draw.batch

    def _begin(self, delivery: Delivery | None) -> None:
        """Go on with the open logical batch, or open another one and drop what an interrupted one left behind."""
        part = 0 if delivery is None else delivery.draw.part
        if self.continues(delivery):
            assert self._batch is not None
            try:
                self._batch.check(self._terms())
            except ValueError:
                self._give_up()
                raise
            if delivery is None or part == self._batch.parts:
                return
        if part > 0:
            self._give_up()
            step_checks.refuse_later_part()
        # Its records may be drawn again: adding them to the next batch would count one record twice.
        for p in self.params:
            p.summed_grad = None  # type: ignore[attr-defined]
        self.reducer.clear()
        self._batch = None
        self.statistics.begin(self.policy.bound, self.policy.true_share)
        self._batch = LogicalBatch(None if delivery is None else delivery.draw.batch, self._terms())
        self.measurement.begin(self.policy.bound)

    def _give_up(self) -> None:
        """Kill the open logical batch before its records in hand are touched."""
        if self._batch is not None:
            self._batch.kill()
        self._batch = None
        self.is_last_skipped = False
        self.statistics.finish()

    def die_together(self) -> None:
        """Let the other processes know that this one takes no part in the release that they are about to meet for."""
        delivery = self.plan.in_hand if self.plan is not None else None
        if self.reducer.world > 1 and (delivery is None or delivery.draw.last):
            report_failure(self.reducer, self.statistics, len(self._shared_constants(None)))

    def _account(self, draw: Draw | None, charged: Callable[[], None]) -> None:
        """Charge the step before anything of it is released, and let hooks know."""
        batch = self._batch
        assert batch is not None
        if self.reducer.world > 1:
            # Around another loader over our sampler the batch in hand need not be the one that was announced.
            meet(self.reducer, self.statistics, draw, self._shared_constants(draw))
        noise_multiplier = batch.terms.noise_multiplier if self.policy.is_private else 0.0
        if self.plan is None:
            self.current_event = None
        else:
            if draw is None:
                self.on_unknown_batch()
            event = self.plan.price(draw, noise_multiplier)
            self.current_event = None if event is None else replace(event, mechanism=self.mechanism.name)
            if self.charge is not None:
                self.charge(self.current_event)
            self.plan.paid(draw, noise_multiplier)  # only a charge that returned leaves a mark
        batch.advance(CHARGED)
        self._draw = draw
        charged()
        batch.check(self._terms())

    def _shared_constants(self, draw: Draw | None) -> dict[str, float]:
        """Return what must be the same to the last bit on all ranks, by name."""
        return {
            "max_grad_norm": self.policy.bound,
            "noise_multiplier": self.mechanism.noise_multiplier,
            "learning-rate multiplier": 1.0 if self.control is None else self.control.multiplier,
            "expected batch size": 0.0 if draw is None else draw.expected_batch_size,
            **self.measurement.constants(self.steps_taken),
        }

    @contextmanager
    def applying(self) -> Iterator[None]:
        """Close the logical batch when what follows its release is done; what fails on the way kills it."""
        assert self._batch is not None
        try:
            yield
            self._batch.advance(APPLIED)
        except BaseException:
            self._drop()
            raise
        finally:
            self.origin.forget()
        self.measurement.close()
        if self.watch is not None:
            self.watch.check_applied()

    def go_on(self) -> None:
        """Let the plan know that the next step comes."""
        if self.plan is not None:
            self.plan.step = self.steps_taken

    def __deepcopy__(self, memo: dict[int, Any]) -> PrivateSide:
        """Return a copy that takes no step: nobody would account for it."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            copied.__dict__[name] = None if name in _NOT_COPIED else copy.deepcopy(value, memo)
        copied.reducer, copied.is_copy, copied.origin = LOCAL, True, Origin()
        copied.on_unknown_batch = lambda: None
        return copied
