"""Independence audit: noise of one step must tell nothing about that of another, or of another tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opacus_ac.audit.canary import MakePrivate, describe, observe_noise, private_parts
from opacus_ac.audit.noise import independence_findings, spread_finding
from opacus_ac.audit.published import Published
from opacus_ac.audit.result import AuditResult, check_confidence
from opacus_ac.audit.streams import FixedDraws
from opacus_ac.audit.task import CanaryTask, endless
from opacus_ac.release.values import FloatArray

CHECKS = 4


def noise_audit(
    make_private: MakePrivate | None = None,
    *,
    noise_multiplier: float = 1.0,
    steps: int = 400,
    confidence: float = 0.999,
    delta: float = 1e-5,
    seed: int | None = None,
    task: CanaryTask | None = None,
    **settings: Any,
) -> AuditResult:
    """Audit whether the noise is drawn afresh: for every step, tensor and entry.

    Each step alone can be private while the run is not. If the noise cancels that of the step before, its spread is
    right at every step, but the average of two releases shows the sum. The noise of each step is the release less the
    exact sum, as in :func:`~opacus_ac.audit.canary_audit`. With ``zeroth_order=``, it is the release of steps on empty
    batches (of at most 8 directions, where a paper is named).

    Args:
        make_private: as in :func:`~opacus_ac.audit.canary_audit`.
        noise_multiplier: z, the claim; passed on.
        steps: number of observed steps.
        confidence: of the verdict, all checks together.
        delta: is only named in the result.
        seed: seed of noise and sampling for a run that can be repeated; None audits the secret streams.
        task: data and model; by default 63 records and a canary.
        **settings: of ``make_private``.

    Returns:
        Four findings about the spread of every tensor's noise, its correlation with the noise of the steps before, the
        two steps whose noise is most alike, and the correlation within a step.

    Guarantees:
        Independent Gaussian noise is refuted with probability at most ``1 - confidence``.

    Raises:
        ValueError: If there are too few steps, there is no noise, or ``make_private`` refuses the settings.
    """
    alpha = check_confidence(confidence) / CHECKS
    if steps < 50:
        raise ValueError(f"steps must be at least 50 for a correlation that says anything, got {steps!r}")
    if not noise_multiplier > 0:
        raise ValueError(f"noise_multiplier must be > 0 to have noise to audit, got {noise_multiplier!r}")
    task = task or CanaryTask()
    arguments = {"noise_multiplier": noise_multiplier, **settings}
    if settings.get("zeroth_order") is not None:
        noise = {"coefficients": _empty_steps(make_private, task, steps, seed, arguments)}
    else:
        noise = observe_noise(make_private, task, steps, seed, arguments)
    return AuditResult(
        audit="noise over steps",
        subject=describe(noise_multiplier, settings),
        observations=steps,
        confidence=confidence,
        delta=delta,
        findings=(spread_finding(noise, alpha), *independence_findings(noise, alpha)),
    )


def _empty_steps(
    make_private: MakePrivate | None, task: CanaryTask, steps: int, seed: int | None, settings: dict[str, Any]
) -> FloatArray:
    """Return what steps without any record release, ``[T, D]`` in units of the claimed std."""
    bare, model, optimizer, loader = private_parts(
        make_private, task, task.size // 2, seed, lambda m: torch.optim.SGD(m.parameters(), lr=1.0), **settings
    )
    loader.batch_sampler.stream = FixedDraws(0, dict.fromkeys(range(task.size), False))  # type: ignore[union-attr]
    std, published = settings["noise_multiplier"] * optimizer.statistics.sensitivity, Published(bare, optimizer)
    found: list[FloatArray] = []
    for batch in endless(loader):
        published.before_step()
        task.step(model, batch, optimizer)
        if not optimizer.policy.searching:  # such a step keeps its sum to itself
            found.append(published.read() / std)
        if len(found) == steps:
            break
    return np.array(found)
