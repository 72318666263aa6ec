"""What ``make_private(clipping="zo")`` checks and builds."""

from __future__ import annotations

from dataclasses import replace

from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.distributed.reducers import Reducer
from opacus_ac.engine.options import OPTIONS, PrivateOptions
from opacus_ac.engine.parts import Job, choose_control, choose_policy, choose_statistics
from opacus_ac.noise.streams import RandomStream
from opacus_ac.sampling.plan import SamplingPlan
from opacus_ac.zeroth_order.checks import check_not_random
from opacus_ac.zeroth_order.optimizer import ZerothOrderDPOptimizer
from opacus_ac.zeroth_order.settings import ZerothOrderSettings, _resolution

_REMEDIES = {
    "ema_decay": "give ZerothOrderSettings(ema_decay=...)",
    "preset": 'name the paper in zeroth_order="..."',
}


def _check_unused(mode: str, options: PrivateOptions) -> None:
    """Raise ``ValueError`` for an argument that means nothing without gradients."""
    values = {
        "preset": options.clipping.preset,
        "fused_step": options.performance.fused_step,
        "ema_decay": options.update.ema_decay,
        "noise_allocation": options.release.noise_allocation,
    }
    found = {name: value for name, value in values.items() if value not in (None, OPTIONS[name].default)}
    if mode != "bk":
        found["grad_sample_mode"] = mode
    for name, value in found.items():
        raise ValueError(f"{name}={value!r} means nothing with clipping='zo': {_REMEDIES.get(name, 'leave it out')}")


def build_zeroth_order(
    job: Job, settings: ZerothOrderSettings, plan: SamplingPlan, stream: RandomStream, reducer: Reducer
) -> ZerothOrderDPOptimizer:
    """Return the optimizer of ``clipping="zo"``; nothing is attached to the model.

    Raises:
        ValueError: an argument that means nothing here, a model in training mode with dropout, a sharded one, or a setting that
            would make the guarantee wrong.
    """
    options, clipping = job.options, job.options.clipping
    _check_unused(job.grad_sample_mode, options)
    check_not_random(job.module)
    if clipping.clip_policy is None and settings.mechanism == "laplace":
        clipping = replace(clipping, clip_policy="fixed")
    expected = plan.sizes.expected(0)
    policy = choose_policy("adaptive", clipping, job.max_grad_norm, expected)
    if not isinstance(clipping.clip_policy, ClipPolicy):
        policy.min_norm = max(policy.min_norm, min(_resolution(settings), policy.initial_bound))
    return ZerothOrderDPOptimizer(
        job.optimizer,
        module=job.module,
        settings=settings,
        noise_multiplier=job.noise_multiplier,
        max_grad_norm=policy.initial_bound,
        expected_batch_size=expected,
        loss_reduction=job.loss_reduction,
        clip_policy=policy,
        target_clip_rate=clipping.target_clip_rate,
        statistics=choose_statistics(
            "adaptive" if policy.needs_histogram else "flat", policy, job.noise_multiplier, expected, options.release
        ),
        normalize=options.update.normalize,
        lr_control=choose_control(options.update.lr_control, policy, clipping),
        plan=plan,
        stream=stream,
        reducer=reducer,
        single=options.performance.max_physical_batch_size == 1 and settings.precision != "float64",
    )
