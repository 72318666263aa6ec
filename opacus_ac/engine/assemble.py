"""The private optimizer of one job, from its parts; nothing is attached to the model."""

from __future__ import annotations

from opacus_ac.distributed.reducers import Reducer
from opacus_ac.engine.parts import (
    Job,
    choose_allocation,
    choose_control,
    choose_policy,
    choose_source,
    choose_statistics,
)
from opacus_ac.engine.zeroth_order import build_zeroth_order
from opacus_ac.noise.streams import RandomStream
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.sampling.loader import PrivateDataLoader
from opacus_ac.zeroth_order.settings import ZerothOrderSettings


def build_optimizer(
    job: Job,
    settings: ZerothOrderSettings | None,
    loader: PrivateDataLoader,
    stream: RandomStream,
    reducer: Reducer,
    secure: bool,
) -> AdaptiveClipDPOptimizer:
    """Return the optimizer that ``job`` describes.

    Args:
        job: the arguments.
        settings: those of ``clipping="zo"``; None for training with gradients.
        loader: where the batches come from.
        stream: of the noise.
        reducer: the processes.
        secure: whether sums are exact.

    Raises:
        ValueError: options that contradict each other, or that have no exact implementation.
    """
    if settings is not None:
        return build_zeroth_order(job, settings, loader.plan, stream, reducer)
    options = job.options
    expected = loader.plan.sizes.expected(0)
    policy = choose_policy(job.clipping, options.clipping, job.max_grad_norm, expected)
    allocation = choose_allocation(job.module, job.optimizer, options.release.noise_allocation)
    return AdaptiveClipDPOptimizer(
        job.optimizer,
        noise_multiplier=job.noise_multiplier,
        max_grad_norm=policy.initial_bound,
        expected_batch_size=expected,
        loss_reduction=job.loss_reduction,
        clip_policy=policy,
        target_clip_rate=options.clipping.target_clip_rate,
        statistics=choose_statistics(job.clipping, policy, job.noise_multiplier, expected, options.release, allocation),
        normalize=options.update.normalize and options.clipping.preset is None,
        lr_control=choose_control(options.update.lr_control, policy, options.clipping),
        ema_decay=options.update.ema_decay,
        fused_step=options.performance.fused_step,
        source=choose_source(job, loader.users, secure),
        plan=loader.plan,
        stream=stream,
        allocation=allocation,
        reducer=reducer,
    )
