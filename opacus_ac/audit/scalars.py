"""Leak test of the released scalars: with the batches fixed, each must follow the noise and must not show a record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from scipy import special

from opacus_ac.audit.bounds import gaussian_epsilon, mu_from_errors
from opacus_ac.audit.canary import MakePrivate, describe, private_parts
from opacus_ac.audit.result import AuditResult, Finding, check_confidence
from opacus_ac.audit.streams import FixedDraws, public_generators, seed_public_generators
from opacus_ac.audit.task import CanaryTask, endless
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.release.values import FloatArray

Scalars = dict[tuple[int, str], float]
"""Value of each scalar, by step (from 1) and name."""


def released_scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield (name, value) of every number inside a released object, None as NaN.

    Raises:
        TypeError: If something is neither a number nor made of numbers: a leak in it would go unseen.
    """
    if value is None:
        yield name, math.nan
    elif isinstance(value, Real):
        yield name, float(value)
    elif is_dataclass(value):
        for part in fields(value):
            yield from released_scalars(f"{name}.{part.name}" if name else part.name, getattr(value, part.name))
    elif isinstance(value, np.ndarray | torch.Tensor | list | tuple):
        for i, inner in enumerate(np.asarray(value, dtype=np.float64).reshape(-1)):
            yield f"{name}[{i}]", float(inner)
    else:
        raise TypeError(f"the release holds {name} of type {type(value).__name__}, which the leak test cannot read")


def _one_run(
    make_private: MakePrivate | None,
    task: CanaryTask,
    inside: bool,
    steps: int,
    seed: int | None,
    settings: dict[str, Any],
) -> Scalars:
    """Train for ``steps`` and return everything that was released beside the weights."""
    _, model, optimizer, loader = private_parts(
        make_private, task, task.size // 2, seed, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), **settings
    )
    loader.batch_sampler.stream = FixedDraws(1, {task.canaries[0]: inside})  # type: ignore[union-attr]
    found: Scalars = {}
    for batch in endless(loader):
        seed_public_generators(0)
        before = optimizer.steps_taken
        task.step(model, batch, optimizer)
        if optimizer.steps_taken > before:
            found.update({(optimizer.steps_taken, name): value for name, value in _after_step(optimizer)})
            if optimizer.steps_taken == steps:
                return found
    raise AssertionError("unreachable")


def _after_step(optimizer: AdaptiveClipDPOptimizer) -> Iterator[tuple[str, float]]:
    """Yield what a step makes public: its release, and what steers the next step."""
    yield from released_scalars("", optimizer.released)
    yield "next max_grad_norm", float(optimizer.max_grad_norm)
    yield "next lr_multiplier", 1.0 if optimizer.control is None else float(optimizer.control.multiplier)


def _table(runs: list[Scalars]) -> tuple[list[tuple[int, str]], FloatArray]:
    """Return (keys, values ``[runs, keys]``), with finite stand-ins for infinite and missing values."""
    keys = sorted(runs[0])
    values = np.array([[run[key] for key in keys] for run in runs])
    return keys, np.nan_to_num(values, nan=-1e300, posinf=1e300, neginf=-1e299)


def _threshold(ins: FloatArray, outs: FloatArray) -> tuple[float, float]:
    """Return (threshold, sign) of the best test ``sign * value > threshold`` on these values."""
    cuts = np.unique(np.concatenate([ins, outs]))
    middles = (cuts[:-1] + cuts[1:]) / 2 if cuts.size > 1 else cuts
    advantage = (ins[:, None] > middles).mean(0) - (outs[:, None] > middles).mean(0)
    best = int(np.abs(advantage).argmax())
    sign = 1.0 if advantage[best] >= 0 else -1.0
    return float(middles[best]) * sign, sign


def _readable(ins: FloatArray, outs: FloatArray, alpha: float) -> float:
    """Return a lower bound of mu for telling the two apart: a threshold from the first half, errors from the second."""
    half = ins.size // 2
    threshold, sign = _threshold(ins[:half], outs[:half])
    ins, outs = sign * ins[half:], sign * outs[half:]
    return mu_from_errors(int((outs > threshold).sum()), outs.size, int((ins <= threshold).sum()), ins.size, alpha)


