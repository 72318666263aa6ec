"""The table of audits: what the command line runs, and how the chance of a false alarm is shared out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from opacus_ac.audit.canary import canary_audit
from opacus_ac.audit.neighbours import coupling_audit, poison_audit
from opacus_ac.audit.noise_audit import noise_audit
from opacus_ac.audit.one_run import one_run_audit
from opacus_ac.audit.result import AuditResult, check_confidence
from opacus_ac.audit.scalars import scalar_audit
from opacus_ac.audit.usage import usage_audit


@dataclass(frozen=True)
class Plan:
    """What is audited, and how long.

    Attributes:
        noise_multiplier: z, the claim.
        steps: observed steps of the canary audit; the noise audit takes two fifths of them.
        runs: runs of the leak test, each with and without the record.
        target_epsilon: epsilon of the one-run audit's training run.
        confidence: of all verdicts together.
        delta: delta of every epsilon.
        seed: for a run that can be repeated; None audits the secret streams.
        settings: of ``make_private``; None for its defaults.
    """

    noise_multiplier: float = 1.0
    steps: int = 1000
    runs: int = 100
    target_epsilon: float = 1.0
    confidence: float = 0.996
    delta: float = 1e-5
    seed: int | None = None
    settings: Mapping[str, Any] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings as a dictionary, empty without any."""
        return dict(self.settings or {})


@dataclass(frozen=True)
class Audit:
    """An audit of the table.

    Attributes:
        name: short name, for ``--only``.
        question: what it asks.
        run: asks it, with what confidence.
        tests: whether it decides by a statistical test, which may err; the other audits compare runs under the same
            noise and leave nothing to chance.
        forward_only: it can look at a method without a backward pass.
    """

    name: str
    question: str
    run: Callable[[Plan, float], AuditResult]
    tests: bool = True
    forward_only: bool = True


def _canary(plan: Plan, confidence: float) -> AuditResult:
    return canary_audit(steps=plan.steps, confidence=confidence, **_common(plan))


def _noise(plan: Plan, confidence: float) -> AuditResult:
    return noise_audit(steps=max(50, plan.steps * 2 // 5), confidence=confidence, **_common(plan))


def _scalars(plan: Plan, confidence: float) -> AuditResult:
    return scalar_audit(runs=plan.runs, confidence=confidence, **_common(plan))


def _one_run(plan: Plan, confidence: float) -> AuditResult:
    return one_run_audit(
        target_epsilon=plan.target_epsilon, confidence=confidence, delta=plan.delta, seed=plan.seed, **plan.arguments
    )


def _usage(plan: Plan, confidence: float) -> AuditResult:
    return usage_audit(**_common(plan))


def _poison(plan: Plan, confidence: float) -> AuditResult:
    return poison_audit(seed=plan.seed, noise_multiplier=plan.noise_multiplier, **plan.arguments)


def _coupling(plan: Plan, confidence: float) -> AuditResult:
    return coupling_audit(seed=plan.seed, noise_multiplier=plan.noise_multiplier, **plan.arguments)


def _common(plan: Plan) -> dict[str, Any]:
    return {
        "noise_multiplier": plan.noise_multiplier,
        "delta": plan.delta,
        "seed": plan.seed,
        **plan.arguments,
    }


AUDITS = (
    Audit("canary", "does a step show more of a record than it claims?", _canary, forward_only=False),
    Audit("noise", "is the noise drawn afresh for every step and entry?", _noise),
    Audit("scalars", "do the numbers beside the gradient follow the noise, or a record?", _scalars),
    Audit("one-run", "do the weights of a whole run tell which records it saw?", _one_run, forward_only=False),
    Audit("usage", "is every release charged, whatever the loop does?", _usage, tests=False),
    Audit("poison", "does the worst record add more than C?", _poison, tests=False),
    Audit("coupling", "does a record move others, or outlast its step?", _coupling, tests=False),
)


def chosen_audits(names: Iterable[str] | None, forward_only: bool) -> list[Audit]:
    """Return the audits of these names, all by default, that can look at the method.

    Raises:
        ValueError: If a name is not in the table, or no audit applies.
    """
    wanted = [audit.name for audit in AUDITS] if names is None else list(names)
    known = {audit.name: audit for audit in AUDITS}
    for name in wanted:
        if name not in known:
            raise ValueError(f"there is no audit {name!r}: choose from {', '.join(known)}")
    chosen = [known[name] for name in wanted if known[name].forward_only or not forward_only]
    if not chosen:
        raise ValueError(f"{', '.join(wanted)} cannot look at a method without a backward pass")
    return chosen


def run_audits(plan: Plan | None = None, names: Iterable[str] | None = None) -> list[AuditResult]:
    """Run audits of the table.

    Args:
        plan: what is audited, and how long.
        names: which audits; None for all that apply.

    Returns:
        One result per audit. All audits together refute correct code with probability at most ``1 - plan.confidence``:
        each audit that may err gets an equal share of it (Bonferroni).

    Raises:
        ValueError: If something cannot be audited.
    """
    plan = plan or Plan()
    audits = chosen_audits(names, plan.arguments.get("zeroth_order") is not None)
    alpha = check_confidence(plan.confidence) / max(1, sum(audit.tests for audit in audits))
    return [audit.run(plan, 1 - alpha) for audit in audits]
