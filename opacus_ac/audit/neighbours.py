"""Neighbour audits: how far one record moves a release, measured under one noise, and what else it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from opacus_ac.audit.canary import describe
from opacus_ac.audit.cases import MODELS, POISONS, model_task, poison_task
from opacus_ac.audit.replay import Run, replay
from opacus_ac.audit.result import AuditResult, Finding
from opacus_ac.audit.scripts import Loop
from opacus_ac.audit.task import Task

TOLERANCE = 1e-3
"""Share of C that rounding may add, here that of weights in float32 from which the sum is read."""

PRESENT = (True, False, True, False)
"""The record is in every second draw, so that what it leaves for the next batch is seen apart."""


def new_engine() -> Any:
    """Return the engine that is audited by default."""
    from opacus_ac.engine.privacy_engine import PrivacyEngine

    return PrivacyEngine()


def a_few_steps(loop: Loop) -> None:
    """Take a step on each of the first four draws."""
    steps = 0
    while steps < len(PRESENT):
        for batch in loop.loader:
            loop.step(batch)
            steps = loop.steps
            if steps == len(PRESENT):
                return


def moves(inside: Run, outside: Run) -> list[float]:
    """Return by how much the record moves each release, in units of the joint sensitivity."""
    found = []
    for one, other in zip(inside.releases, outside.releases, strict=False):
        hidden = one.searching or other.searching
        gradient = 0.0 if hidden else float(np.linalg.norm(one.total - other.total))
        moved = math.hypot(gradient, float(np.linalg.norm(one.statistics - other.statistics)))
        found.append(moved / inside.optimizer.statistics.sensitivity if math.isfinite(moved) else math.inf)
    return found


def left_behind(inside: Run, outside: Run) -> list[str]:
    """Return the names of what else differs after a step with the record."""
    return sorted(
        {
            name
            for one, other in zip(inside.releases, outside.releases, strict=False)
            for name, value in one.leftovers.items()
            if other.leftovers.get(name) != value
        }
    )


def _random_apart_from_public(build: Callable[[], Any], task: Task, outside: Run, seed: int, settings: Any) -> bool:
    """Whether the forward pass' own randomness comes from a secret place: equal public generators do not decide it."""

    def again(public_seed: int) -> Run:
        return replay(build, task, a_few_steps, [False], seed=seed, public_seed=public_seed, **settings)

    same, other = moves(again(0), outside), moves(again(1), outside)
    return max(same, default=0.0) > TOLERANCE or max(other, default=0.0) <= TOLERANCE


def neighbour_finding(
    name: str, build: Callable[[], Any], task: Task, seed: int, settings: dict[str, Any], may_refuse: bool
) -> tuple[Finding, int]:
    """Return what a record of ``task`` moves, and how many releases were compared.

    Raises:
        ValueError: If something was refused that may not be refused.
    """
    inside, outside = (
        replay(build, task, a_few_steps, present, seed=seed, **settings) for present in (PRESENT, [False])
    )
    refused = inside.refused or outside.refused
    if refused is not None and not may_refuse:
        raise ValueError(refused)
    found = moves(inside, outside)
    present = [release.present for release in inside.releases][: len(found)]
    within = max((m for m, there in zip(found, present, strict=True) if there), default=0.0)
    after = max((m for m, there in zip(found, present, strict=True) if not there), default=0.0)
    left = left_behind(inside, outside)
    bad = within > 1 + TOLERANCE or after > TOLERANCE or bool(left)
    shown = f"moves its steps by {within:.3g}, others by {after:.2g}" if found else "nothing was released"
    if left:
        shown += f"; leaves its mark on {', '.join(left)}"
    elif bad and task.public_randomness and _random_apart_from_public(build, task, outside, seed, settings):
        bad, shown = False, f"{shown}, as masks do that follow no public generator"
    if refused is not None:
        shown += f"; refused: {refused.splitlines()[0][:90]}"
    claim = "at most 1 in its steps, 0 in others"
    return Finding(name, claim, shown, bad, statistic=max(within, after)), len(found)


def _audit(
    audit: str,
    names: Iterable[str],
    make: Callable[[str], Task],
    engine: Callable[[], Any] | None,
    seed: int | None,
    settings: dict[str, Any],
    note: str,
) -> AuditResult:
    settings = {"noise_multiplier": 1.0, **settings}
    findings, observations = [], 0
    for number, name in enumerate(names):
        finding, seen = neighbour_finding(name, engine or new_engine, make(name), seed or 0, settings, number > 0)
        findings.append(finding)
        observations += seen
    described = {k: v for k, v in settings.items() if k != "noise_multiplier"}
    return AuditResult(
        audit, describe(settings["noise_multiplier"], described), observations, 1.0, 0.0, tuple(findings), (note,)
    )


def poison_audit(engine: Callable[[], Any] | None = None, *, seed: int | None = None, **settings: Any) -> AuditResult:
    """Audit what the worst record adds: huge, tiny, not a number, positions that cancel.

    The same steps run with the record and without it, on the same other records and under the same noise. So the
    difference of two releases is exactly what the record adds: gradient and statistics together, in units of the joint
    sensitivity.

    Args:
        engine: makes the engine whose ``make_private`` is audited; ``PrivacyEngine`` by default.
        seed: seed of noise and draws.
        **settings: of ``make_private``.

    Guarantees:
        Nothing is left to chance: a step that clips every record to C is not refuted.

    Raises:
        ValueError: If ``make_private`` refuses the settings.
    """
    note = "in units of the joint sensitivity; with the record and without it under the same noise"
    return _audit("poisoned records", POISONS, poison_task, engine, seed, settings, note)


def coupling_audit(engine: Callable[[], Any] | None = None, *, seed: int | None = None, **settings: Any) -> AuditResult:
    """Audit models in which a record moves others, or something that outlasts its step: they are right, or refused.

    As :func:`poison_audit`. Frozen weights, buffers and the generators of torch and numpy are compared as well. The
    record is in every second step, and may move no other.

    Args:
        engine: as in :func:`poison_audit`.
        seed: seed of noise and draws.
        **settings: of ``make_private``.

    Raises:
        ValueError: If ``make_private`` refuses the settings for the model that couples nothing.
    """
    note = "a model that is refused passes; one that couples nothing must not be refused"
    return _audit("models that couple records", MODELS, model_task, engine, seed, settings, note)
