"""The job of one ``make_private``, and the parts that its options choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from opacus_ac._validate import not_negative, one_of
from opacus_ac.allocation.settings import NoiseAllocation
from opacus_ac.allocation.weights import GroupWeights
from opacus_ac.budget.accountants import AccountantAdapter
from opacus_ac.clipping.paper import paper_policy
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.clipping.table import build_policy
from opacus_ac.engine.checks import check_together
from opacus_ac.engine.options import PrivateOptions, SamplingOptions
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.grad_sample.opacus_hooks import PerSampleSource
from opacus_ac.grad_sample.source import GradientSource
from opacus_ac.noise.streams import RandomStream, noise_stream
from opacus_ac.optimizer.auto_adam import AutoAdam
from opacus_ac.optimizer.lr_control import ClipRateControl
from opacus_ac.optimizer.parameters import named_parameters
from opacus_ac.release.statistics import DEFAULT_WEIGHT, StepStatistics, default_histogram_weight
from opacus_ac.sampling.plan import SAMPLING
from opacus_ac.sampling.users import UserRows
from opacus_ac.zeroth_order.settings import ZerothOrderSettings

MODES = ("bk", "hooks", "functorch")
CLIPPING = ("adaptive", "flat", "automatic")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one call of ``make_private`` asks for: the arguments of Opacus by name, the others in ``options``."""

    module: nn.Module
    optimizer: Optimizer
    """The inner one."""
    noise_multiplier: float
    max_grad_norm: float | None
    batch_first: bool
    loss_reduction: str
    clipping: str
    noise_generator: torch.Generator | None
    grad_sample_mode: str
    wrap_model: bool
    options: PrivateOptions
    zeroth_order: ZerothOrderSettings | None
    """Settings of the forward-only method; None for training with gradients."""
    sampling: str
    """How batches are drawn, as ``poisson_sampling`` and the option say together."""

    def __post_init__(self) -> None:
        one_of(MODES, grad_sample_mode=self.grad_sample_mode)
        one_of(CLIPPING, clipping=self.clipping)
        one_of(("mean", "sum"), loss_reduction=self.loss_reduction)
        not_negative(noise_multiplier=self.noise_multiplier)

    def check_together(self, **others: Any) -> None:
        """Check that the settings go together, with each other and with settings that the engine adds.

        Raises:
            ValueError: If two of them do not.
        """
        options, policy = self.options, self.options.clipping.clip_policy
        groups = (options.clipping, options.release, options.sampling, options.update, options.performance)
        settings = {name: value for group in groups for name, value in vars(group).items()} | vars(self) | others
        settings["clip_policy"] = getattr(policy, "name", policy)
        settings["inner_optimizer"] = "AutoAdam" if isinstance(self.optimizer, AutoAdam) else "another"
        settings["mechanism"] = "gaussian" if self.zeroth_order is None else self.zeroth_order.mechanism
        check_together(settings)


def random_streams(generator: torch.Generator | None, secure_mode: bool) -> tuple[RandomStream, RandomStream]:
    """Return the streams of noise and of sampling."""
    noise = noise_stream(generator, secure_mode)
    return noise, noise.fork(1)


def choose_sampling(options: SamplingOptions, poisson_sampling: bool, accountant: AccountantAdapter) -> str:
    """Return the kind of sampling that the arguments of ``make_private`` describe.

    Raises:
        ValueError: If the kind is unknown, the arguments do not go together, or the accountant has no bound for it.
    """
    sampling = options.sampling or ("poisson" if poisson_sampling else "shuffled")
    one_of(SAMPLING, sampling=sampling)
    check_together({**vars(options), "sampling": sampling, "poisson_sampling": poisson_sampling})
    accountant.check_sampling(sampling)
    return sampling


def loader_settings(options: SamplingOptions) -> dict[str, Any]:
    """Return the keyword arguments of ``private_loader`` that the options determine, beside the kind of sampling."""
    return {
        "schedule": options.batch_size_schedule,
        "max_batch_size": options.max_batch_size,
        "dataset_size": options.dataset_size,
        "max_rows_per_user": options.max_rows_per_user,
    }


def choose_policy(job: Job, expected_batch_size: float) -> ClipPolicy:
    """Return the clip policy that the arguments of ``make_private`` describe."""
    options, clipping, settings = job.options.clipping, job.clipping, job.zeroth_order
    named, paper = options.clip_policy, options.preset is not None
    if isinstance(named, ClipPolicy):
        return named
    if paper:
        bound = 3.0 if job.max_grad_norm is None else job.max_grad_norm
        return paper_policy(named or "percentile", bound, expected_batch_size)
    # A Laplace release has no room for a histogram.
    usual = "percentile" if settings is None or settings.mechanism == "gaussian" else "fixed"
    name = {"flat": "fixed", "automatic": "automatic"}.get(clipping) or named or usual
    bound = 1.0 if job.max_grad_norm is None else job.max_grad_norm
    policy = build_policy(name, bound, options.target_clip_rate, expected_batch_size)
    if settings is not None:
        policy.min_norm = max(policy.min_norm, min(settings.resolution, policy.initial_bound))
    return policy


def choose_control(job: Job, policy: ClipPolicy) -> ClipRateControl | bool:
    """Return the learning-rate control; the paper's reads each clip rate as it is."""
    options = job.options.clipping
    if not job.options.update.lr_control:
        return False
    target = getattr(policy, "target_clip_rate", options.target_clip_rate)
    return ClipRateControl(target, smoothing=0.9 if options.preset is None else 0.0)


def choose_statistics(
    job: Job, policy: ClipPolicy, expected_batch_size: float, allocation: GroupWeights | None
) -> StepStatistics:
    """Return what a step releases beside the gradient.

    "flat" and "automatic" release the gradient alone, with exactly the noise of Opacus, unless a loss or a paid noise
    allocation is asked for. A policy that reads un-noised norms needs no histogram, and neither does a forward-only
    step with a fixed C.
    """
    options = job.options.release
    shown = policy.is_private if job.zeroth_order is None else policy.needs_histogram
    weight = options.histogram_weight
    if weight is None:
        weight = default_histogram_weight(job.noise_multiplier, expected_batch_size)
    return StepStatistics(
        histogram=job.clipping == "adaptive" and shown,
        histogram_weight=weight,
        loss_bound=options.loss_bound,
        loss_weight=DEFAULT_WEIGHT if options.loss_weight is None else options.loss_weight,
        **({} if allocation is None else allocation.statistics()),
    )


def choose_allocation(job: Job) -> GroupWeights | None:
    """Return the weights that the run starts with; None for equal ones."""
    noise_allocation = job.options.release.noise_allocation
    if noise_allocation is None:
        return None
    if not isinstance(noise_allocation, NoiseAllocation):
        raise ValueError(
            f"noise_allocation={noise_allocation!r} is no NoiseAllocation: from opacus_ac.allocation import "
            "NoiseAllocation"
        )
    return GroupWeights(noise_allocation, *named_parameters(job.module, job.optimizer))


def choose_source(job: Job, users: UserRows | None = None, secure: bool = False) -> GradientSource:
    """Return where norms and clipped sums come from, in secure mode exact ones. Nothing is attached yet."""
    parameters, names = named_parameters(job.module, job.optimizer)
    count = None if users is None else users.drawn
    if job.grad_sample_mode != "bk":
        return PerSampleSource(parameters, names, job.loss_reduction, count, exact_sums=secure)
    return BookKeepingSource(job.module, parameters, names, job.loss_reduction, count, exact_sums=secure)
