"""Clip policies by name."""

from __future__ import annotations

from opacus_ac.clipping.paper import RawPercentilePolicy
from opacus_ac.clipping.percentile import PercentilePolicy
from opacus_ac.clipping.policy import AutomaticPolicy, ClipPolicy, GeometricPolicy

POLICIES: dict[str, type[ClipPolicy]] = {
    policy.name: policy
    for policy in (ClipPolicy, AutomaticPolicy, GeometricPolicy, PercentilePolicy, RawPercentilePolicy)
}
"""Name -> class of every policy that ``clip_policy=`` takes by name."""


def build_policy(
    policy: str | ClipPolicy, max_grad_norm: float, target_clip_rate: float, expected_batch_size: float | None
) -> ClipPolicy:
    """Return the policy named ``policy``, or ``policy`` itself when it is an object.

    A percentile policy remembers 10 steps, or 20 where batches are so small that 10 are too noisy.

    Raises:
        ValueError: If the name is unknown, or a bound or target is out of range.
    """
    if isinstance(policy, ClipPolicy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"unknown clip_policy {policy!r}: choose one of {', '.join(sorted(POLICIES))}")
    if policy == "percentile":
        window = 20 if expected_batch_size is not None and expected_batch_size < 128 else 10
        return PercentilePolicy(max_grad_norm, target_clip_rate=target_clip_rate, window=window)
    if policy == "geometric":
        return GeometricPolicy(max_grad_norm, target_clip_rate=target_clip_rate)
    if policy == "raw_percentile":
        return RawPercentilePolicy(max_grad_norm, target_clip_rate=target_clip_rate)
    return POLICIES[policy](max_grad_norm)
