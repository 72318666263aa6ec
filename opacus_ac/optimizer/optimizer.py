"""The one private step: clip, count, account, release, update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor
from torch.optim import Optimizer

from opacus_ac.accounting import Event
from opacus_ac.allocation.weights import GroupWeights
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.clipping.table import build_policy
from opacus_ac.distributed.reducers import LOCAL, Reducer, Source
from opacus_ac.grad_sample.alone.records import RecordsAlone
from opacus_ac.grad_sample.opacus_hooks import PerSampleSource
from opacus_ac.grad_sample.source import GradientSource, OnlyTrained
from opacus_ac.loss import LossTape
from opacus_ac.noise.streams import RandomStream, SecretStream, SeededStream
from opacus_ac.optimizer.agreement import meet, report_failure
from opacus_ac.optimizer.ema import WeightEMA
from opacus_ac.optimizer.fused import ONE_BY_ONE, FusedStep
from opacus_ac.optimizer.logical_batch import APPLIED, CHARGED, OPEN, RELEASED, LogicalBatch, Terms
from opacus_ac.optimizer.lr_control import ClipRateControl
from opacus_ac.optimizer.model_watch import ModelWatch
from opacus_ac.optimizer.origin import Origin
from opacus_ac.optimizer.state import STATE_KEY, check_private_state, load_private_state, private_state
from opacus_ac.release.mechanism import GaussianMechanism
from opacus_ac.release.statistics import StepStatistics
from opacus_ac.release.values import StepRelease
from opacus_ac.sampling.delivery import Delivery, Draw
from opacus_ac.sampling.plan import SamplingPlan

_NOT_COPIED = (
    "charge",
    "on_unknown_batch",
    "plan",
    "reducer",
    "source",
    "watch",
    "step_hook",
    "_batch",
    "_delivery",
    "origin",
)
"""What a copy of an optimizer must not have: the account, the draws, the records, the processes."""


class AdaptiveClipDPOptimizer(DPOptimizer):
    """DP-Adam-AC around any ``torch.optim`` optimizer: an Opacus ``DPOptimizer`` that adapts its clipping norm.

    Usually built by :meth:`opacus_ac.PrivacyEngine.make_private`.

    Args:
        optimizer: inner optimizer (AdamW in the paper); it sees the released gradient.
        noise_multiplier: std of the noise over the joint sensitivity of all that a step releases.
        max_grad_norm: C0, the clipping norm of the first step.
        expected_batch_size: public denominator; needed for ``loss_reduction="mean"``.
        loss_reduction: "mean" or "sum" over the records of a batch, as the loss was computed.
        generator: CPU generator for tests; None draws the noise from the operating system's entropy.
        clip_policy: name of a policy (:data:`opacus_ac.clipping.table.POLICIES`) or a policy object.
        target_clip_rate: fraction of records to be clipped, for the policies that have a target.
        statistics: what is released beside the gradient; None for the policy's own needs.
        normalize: hand the inner optimizer the gradient scaled by C0 / C_t, so that a falling C does not shrink the
            steps of Adam, whose second moment remembers the larger noise of the past.
        lr_control: let the learning rate follow the clip rate.
        ema_decay: decay of the weight average; None for none.
        fused_step: release, apply and forget gradients in turns, so that no more of them are held at a time than the
            largest one takes; needs an inner AdamW, Adam or SGD, and leaves no ``.grad`` behind.
        source: where per-sample gradients come from; None for Opacus's ``grad_sample``.
        plan: sampling plan of the private loader; None for a loop that samples by itself.
        stream: random stream of the noise, instead of ``generator``.
        allocation: weights of the parameters, by which their gradients are scaled for clipping and noise; None for 1.
        reducer: how the sums of several processes become one; None for one process.

    Attributes:
        released: what the last step released, a :class:`StepRelease`; safe to look at.
        private_nonfinite_records: how many records so far had a gradient that is not finite, and were left out. Private: it is
            there for debugging on data that need no protection, and is never saved.

    Guarantees:
        A step is one Gaussian mechanism of multiplier ``noise_multiplier`` over records; C, clip rate, learning-rate
        multiplier and EMA are functions of its releases. With ``clip_policy="raw_percentile"`` nothing is private.

    References:
        arXiv 2510.05288 (DP-Adam-AC); arXiv 1905.03871 (private quantiles).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float | None,
        loss_reduction: str = "mean",
        generator: torch.Generator | None = None,
        secure_mode: bool = False,
        clip_policy: str | ClipPolicy = "percentile",
        target_clip_rate: float = 0.9,
        statistics: StepStatistics | None = None,
        normalize: bool = True,
        lr_control: bool | ClipRateControl = True,
        ema_decay: float | None = 0.999,
        fused_step: bool = False,
        source: GradientSource | None = None,
        plan: SamplingPlan | None = None,
        stream: RandomStream | None = None,
        allocation: GroupWeights | None = None,
        reducer: Reducer | None = None,
        **kwargs: Any,
    ) -> None:
        if secure_mode and generator is not None:
            raise ValueError("generator with secure_mode=True: whoever knows its seed could remove the noise; give one")
        if fused_step and type(optimizer) not in ONE_BY_ONE:
            raise ValueError(
                f"fused_step=True updates one parameter at a time, which is known to be the same for AdamW, Adam and SGD "
                f"of torch.optim, not for {type(optimizer).__name__}: pass fused_step=False"
            )
        self.policy = build_policy(clip_policy, max_grad_norm, target_clip_rate, expected_batch_size)
        self.statistics = statistics or StepStatistics(
            histogram=self.policy.needs_histogram, **({} if allocation is None else allocation.statistics())
        )
        if self.policy.needs_histogram and not self.statistics.histogram:
            raise ValueError(f"clip_policy={self.policy.name!r} needs the norm histogram: histogram=True")
        if allocation is not None:
            allocation.check_statistics(self.statistics.groups)
        elif self.statistics.groups:
            raise ValueError(
                "statistics with groups need the noise allocation whose groups they are: pass allocation too"
            )
        if stream is None:
            stream = SecretStream(hardened=secure_mode) if generator is None else SeededStream(generator)
        self.reducer = reducer or LOCAL
        self.mechanism = GaussianMechanism(noise_multiplier, stream)
        self.mechanism.reducer = self.reducer
        # The parent assigns noise_multiplier and max_grad_norm, which are properties over mechanism and policy here.
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
            loss_reduction=loss_reduction,
            generator=generator,
            secure_mode=False,
            **kwargs,
        )
        self.policy.bound = min(max(self.policy.initial_bound, self.policy.min_norm), self.policy.max_norm)
        self.source = source or PerSampleSource(self.params, loss_reduction=loss_reduction)
        self.plan = plan
        self.allocation = allocation
        self.normalize = normalize
        self.fused_step = fused_step
        target = getattr(self.policy, "target_clip_rate", target_clip_rate)
        self.control = ClipRateControl(target) if lr_control is True else (lr_control or None)
        self.ema = None if ema_decay is None else WeightEMA(self.params, ema_decay)
        self.tape = LossTape()
        self.alone: RecordsAlone | None = None
        self.released: StepRelease | None = None
        self.current_event: Event | None = None
        self.charge: Callable[[Event | None], None] | None = None
        self.on_unknown_batch: Callable[[], None] = lambda: None
        self.steps_taken = 0
        self.private_nonfinite_records = 0
        self.watch: ModelWatch | None = None
        self._released = list(self.params)
        self._batch: LogicalBatch | None = None
        self._delivery: Delivery | None = None
        self.origin = Origin()
        self._is_copy = False

    # C and sigma have one owner each; Opacus's names (and its schedulers) read and write them through here.

    @property
    def max_grad_norm(self) -> float:
        """C of the step that comes next."""
        return self.policy.bound

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self.policy.bound = value

    @property
    def noise_multiplier(self) -> float:
        """Noise multiplier that an accountant may count on: 0 when the clip policy is not private."""
        return self.mechanism.noise_multiplier if self.policy.is_private else 0.0

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self.mechanism.noise_multiplier = value

    @property
    def sum_description(self) -> str:
        """What the sum that a step releases is, for reports."""
        if self.allocation is None:
            return "the sum of clipped gradients"
        return f"the sum of clipped gradients, scaled by public weights ({self.allocation.allocation.source})"

    @property
    def accumulated_iterations(self) -> int:
        """Number of backward passes since the last step."""
        return self.source.backward_passes

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Refuse ``torch.amp.GradScaler``, which asks for this before it decides whether to call :meth:`step`.

        It skips a step whose gradients overflow, and halves its scale: both follow private gradients without noise.
        """
        raise ValueError(
            "torch.amp.GradScaler cannot be used: whether it skips a step, and its scale, depend on private gradients. Train "
            "in bfloat16 autocast, which needs no scaler (bf16=True), or in float32"
        )

    def signal_skip_step(self, do_skip: bool = True) -> None:
        """Note, as Opacus does, whether the next physical batch is one that others of its logical batch follow."""
        super().signal_skip_step(do_skip)
        if self.plan is not None:
            self.plan.split(last=not do_skip)

    def record_losses(self, losses: Tensor) -> None:
        """Give the records' losses ``[B]`` of the batch in hand, for the noisy loss of the release."""
        self.tape.record(losses)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear per-sample and ordinary gradients, and, unless a logical batch is under way, the clipped sums."""
        self.source.clear(sums=not self._is_last_step_skipped)
        if not self._is_last_step_skipped:
            self.reducer.clear()
        self.original_optimizer.zero_grad(set_to_none=True)
        unused = self.origin.gradients_cleared()
        if isinstance(self.source, PerSampleSource):
            self.source.mark()
            if unused:  # they may be of a backward pass that an exception ended
                self.source.forget_interrupted()

    # ---------------------------------------------------------------- which batch

    def see(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Note which batch a forward pass of the model runs on; a hook before it."""
        if not self._measures():
            return
        if isinstance(self.source, PerSampleSource) and not all(p.requires_grad for p in self._released):
            raise ValueError(
                "parameters were frozen after make_private, which Opacus's hooks do not follow: use grad_sample_mode='bk', where layers may "
                "take turns, or call engine.detach(model) and make_private again"
            )
        if isinstance(self.source, PerSampleSource) and self.origin.given_up():
            self.source.forget_interrupted()
        another = self.plan is None or self.origin.enter(self.plan, (args, kwargs))
        if self.watch is not None:
            if another:
                self.watch.end()  # the model was the caller's since a pass that no backward pass followed
            self.watch.begin()

    def seen(self, output: Any) -> None:
        """Note the output of a forward pass; a hook after it, with None where it failed."""
        if self._measures():
            self.origin.leave(output)

    def _measures(self) -> bool:
        """Whether a forward pass now is one whose gradients a step may use."""
        return torch.is_grad_enabled()

    def _look_away(self) -> None:
        """Forget what was seen: what comes next belongs to another physical batch."""
        self.origin.forget()
        if self.watch is not None:
            self.watch.end()

    def _is_skipped(self, delivery: Delivery | None) -> bool:
        """Return whether more physical batches of the logical one follow, as the draw says, or Opacus's signals.

        Raises:
            ValueError: the signals would join batches that were drawn each for itself.
        """
        signalled = self._check_skip_next_step(pop_next=False)
        if delivery is None or self.plan is None:
            if signalled and self.plan is not None:
                raise ValueError(
                    "a part of a logical batch is of unknown origin, so nothing tells whether a record is in it twice. Take the "
                    "batches from the loader that make_private returned, or from BatchMemoryManager around it, each once"
                )
            return signalled
        if signalled and delivery.draw.last and not delivery.split:
            raise ValueError(
                "signal_skip_step() would join this batch with the next one, which is drawn for itself: a record in both would count "
                "twice. Choose the batch_size of the loader, and max_physical_batch_size in make_private"
            )
        return not delivery.draw.last

    # ---------------------------------------------------------------- clipping

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip and count the batch in hand; on the last physical batch account for the step and release it.

        A physical batch is added whole or not at all: what fails before the release begins takes it out again, so that it can be
        tried again. What fails later, or between two physical batches, kills the logical batch.
        """
        self.clip_and_accumulate()
        delivery, batch = self._delivery, self._batch
        assert batch is not None
        try:
            skip = self._is_skipped(delivery)
            if not skip:
                self._account(None if delivery is None else delivery.draw)
        except BaseException:
            self._withdraw()
            raise
        self._check_skip_next_step()  # the signal has been followed
        if delivery is not None:
            delivery.used = True
        if skip:
            self._settle()
            self._is_last_step_skipped = True
            self._look_away()
            return False
        self._is_last_step_skipped = False
        batch.advance(RELEASED)
        try:
            self.add_noise()
        except BaseException:
            self._drop()
            raise
        return True

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients and the statistics of the batch in hand to those of its logical batch."""
        if self._is_copy:
            raise ValueError(
                "this is a copy of a private optimizer, whose steps nobody would account for: step the optimizer that make_private returned"
            )
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
            self._die_together()
            raise
        self._delivery = delivery
        before = self.statistics.sums()
        try:
            self._add_records(draw, norms, losses)
        except BaseException as error:
            # Part of the batch may be in the sums: were it retried, its records would count twice.
            self.source.withdraw()
            self.statistics.restore(before)
            if isinstance(error, Exception):
                self._die_together()
            raise
        assert self._batch is not None
        self._before = before
        self._batch.parts += 1

    def _withdraw(self) -> None:
        """Take the physical batch in hand out of its logical batch again: its release has not begun."""
        assert self._batch is not None
        self.source.withdraw()
        self.statistics.restore(self._before)
        self._batch.parts -= 1
        if self._batch.state == CHARGED:
            self._batch.advance(OPEN)

    def _drop(self) -> None:
        """Give up the logical batch that is open, with all of its sums."""
        if self._batch is not None:
            self._batch.kill()
        self._batch = None
        self._is_last_step_skipped = False
        self.statistics.finish()
        self.source.clear(sums=True)
        self.reducer.clear()

    def _weights(self) -> list[float] | None:
        """Return the public weights of the parameters, by which the release is scaled; None for 1."""
        return None if self.allocation is None else self.allocation.weights

    def _terms(self) -> Terms:
        """Return what has to stay as it is while a logical batch is open."""
        weights = self._weights()
        return Terms(
            max_grad_norm=self.policy.bound,
            noise_multiplier=self.mechanism.noise_multiplier,
            weights=None if weights is None else tuple(weights),
            trained=tuple(p.requires_grad for p in self._released),
        )

    def _check_outside(self) -> None:
        """Refuse what would move weights without a release: gradients, parameters and changes that no sum knows."""
        known = {id(p) for p in self._private_parameters()}
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad == (id(parameter) in known) and (
                    parameter.requires_grad or parameter.grad is None
                ):
                    continue
                if not parameter.requires_grad and parameter.grad is None:
                    continue  # frozen since
                what = "has a gradient that was not clipped" if parameter.grad is not None else "is trained now"
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} in group {number} of the optimizer{self._name_of(parameter)} {what}, and is "
                    "not among those that the private step trains, so that no release covers it. Freeze it and clear its "
                    "gradient, or call engine.detach(model) and make_private again with all that is to be trained"
                )
        if self.watch is not None:
            self.watch.check()

    def _name_of(self, parameter: torch.nn.Parameter) -> str:
        name = None if self.watch is None else self.watch.name_of(parameter)
        return "" if name is None else f" ({name})"

    def _private_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that a release may move."""
        return self._released

    def _settle(self) -> None:
        """Turn the physical batch into sums before the next one comes."""
        try:
            self.reducer.settle(self.source)
        except BaseException:
            self._drop()  # some parameters have the records in their sums, others not
            raise

    def _add_records(self, draw: Draw | None, norms: Tensor, losses: Tensor | None) -> None:
        """Add the records of a physical batch to the sums of the open logical batch."""
        if self.origin.is_stand_in or (draw is not None and draw.records == 0):
            # The stand-in for an empty batch: it must leave no trace in any sum.
            self.source.accumulate(torch.zeros_like(norms))
            return
        if self.statistics.loss_bound is None:
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
                f"{type(self.policy).__name__}.factors left a gradient longer than C = {self.policy.bound:g}, or gave no finite factor "
                "per record: nothing was released. opacus_ac.testing.policies.check_clip_policy says which"
            )
        self.statistics.check_kept(norms.numpy(), (kept.abs() / self.policy.bound).numpy())
        return factors

    def _check_records(self, draw: Draw | None, norms: Tensor) -> None:
        """Refuse per-sample gradients that are not one per record of the batch that the loader handed out."""
        if self.plan is None or draw is None:
            if self.source.merged_passes:
                raise ValueError(
                    "several forward passes of the model went into one backward pass, and without a batch of the "
                    "private loader nothing tells whether their records are the same. Call backward() after each "
                    "forward pass, or take the batches from the loader that make_private returned"
                )
            if self.plan is not None and self.source.backward_passes > 1:
                raise ValueError(
                    "several backward passes went into one step, and without a batch of the private loader nothing tells whether "
                    "a record is in them twice. Take one step for every backward pass"
                )
            return
        if draw.records and norms.shape[0] != draw.records:
            raise ValueError(
                "the backward pass has another number of per-sample gradients than the loader's batch has records: "
                "records were left out, or parts of the batch went through the model one after the other, which adds "
                "their gradients up pairwise. Pass each batch through the model whole; use max_physical_batch_size"
            )

    def _continues(self, delivery: Delivery | None) -> bool:
        """Whether the batch in hand belongs to the logical batch that is open."""
        batch = self._batch
        if batch is None or batch.state != OPEN or not self.statistics.started:
            return False
        if delivery is None:
            return batch.key is None and self._is_last_step_skipped
        return batch.key == delivery.draw.batch

    def _begin(self, delivery: Delivery | None) -> None:
        """Go on with the logical batch that is open, or open another one, dropping what an interrupted one left behind."""
        part = 0 if delivery is None else delivery.draw.part
        if self._continues(delivery):
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
            raise ValueError(
                "the physical batches before this one are not in the sums of their logical batch any more: a step failed, or a batch was left "
                "out. Nothing of it was released; go on with the next batch of the loader, until a new logical batch begins"
            )
        # Its records may be drawn again: adding them to the next batch would count one record twice.
        for p in self._released:
            p.summed_grad = None
        self.reducer.clear()
        self._batch = None
        self.statistics.begin(self.policy.bound, self.policy.true_share)
        self._batch = LogicalBatch(None if delivery is None else delivery.draw.batch, self._terms())

    def _give_up(self) -> None:
        """Kill the open logical batch before its records in hand are touched."""
        if self._batch is not None:
            self._batch.kill()
        self._batch = None
        self._is_last_step_skipped = False
        self.statistics.finish()

    def _die_together(self) -> None:
        """Let the other processes know that this one takes no part in the release that they are about to meet for."""
        delivery = self.plan.in_hand if self.plan is not None else None
        if self.reducer.world > 1 and (delivery is None or delivery.draw.last):
            report_failure(self.reducer, self.statistics, len(self._shared_constants(None)))

    def _account(self, draw: Draw | None) -> None:
        """Charge the step before anything of it is released."""
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
        if self.step_hook:
            self.step_hook(self)
        batch.check(self._terms())

    def _shared_constants(self, draw: Draw | None) -> dict[str, float]:
        """Return what must be the same to the last bit on all ranks, by name."""
        return {
            "max_grad_norm": self.policy.bound,
            "noise_multiplier": self.mechanism.noise_multiplier,
            "learning-rate multiplier": 1.0 if self.control is None else self.control.multiplier,
            "expected batch size": 0.0 if draw is None else draw.expected_batch_size,
        }

    def _denominator(self) -> float:
        """Return the public expected batch size of the step."""
        if self._draw is not None:
            return self._draw.expected_batch_size
        if self.expected_batch_size is None:
            return 1.0
        return float(self.expected_batch_size) * self.accumulated_iterations

    def add_noise(self) -> None:
        """Release the step, scaled: the only place where private sums become public values."""
        bound, statistics = self.policy.bound, self.statistics
        multiplier = self.mechanism.gradient_multiplier(statistics)
        std, scale = multiplier * bound, self._gradient_scale()
        weights = self._weights()
        stds = [std] * len(self._released) if weights is None else [std / w for w in weights]
        self._noise = (
            {id(p): s for p, s in zip(self._released, stds, strict=True)},
            scale,
            scale * self._denominator(),
        )
        if not self.fused_step:
            trained, source = self._trained()
            own = std if weights is None else [self._noise[0][id(p)] for p in trained]
            self.reducer.release(source, self.mechanism.noise(trained, own, scale))
        histogram, loss, profile = self.mechanism.release_statistics(statistics, self._denominator())
        statistics.finish()
        self.steps_taken += 1
        self.released = StepRelease(
            step=self.steps_taken,
            max_grad_norm=bound,
            noise_multiplier=self.noise_multiplier,
            gradient_noise_multiplier=multiplier,
            sample_rate=1.0 if self._draw is None else self._draw.sample_rate,
            expected_batch_size=self._denominator(),
            clip_rate=None if histogram is None else histogram.fraction_above(bound),
            loss=loss,
            lr_multiplier=1.0 if self.control is None else self.control.multiplier,
            histogram=histogram,
            profile=profile,
        )

    def _trained(self) -> tuple[list[torch.nn.Parameter], Source]:
        """Return the parameters that this release moves, and where their sums come from: the frozen ones get no noise."""
        trained = [p for p in self._released if p.requires_grad]
        if len(trained) == len(self._released):
            return trained, self.source
        return trained, OnlyTrained(self.source, self._released)

    def _gradient_scale(self) -> float:
        """Return one over the public batch size, times C0 / C_t when ``normalize`` is set."""
        factor = self.policy.initial_bound / self.policy.bound if self.normalize else 1.0
        return factor / self._denominator() if self.loss_reduction == "mean" else factor

    def scale_grad(self) -> None:
        """Do nothing: :meth:`add_noise` scales the gradients as it writes them, and Opacus's method would do it again."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a private step, or, on all but the last physical batch of a logical one, only accumulate.

        A step whose own release shows, among the first three, that C was far too large serves to find C: it is
        charged like any other, but the inner optimizer does not see its gradient, which is mostly noise.

        Raises:
            ValueError: gradients are missing, not per-sample, or not cleared since the last step.
            PrivacyBudgetExceeded: the step would exceed the target budget; nothing was released.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        return self._finish_step() if self.pre_step() else None

    def _finish_step(self) -> float | None:
        """Let everything that follows releases follow the one just made."""
        assert self.released is not None
        assert self._batch is not None
        try:
            self.policy.update(self.released)
            searching = self._agree()
            if self.plan is not None:
                self.plan.step = self.steps_taken
            result = None if searching else self._apply_release()
            if searching and self.fused_step:
                self.source.clear(sums=True)
            self._batch.advance(APPLIED)
        except BaseException:
            self._drop()
            raise
        finally:
            self.origin.forget()
        if self.watch is not None:
            self.watch.check_applied()
        return result

    def _apply_release(self) -> float | None:
        """Let the inner optimizer, and all that follows releases, move by what was released."""
        assert self.released is not None
        with self._controlled_learning_rate():
            result: float | None = None
            if self.fused_step:
                self._fused_inner_step()
            else:
                trained, _ = self._trained()
                self._announce(trained, [p.grad for p in trained])
                result = self.original_optimizer.step()
        if self.control is not None:
            self.control.update(self.policy.clip_rate(self.released))
        if self.allocation is not None:
            self.allocation.observe_profile(self.released.profile)
            self.allocation.update()
        if self.ema is not None:
            self.ema.update()
        return result

    def _agree(self) -> bool:
        """Return whether the step serves to find C only, which the ranks agree on, as on C and the learning rate.

        All have the same release; should their arithmetic differ in the last bit, that of rank 0 counts.
        """
        if self.reducer.world == 1:
            return self.policy.searching
        multiplier = 1.0 if self.control is None else self.control.multiplier
        agreed = self.reducer.agree(np.array([self.policy.bound, self.policy.searching, multiplier]))
        self.policy.bound, searching, multiplier = agreed.tolist()
        if self.control is not None:
            self.control.multiplier = multiplier
        return bool(searching)

    def _fused_inner_step(self) -> None:
        """Release gradients into one reused buffer and let the inner optimizer apply what is in it, time after time."""
        (stds, scale, _), weights = self._noise, self._weights()

        def release(parameters: list[torch.nn.Parameter], totals: list[Tensor]) -> None:
            std = [stds[id(p)] for p in parameters]
            self.mechanism.noise_in_place(totals, std[0] if weights is None else std, scale)
            self._announce(parameters, totals)

        trained, source = self._trained()
        applying = FusedStep(self.original_optimizer, trained, release)
        for parameter, total in zip(trained, source.sums(applying.place), strict=True):
            applying.add(parameter, total)
        applying.flush()

    def _announce(self, parameters: list[torch.nn.Parameter], gradients: list[Any]) -> None:
        """Show released gradients to the allocation, and tell an inner optimizer that asks the std of their noise."""
        stds, scale, unit = self._noise
        found = [stds[id(p)] * scale for p in parameters]
        if self.allocation is not None:
            self.allocation.observe(parameters, gradients, found, unit)
        tell = getattr(self.original_optimizer, "noise_std", None)
        if tell is not None:
            for parameter, std in zip(parameters, found, strict=True):
                tell(parameter, std)

    @contextmanager
    def _controlled_learning_rate(self) -> Iterator[None]:
        """Multiply the learning rates for the length of the inner step; schedulers keep seeing their own."""
        multiplier = 1.0 if self.control is None else self.control.multiplier
        base = [group["lr"] for group in self.param_groups]
        if multiplier != 1.0:
            for group in self.param_groups:
                group["lr"] = group["lr"] * multiplier
        try:
            yield
        finally:
            for group, lr in zip(self.param_groups, base, strict=True):
                group["lr"] = lr

    def ema_weights(self) -> Any:
        """Return a context in which the model has the averaged weights; without an EMA nothing changes."""
        return nullcontext() if self.ema is None else self._averaged(self.ema)

    @contextmanager
    def _averaged(self, ema: WeightEMA) -> Iterator[None]:
        try:
            with ema.applied():
                self.reducer.refresh()
                yield
        finally:
            self.reducer.refresh()

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state and, under ``"opacus_ac"``, the state of the private step.

        The noise stream is saved only when it was seeded for a test; a secret stream never is.
        """
        return {**self.original_optimizer.state_dict(), STATE_KEY: private_state(self)}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptiveClipDPOptimizer:
        """Return a copy that holds weights and state but takes no step: nobody would account for it."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            copied.__dict__[name] = None if name in _NOT_COPIED else copy.deepcopy(value, memo)
        copied.reducer, copied._is_copy, copied.origin = LOCAL, True, Origin()
        copied.on_unknown_batch = lambda: None
        return copied

    def check_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the private part of ``state_dict`` if it fits this optimizer.

        Raises:
            ValueError: it is missing, of another version, or of an optimizer built with other settings.
        """
        return check_private_state(self, state_dict.get(STATE_KEY))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; refuses a state that does not fit before changing anything."""
        state = self.check_state_dict(state_dict)
        self.original_optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != STATE_KEY})
        load_private_state(self, state)
