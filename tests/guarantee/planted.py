"""Faults, planted back one at a time: what was wrong once, or might become so, as small changes of the package."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from reference import NoiseTally, Violation

from opacus_ac.accounting.shuffled import ShuffledEpochs
from opacus_ac.budget import PrivacyLedger
from opacus_ac.budget.account import Account
from opacus_ac.budget.spending import Spending
from opacus_ac.grad_sample.opacus_hooks import PerSampleSource
from opacus_ac.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.logical_batch import LogicalBatch
from opacus_ac.optimizer.origin import Origin
from opacus_ac.optimizer.private_side import PrivateSide
from opacus_ac.optimizer.records import RecordSums
from opacus_ac.optimizer.sum_release import SumRelease
from opacus_ac.release import GaussianMechanism, StepStatistics
from opacus_ac.sampling import SamplingPlan
from opacus_ac.sampling.collate import EmptySafeCollate
from opacus_ac.sampling.delivery import Delivery, Recognition

Patch = tuple[Any, str, Callable[[Any], Any]]
"""Owner, attribute, and what is put in the place of the original."""


@dataclass(frozen=True)
class Fault:
    """A fault that can be planted.

    Attributes:
        name: what is wrong.
        patches: how to plant it.
        kinds: ways in which the reference may notice it.
    """

    name: str
    patches: tuple[Patch, ...]
    kinds: frozenset[str]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Have the fault, for a while."""
        originals = [(owner, name, vars(owner)[name]) for owner, name, _ in self.patches]
        for owner, name, made in self.patches:
            setattr(owner, name, made(vars(owner)[name]))
        try:
            yield
        finally:
            for owner, name, original in reversed(originals):
                setattr(owner, name, original)


FAULTS: list[Fault] = []


def fault(name: str, kinds: str, *patches: Patch) -> None:
    """Add a fault to the table."""
    FAULTS.append(Fault(name, patches, frozenset(kinds.split())))


def nothing(_: Any) -> Any:
    """Leave a method out."""
    return lambda *args, **kwargs: None


# ---------------------------------------------------------------- what is charged


def _marked_before_charged(original: Any) -> Any:
    def price(self: Any, draw: Any, noise: float) -> Any:
        event = original(self, draw, noise)
        self.paid(draw, noise)
        return event

    return price


fault("a pass is marked as paid before its charge (A1)", "charge", (SamplingPlan, "price", _marked_before_charged))


class _Unused:
    """Stands for ``Delivery.used``: nothing is ever noted as used."""

    def __get__(self, instance: Any, owner: Any) -> bool:
        return False

    def __set__(self, instance: Any, value: Any) -> None:
        pass


fault("a draw is charged once and used often (A4)", "charge twice", (Delivery, "used", lambda _: _Unused()))
fault(
    "a batch is taken for the one in hand whatever it is (A5)",
    "charge draws part twice",
    (Recognition, "find", lambda _: lambda self, tensors, current: (current, True)),
)


def _last_draw(original: Any) -> Any:
    def delivery(self: Any, plan: Any) -> Any:
        self._sights = self._sights[-1:]
        return original(self, plan)

    return delivery


fault(
    "several draws go into one step (A6)",
    "draws twice",
    (Origin, "delivery", _last_draw),
    (PrivateSide, "_check_records", nothing),
)
fault(
    "two passes over one batch are summed (B12)",
    "twice",
    (PrivateSide, "_check_records", nothing),
)
fault("what changes within a logical batch is not looked at (A10)", "charge norm", (LogicalBatch, "check", nothing))


def _charged_afterwards(original: Any) -> Any:
    def pre_step(self: Any, closure: Any = None) -> bool:
        waiting: list[Any] = []
        charge, self.charge = self.charge, waiting.append
        try:
            taken = original(self, closure)
        finally:
            self.charge = charge
        for event in waiting:
            charge(event)
        return taken

    return pre_step


fault("noise is drawn before the charge", "charge", (AdaptiveClipDPOptimizer, "pre_step", _charged_afterwards))


def _disk_is_never_full(original: Any) -> Any:
    def charge(self: Any, *args: Any, **kwargs: Any) -> None:
        with contextlib.suppress(OSError):
            original(self, *args, **kwargs)

    return charge