def scalar_audit(
    make_private: MakePrivate | None = None,
    *,
    noise_multiplier: float = 1.0,
    runs: int = 100,
    steps: int = 3,
    confidence: float = 0.999,
    delta: float = 1e-5,
    seed: int | None = None,
    task: CanaryTask | None = None,
    **settings: Any,
) -> AuditResult:
    """Audit every number that a step releases beside its gradient, and what follows from it.

    The same few steps run many times, with a record in every batch and without it; all other records and all batches
    are the same each time, and the global generators of torch, numpy and Python are seeded alike before every step, so
    only the secret noise differs. A number that never follows the noise but follows the record is a leak; of the
    others, each is tried as a test for the record. New fields of the release are read without being named here.

    Args:
        make_private: as in :func:`~opacus_ac.audit.canary_audit`.
        noise_multiplier: z, the claim; passed on.
        runs: runs with the record, and as many without.
        steps: steps of each run.
        confidence: of the verdict, over all scalars of all steps together.
        delta: delta of the epsilons.
        seed: first noise seed, for a run that can be repeated; None audits the secret streams.
        task: data and model; by default 63 records and a canary, with a noisy loss in the release.
        **settings: of ``make_private``.

    Returns:
        Two findings about the scalars that follow the record but not the noise, and the scalar that shows the record
        best, beside the claim of all the steps up to its own (mu = sqrt(t) / z).

    Guarantees:
        A mechanism that does what it claims is refuted with probability at most ``1 - confidence``.

    Raises:
        ValueError: If there are too few runs, or ``make_private`` refuses the settings.
        TypeError: If the release holds something that cannot be read.
    """
    alpha = check_confidence(confidence) / 2
    if runs < 20 or steps < 1:
        raise ValueError(f"the leak test needs runs >= 20 and steps >= 1, got {runs!r} and {steps!r}")
    if not noise_multiplier > 0:
        raise ValueError(f"noise_multiplier must be > 0 to have a claim to audit, got {noise_multiplier!r}")
    task = task or CanaryTask()
    settings = {"loss_bound": 5.0, "noise_multiplier": noise_multiplier, **settings}
    with public_generators():
        found = [
            _one_run(make_private, task, i % 2 == 0, steps, None if seed is None else seed + i, settings)
            for i in range(2 * runs)
        ]
    keys, values = _table(found)
    ins, outs = values[::2], values[1::2]
    alpha_each = alpha / len(keys)
    mus = {key: math.sqrt(key[0]) / noise_multiplier for key in keys}
    return AuditResult(
        audit="released scalars",
        subject=describe(noise_multiplier, {k: v for k, v in settings.items() if k != "noise_multiplier"}),
        observations=2 * runs,
        confidence=confidence,
        delta=delta,
        findings=(
            _constant_finding(keys, ins, outs, mus, alpha_each),
            _readable_finding(keys, ins, outs, mus, alpha_each, delta),
        ),
    )


def _constant_finding(
    keys: list[tuple[int, str]], ins: FloatArray, outs: FloatArray, mus: dict[tuple[int, str], float], alpha: float
) -> Finding:
    """Return which scalars follow the record but not the noise.

    Runs that all say the same with the record and all say something else without it have, under mu-Gaussian DP, at
    most the probability ``Phi(mu / 2) ** (2 runs)``.
    """
    still = (ins == ins[0]).all(0) & (outs == outs[0]).all(0)
    follows = still & (ins[0] != outs[0])
    certain = np.array([float(special.log_ndtr(mus[key] / 2)) * 2 * len(ins) < math.log(alpha) for key in keys])
    leaks = [f"{name} of step {step}" for (step, name), bad in zip(keys, follows & certain, strict=True) if bad]
    counts = f"{int((~still).sum())} follow the noise, {int((still & ~follows).sum())} are constants"
    shown = counts if not leaks else f"{len(leaks)} do not: {', '.join(leaks[:4])}{', ...' if len(leaks) > 4 else ''}"
    return Finding("scalars follow the noise", f"all {len(keys)}, or public constants", shown, bool(leaks))


def _readable_finding(
    keys: list[tuple[int, str]],
    ins: FloatArray,
    outs: FloatArray,
    mus: dict[tuple[int, str], float],
    alpha: float,
    delta: float,
) -> Finding:
    """Return the scalar that shows the record furthest beyond its claim."""
    shown = {key: _readable(ins[:, i], outs[:, i], alpha) for i, key in enumerate(keys)}
    worst = max(keys, key=lambda key: shown[key] - mus[key])
    claim, epsilon = gaussian_epsilon(mus[worst], delta), gaussian_epsilon(shown[worst], delta)
    return Finding(
        "record readable from a scalar",
        f"epsilon <= {claim:.3f} after step {worst[0]} (mu = {mus[worst]:.3f})",
        f"epsilon >= {epsilon:.3f} (mu >= {shown[worst]:.3f}) from {worst[1]}",
        shown[worst] > mus[worst],
        claim,
        epsilon,
    )
