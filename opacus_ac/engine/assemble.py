"""The private optimizer of one job, from its parts; nothing is attached to the model."""

from __future__ import annotations

from typing import Any

from opacus_ac.distributed.reducers import Reducer
from opacus_ac.engine.parts import (
    Job,
    choose_allocation,
    choose_control,
    choose_policy,
    choose_source,
    choose_statistics,
)
from opacus_ac.noise.streams import RandomStream
from opacus_ac.optimizer.method import by_gradients
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.sampling.loader import PrivateDataLoader
from opacus_ac.zeroth_order.optimizer import ZerothOrderDPOptimizer


def build_optimizer(
    job: Job, loader: PrivateDataLoader, stream: RandomStream, reducer: Reducer, secure: bool
) -> AdaptiveClipDPOptimizer:
    """Return the optimizer that ``job`` describes.

    Args:
        job: the arguments.
        loader: where the batches come from.
        stream: random stream of the noise.
        reducer: the processes.
        secure: whether sums are exact.

    Raises:
        ValueError: If options contradict each other, or have no exact implementation.
    """
    options = job.options
    expected = loader.plan.sizes.expected(0)
    policy = choose_policy(job, expected)
    allocation = choose_allocation(job)
    parts: dict[str, Any] = {
        "noise_multiplier": job.noise_multiplier,
        "max_grad_norm": policy.initial_bound,
        "expected_batch_size": expected,
        "loss_reduction": job.loss_reduction,
        "clip_policy": policy,
        "target_clip_rate": options.clipping.target_clip_rate,
        "statistics": choose_statistics(job, policy, expected, allocation),
        "normalize": options.update.normalize and options.clipping.preset is None,
        "lr_control": choose_control(job, policy),
        "plan": loader.plan,
        "stream": stream,
        "reducer": reducer,
    }
    settings = job.zeroth_order
    if settings is not None:
        single = options.performance.max_physical_batch_size == 1 and settings.precision != "float64"
        return ZerothOrderDPOptimizer(job.optimizer, module=job.module, settings=settings, single=single, **parts)
    return AdaptiveClipDPOptimizer(
        job.optimizer,
        method=by_gradients(job.optimizer, choose_source(job, loader.users, secure)),
        allocation=allocation,
        ema_decay=options.update.ema_decay,
        fused_step=options.performance.fused_step,
        **parts,
    )
