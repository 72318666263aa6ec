"""The private optimizer: Opacus's names over the private and the public side of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from opacus_ac.accounting import Event
from opacus_ac.allocation.weights import GroupWeights
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.clipping.table import build_policy
from opacus_ac.distributed.reducers import LOCAL, Reducer
from opacus_ac.grad_sample.alone.records import RecordsAlone
from opacus_ac.grad_sample.source import GradientSource
from opacus_ac.noise.streams import RandomStream, noise_stream
from opacus_ac.optimizer.delegated import Of
from opacus_ac.optimizer.ema import WeightEMA, average_of
from opacus_ac.optimizer.fused import checked
from opacus_ac.optimizer.loss_tape import LossTape
from opacus_ac.optimizer.lr_control import ClipRateControl, choose_control
from opacus_ac.optimizer.measurement import Measurement
from opacus_ac.optimizer.method import Method, by_gradients
from opacus_ac.optimizer.model_watch import ModelWatch
from opacus_ac.optimizer.origin import Origin
from opacus_ac.optimizer.private_side import PrivateSide
from opacus_ac.optimizer.public_side import PublicSide
from opacus_ac.optimizer.state import STATE_KEY, check_private_state, load_private_state, private_state
from opacus_ac.optimizer.torch_hooks import TorchHooks
from opacus_ac.protocols.part import Part
from opacus_ac.release.mechanism import GaussianMechanism
from opacus_ac.release.statistics import StepStatistics
from opacus_ac.release.values import StepRelease
from opacus_ac.sampling.plan import SamplingPlan

_PARTS = ("policy", "mechanism", "statistics", "control", "ema", "plan", "allocation")


class AdaptiveClipDPOptimizer(TorchHooks, DPOptimizer):
    """DP-Adam-AC around any ``torch.optim`` optimizer: an Opacus ``DPOptimizer`` that adapts its clipping norm.

    Usually built by :meth:`opacus_ac.PrivacyEngine.make_private`.

    Args:
        optimizer: inner optimizer (AdamW in the paper); it sees the released gradient.
        noise_multiplier: ratio of the noise's standard deviation to the L2 sensitivity of the release.
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
        method: how records are measured and weights moved; None for Opacus's ``grad_sample`` and the inner optimizer.
        plan: sampling plan of the private loader; None for a loop that samples by itself.
        stream: random stream of the noise, instead of ``generator``.
        allocation: weights of the parameters, by which their gradients are scaled for clipping and noise; None for 1.
        reducer: how the sums of several processes become one; None for one process.

    Attributes:
        released: what the last step released, a :class:`StepRelease`; safe to look at.
        private_nonfinite_records: how many records so far had a gradient that is not finite, and were left out.
            Private: it is there for debugging on data that need no protection, and is never saved.

    Guarantees:
        A step is one Gaussian mechanism of multiplier ``noise_multiplier`` over records; C, clip rate, learning-rate
        multiplier and EMA are functions of its releases. With ``clip_policy="raw_percentile"`` nothing is private.

    References:
        arXiv 2510.05288 (DP-Adam-AC); arXiv 1905.03871 (private quantiles).
    """

    # What the two sides keep.
    policy = Of[ClipPolicy]("_private")
    statistics = Of[StepStatistics]("_private")
    mechanism = Of[GaussianMechanism]("_private")
    reducer = Of[Reducer]("_private")
    measurement = Of[Measurement]("_private")
    source = Of[GradientSource]("_private")
    plan = Of[SamplingPlan | None]("_private")
    allocation = Of[GroupWeights | None]("_private")
    normalize = Of[bool]("_private")
    fused_step = Of[bool]("_private")
    tape = Of[LossTape]("_private")
    alone = Of[RecordsAlone | None]("_private")
    watch = Of[ModelWatch | None]("_private")
    origin = Of[Origin]("_private")
    charge = Of[Callable[[Event | None], None] | None]("_private")
    look_ahead = Of[Callable[[Event], None]]("_private")
    on_unknown_batch = Of[Callable[[], None]]("_private")
    current_event = Of[Event | None]("_private")
    released = Of[StepRelease | None]("_private")
    steps_taken = Of[int]("_private")
    private_nonfinite_records = Of[int]("_private")
    control = Of[ClipRateControl | None]("_public")
    ema = Of[WeightEMA | None]("_public")

    # Opacus assigns these under its own names.
    loss_reduction = Of[str]("_private")
    expected_batch_size = Of[float | None]("_private")
    _step_skip_queue = Of[list[bool]]("_private", "skip_signals")
    _is_last_step_skipped = Of[bool]("_private", "is_last_skipped")

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
        method: Method | None = None,
        plan: SamplingPlan | None = None,
        stream: RandomStream | None = None,
        allocation: GroupWeights | None = None,
        reducer: Reducer | None = None,
        **kwargs: Any,
    ) -> None:
        measurement, update = method or by_gradients(optimizer, None, loss_reduction)
        policy = build_policy(clip_policy, max_grad_norm, target_clip_rate, expected_batch_size)
        control = choose_control(lr_control, policy, target_clip_rate)
        shared: Any = {"policy": policy, "control": control, "allocation": allocation, "reducer": reducer or LOCAL}
        self._private = PrivateSide(
            measurement, statistics=measurement.statistics(statistics, policy, allocation), normalize=normalize,
            mechanism=measurement.mechanism(noise_multiplier, stream or noise_stream(generator, secure_mode)),
            fused_step=checked(fused_step, optimizer), expected_batch_size=expected_batch_size, plan=plan,
            groups=lambda: optimizer.param_groups, loss_reduction=loss_reduction, **shared,
        )  # fmt: skip
        self._public = PublicSide(optimizer, update=update, ema=average_of(measurement.moved, ema_decay), **shared)
        super().__init__(
            optimizer, noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, generator=generator,
            expected_batch_size=expected_batch_size, loss_reduction=loss_reduction, secure_mode=False, **kwargs,
        )  # fmt: skip
        policy.begin()

    def _call_step_hook(self) -> None:
        """Call the hook that accountants attach, between charge and noise."""
        if self.step_hook:
            self.step_hook(self)

    def attach_step_hook(self, fn: Callable[[AdaptiveClipDPOptimizer], None]) -> None:
        """Attach an accountant's hook, which is called between charge and noise.

        Raises:
            ValueError: If the accountant takes the noise for another than it is.
        """
        self.mechanism.check_hook(fn)
        super().attach_step_hook(fn)

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
        return self._private.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self.mechanism.noise_multiplier = value

    @property
    def params(self) -> list[nn.Parameter]:
        """The trained parameters whose sums a step releases."""
        return [p for p in self._private.params if p.requires_grad]

    @property
    def forward_only(self) -> bool:
        """Whether a step needs no backward pass, and calls a closure itself."""
        return self.measurement.forward_only

    @property
    def parts(self) -> dict[str, Part | None]:
        """What the step is made of, by the names of the parts in a checkpoint; None for what was not asked for."""
        return {**{name: getattr(self, name) for name in _PARTS}, **self.measurement.further}

    @property
    def sum_description(self) -> str:
        """What the sum that a step releases is, for reports."""
        if self.allocation is None:
            return self.measurement.sum_description
        return f"{self.measurement.sum_description}, scaled by public weights ({self.allocation.allocation.source})"

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
            "torch.amp.GradScaler cannot be used: whether it skips a step, and its scale, depend on private gradients. "
            "Train in bfloat16 autocast, which needs no scaler (bf16=True), or in float32"
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
        if not self._private.is_copy:
            self._private.clear()
        self.original_optimizer.zero_grad(set_to_none=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer, which gives it the entries that its own groups have."""
        self.original_optimizer.add_param_group(param_group)

    def see(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        """Note which batch a forward pass of the model runs on; a hook before it."""
        self._private.see(module, args, kwargs)

    def seen(self, output: Any) -> None:
        """Note the output of a forward pass; a hook after it, with None where it failed."""
        self._private.seen(output)

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients and the statistics of the batch in hand to those of its logical batch."""
        self._private.clip_and_accumulate()

    def add_noise(self) -> None:
        """Release the step, scaled."""
        self._private.add_noise()

    def scale_grad(self) -> None:
        """Do nothing: :meth:`add_noise` scales the gradients already, and Opacus's method would do it again."""

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Clip and count the batch in hand, release the logical batch on its last one, and return whether it did."""
        return self._private.finish(self._call_step_hook) is not None

    def step(self, closure: Callable[[], Any] | None = None) -> float | None:
        """Take a private step, or, on all but the last physical batch of a logical one, only accumulate.

        A step whose own release shows, among the first three, that C was far too large serves to find C: it is
        charged like any other, but the inner optimizer does not see its gradient, which is mostly noise.

        Raises:
            ValueError: gradients are missing, not per-sample, or not cleared since the last step.
            PrivacyBudgetExceeded: the step would exceed the target budget; nothing was released.
        """
        self._private.measure(closure)
        return self._finish_step() if self.pre_step() else None

    def _finish_step(self) -> float | None:
        """Let everything that follows releases follow the one just made."""
        release, result = self._private.released, None
        assert release is not None
        with self._private.applying():
            searching = self._public.learn(release)
            self._private.go_on()
            self._run_before()
            if not searching:
                result = self._public.apply(release, self._private.gradients())
            elif self.fused_step:
                self.source.clear(sums=True)
            self._run_after()
        return result

    def ema_weights(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the averaged weights; without an EMA nothing changes."""
        return self._public.averaged_weights()

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
            if not name.startswith("_optimizer_"):  # torch's own copies have no hooks, either
                copied.__dict__[name] = None if name == "step_hook" else copy.deepcopy(value, memo)
        copied._share_hooks(copied.__dict__["original_optimizer"])
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
