"""What ``make_private(clipping="zo")`` checks and builds."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.distributed.reducers import Reducer
from opacus_ac.engine.parts import choose_control, choose_policy, choose_statistics
from opacus_ac.noise.streams import RandomStream
from opacus_ac.sampling.plan import SamplingPlan
from opacus_ac.zeroth_order.checks import check_not_random
from opacus_ac.zeroth_order.optimizer import ZerothOrderDPOptimizer
from opacus_ac.zeroth_order.settings import ZerothOrderSettings, _resolution


def build_zeroth_order(
    module: nn.Module,
    optimizer: Optimizer,
    settings: ZerothOrderSettings,
    plan: SamplingPlan,
    stream: RandomStream,
    *,
    noise_multiplier: float,
    max_grad_norm: float | None,
    clip_policy: str | ClipPolicy | None,
    target_clip_rate: float,
    loss_reduction: str,
    normalize: bool,
    lr_control: bool,
    histogram_weight: float | None,
    loss_bound: float | None,
    loss_weight: float | None,
    reducer: Reducer,
    max_physical_batch_size: int | None,
    unused: dict[str, Any],
) -> ZerothOrderDPOptimizer:
    """Return the optimizer of ``clipping="zo"``; nothing is attached to the model.

    Raises:
        ValueError: an argument that means nothing here (``unused``), a model in training mode with dropout, a sharded one, or a
            setting that would make the guarantee wrong.
    """
    nothing = {
        "preset": (None,),
        "fused_step": (False,),
        "ema_decay": (0.999, None),
        "mode": ("bk",),
        "noise_allocation": (None,),
    }
    remedies = {
        "ema_decay": "give ZerothOrderSettings(ema_decay=...)",
        "preset": 'name the paper in zeroth_order="..."',
    }
    for name, value in unused.items():
        if value not in nothing[name]:
            shown = {"mode": "grad_sample_mode"}.get(name, name)
            raise ValueError(
                f"{shown}={value!r} means nothing with clipping='zo': {remedies.get(name, 'leave it out')}"
            )
    check_not_random(module)
    if clip_policy is None and settings.mechanism == "laplace":
        clip_policy = "fixed"
    expected = plan.sizes.expected(0)
    policy = choose_policy("adaptive", clip_policy, None, max_grad_norm, target_clip_rate, expected)
    if not isinstance(clip_policy, ClipPolicy):
        policy.min_norm = max(policy.min_norm, min(_resolution(settings), policy.initial_bound))
    return ZerothOrderDPOptimizer(
        optimizer,
        module=module,
        settings=settings,
        noise_multiplier=noise_multiplier,
        max_grad_norm=policy.initial_bound,
        expected_batch_size=expected,
        loss_reduction=loss_reduction,
        clip_policy=policy,
        target_clip_rate=target_clip_rate,
        statistics=choose_statistics(
            "adaptive" if policy.needs_histogram else "flat",
            policy,
            noise_multiplier,
            expected,
            histogram_weight,
            loss_bound,
            loss_weight,
        ),
        normalize=normalize,
        lr_control=choose_control(lr_control, policy, target_clip_rate, None),
        plan=plan,
        stream=stream,
        reducer=reducer,
        single=max_physical_batch_size == 1 and settings.precision != "float64",
    )