fault("a charge that is not on disk counts as made", "charge", (PrivacyLedger, "charge", _disk_is_never_full))


def _rate_of_the_next_step(original: Any) -> Any:
    def price(self: Any, draw: Any, noise: float) -> Any:
        if draw is not None and self.sampling != "shuffled":
            draw = replace(draw, sample_rate=self.sizes.rate(self.step))
        return original(self, draw, noise)

    return price


fault(
    "the rate is read from the schedule, not from the draw", "charge", (SamplingPlan, "price", _rate_of_the_next_step)
)
fault(
    "a batch of unknown origin is charged as a fresh draw",
    "charge",
    (SamplingPlan, "price", lambda original: lambda self, draw, noise: _as_fresh(original, self, draw, noise)),
)


def _as_fresh(original: Any, plan: Any, draw: Any, noise: float) -> Any:
    if draw is None and plan.sampling != "shuffled":
        return plan.event(noise, plan.sizes.rate(plan.step))
    return original(plan, draw, noise)


def _empty_for_free(original: Any) -> Any:
    def price(self: Any, draw: Any, noise: float) -> Any:
        return None if draw is not None and draw.records == 0 else original(self, draw, noise)

    return price


fault("an empty batch is not charged", "charge flow", (SamplingPlan, "price", _empty_for_free))


def _less_noise_for_free(original: Any) -> Any:
    def price(self: Any, pass_index: int, step_in_pass: int, steps_per_pass: int, noise: float) -> Any:
        return original(self, pass_index, step_in_pass, steps_per_pass, max(noise, self._noise_multiplier))

    return price


fault("a paid pass covers steps of less noise", "charge", (ShuffledEpochs, "price", _less_noise_for_free))


def _paid_for_ever(original: Any) -> Any:
    def price(self: Any, pass_index: int, step_in_pass: int, steps_per_pass: int, noise: float) -> Any:
        event = original(self, pass_index, step_in_pass, steps_per_pass, noise)
        return None if self._open is not None else event

    return price


fault("a paid pass pays for the next one too", "charge", (ShuffledEpochs, "price", _paid_for_ever))

# ---------------------------------------------------------------- what is summed

fault(
    "records of a failed step stay in the sums (B5)",  # mode "bk" forms its sums later
    "twice draws counts adapter",
    (PerSampleSource, "withdraw", nothing),
)


def _without_weight_zero(original: Any) -> Any:
    def _add_records(self: Any, draw: Any, norms: Any, losses: Any) -> None:
        self.origin.is_stand_in = False
        original(self, replace(draw, records=1) if draw is not None and draw.records == 0 else draw, norms, losses)

    return _add_records


fault(
    "the stand-in of an empty batch is summed",
    "draws charge counts scale norm part sensitivity flow",
    (RecordSums, "_add_records", _without_weight_zero),
)
fault("counts of a failed step stay in the histogram", "counts", (StepStatistics, "restore", nothing))


def _larger(original: Any) -> Any:
    def _factors(self: Any, norms: Any) -> Any:
        return original(self, norms) * 1.1

    return _factors


fault("a policy enlarges gradients beyond its share (B13)", "norm", (RecordSums, "_factors", _larger))


def _part_is_whole(original: Any) -> Any:
    def is_skipped(self: Any, delivery: Any) -> bool:
        return original(self, delivery) and not (delivery is not None and delivery.draw.part == 0)

    return is_skipped


fault(
    "the first part of a draw is released by itself",
    "part charge sensitivity",
    (PrivateSide, "is_skipped", _part_is_whole),
)


def _kept_part_at_rate_one(original: Any) -> Any:
    def delivery(self: Any, plan: Any) -> Any:
        sight = self._sights[-1] if self._sights else None
        if sight is not None and sight.delivery is not None and sight.delivery.used:
            return None
        return original(self, plan)

    return delivery


fault(
    "a part of a draw that was kept is a batch of its own",
    "part sensitivity",
    (Origin, "delivery", _kept_part_at_rate_one),
)

# ---------------------------------------------------------------- noise


def _half(original: Any) -> Any:
    def noise_in_place(self: Any, totals: Any, std: Any, scale: float = 1.0) -> None:
        original(self, totals, std / 2 if isinstance(std, float | int) else std, scale)

    return noise_in_place


