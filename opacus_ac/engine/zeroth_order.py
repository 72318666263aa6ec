"""What means nothing without gradients."""

from __future__ import annotations

from opacus_ac.engine.options import OPTIONS
from opacus_ac.engine.parts import Job

_REMEDIES = {
    "ema_decay": "give ZerothOrderSettings(ema_decay=...)",
    "preset": 'name the paper in zeroth_order="..."',
}


def check_unused(job: Job) -> None:
    """Check that nothing was asked for that means nothing without gradients.

    Raises:
        ValueError: If something was.
    """
    options = job.options
    values = {
        "preset": options.clipping.preset,
        "fused_step": options.performance.fused_step,
        "ema_decay": options.update.ema_decay,
        "noise_allocation": options.release.noise_allocation,
    }
    found = {name: value for name, value in values.items() if value not in (None, OPTIONS[name].default)}
    if job.grad_sample_mode != "bk":
        found["grad_sample_mode"] = job.grad_sample_mode
    for name, value in found.items():
        raise ValueError(f"{name}={value!r} means nothing with zeroth_order: {_REMEDIES.get(name, 'leave it out')}")