fault("half the noise is drawn", "noise", (GaussianMechanism, "noise_in_place", _half))
fault(
    "the multiplier of a release forgets the statistics",
    "charge",
    (GaussianMechanism, "gradient_multiplier", lambda _: lambda self, statistics: self._noise_multiplier),
)


def _raw_statistics(original: Any) -> Any:
    def release_statistics(self: Any, statistics: Any, size: float, *ranks: Any) -> Any:
        return statistics.decode(statistics.vector(), self.gradient_multiplier(statistics), size)

    return release_statistics


fault("statistics leave without noise", "noise", (GaussianMechanism, "release_statistics", _raw_statistics))


def _realised_size(original: Any) -> Any:
    def _gradient_scale(self: Any) -> float:
        draw = None if self._delivery is None else self._delivery.draw
        return original(self) * (1.0 if draw is None else self._denominator() / max(draw.records, 1))

    return _gradient_scale


fault("sums are divided by the realised batch size", "flow", (SumRelease, "_gradient_scale", _realised_size))


def _counted_as_one(original: Any) -> Any:
    def _counted(self: Any, batch: Any, records: list[Any]) -> tuple[Any, int]:
        made, count = original(self, batch, records)
        return made, max(count, 1)

    return _counted


fault(
    "the stand-in for records that were all left out is a record",
    "charge draws counts",
    (EmptySafeCollate, "_counted", _counted_as_one),
)

# ---------------------------------------------------------------- weights

fault(
    "gradients that were not released are applied (B1)",
    "raw moved",
    (PrivateSide, "_check_outside", nothing),
)


def _leaky(original: Any) -> Any:
    def _drop(self: Any) -> None:
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        original(self)
        for parameter, grad in zip(self.params, grads, strict=True):
            if grad is not None:
                parameter.data.sub_(grad)

    return _drop


fault("a step that fails moves the weights", "moved", (PrivateSide, "_drop", _leaky))

# ---------------------------------------------------------------- reports


def _refunded(original: Any) -> Any:
    def step(self: Any, closure: Any = None) -> Any:
        account = getattr(self.charge, "__self__", None) or _account_of(self)
        before = copy.deepcopy(account.accountant.state_dict()) if account is not None else None
        try:
            return original(self, closure)
        except BaseException:
            if account is not None:
                account.accountant.load_state_dict(before)
            raise

    return step


def _account_of(optimizer: Any) -> Any:
    for cell in getattr(optimizer.charge, "__closure__", None) or ():
        owner = getattr(cell.cell_contents, "__self__", None)
        if isinstance(owner, Account):
            return owner
    return None


fault(
    "a step that fails is refunded, its noise drawn or not",
    "charge epsilon",
    (AdaptiveClipDPOptimizer, "step", _refunded),
)
fault("a checkpoint's charges are not taken over", "epsilon", (Account, "resume", nothing))


def _skips(original: Any) -> Any:
    state = {"count": 0}

    def add(self: Any, *args: Any, **kwargs: Any) -> Any:
        state["count"] += 1
        if state["count"] % 5:
            return original(self, *args, **kwargs)
        return None

    return add


fault("one charge in five is lost (D)", "charge epsilon crash", (Spending, "add", _skips))


def _cheaper(original: Any) -> Any:
    def bounds(self: Any, *args: Any, **kwargs: Any) -> Any:
        return {
            name: value * 0.7 if math.isfinite(value) else value
            for name, value in original(self, *args, **kwargs).items()
        }

    return bounds


fault("a report says less than was spent (A2)", "epsilon", (Account, "bounds", _cheaper))


def _figure_alone(original: Any) -> Any:
    def least_after(self: Any, *args: Any, **kwargs: Any) -> float:
        return 0.0

    return least_after


fault("a target is held by the accountant's figure alone", "target", (Spending, "least_after", _figure_alone))


def first_found(
    fault: Fault, sequences: int, examine: Callable[[int, NoiseTally], Any]
) -> tuple[int, Violation] | None:
    """Return the first sequence in which a planted fault is noticed, and as what; None when it is not."""
    tally = NoiseTally()
    with fault.planted():
        for seed in range(sequences):
            try:
                examine(seed, tally)
                tally.check()
            except Violation as violation:
                return seed, violation
    return None
