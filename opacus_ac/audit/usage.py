"""Usage audit: whatever a loop does with the loader, its releases are charged for what they are, or refused."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from opacus_ac.audit.canary import describe
from opacus_ac.audit.cases import model_task
from opacus_ac.audit.neighbours import TOLERANCE, moves
from opacus_ac.audit.replay import REFUSED, Run, charges, replay
from opacus_ac.audit.result import AuditResult, Finding
from opacus_ac.audit.scripts import SCRIPTS, Script

Charges = Counter[tuple[float, float]]
"""How often each (noise multiplier, sample rate) was charged."""

RATE = 0.25


def due(run: Run, moved: list[float], noise_multiplier: float, rate: float) -> Charges:
    """Return what the releases of a run cost at least.

    A release from one fresh draw costs its sampling rate. A release has no amplification if its records are known to
    have been used, or come from several draws. If a record is in it k times, its noise is k times smaller.
    """
    found: Charges = Counter()
    for number, release in enumerate(run.releases):
        times = max(1, math.ceil(moved[number] - TOLERANCE)) if number < len(moved) else 1
        found[noise_multiplier / times, rate if release.fresh and times == 1 else 1.0] += 1
    return found


def covered(needed: Charges, charged: Charges, rate: float) -> bool:
    """Whether what was charged covers what was due: every step, and the unamplified ones as such."""

    def certain(events: Charges) -> float:
        return sum(steps / noise**2 for (noise, r), steps in events.items() if r >= 1 and noise > 0)

    enough = sum(steps for (_, r), steps in charged.items() if r >= rate * (1 - 1e-12)) >= sum(needed.values())
    loudest, allowed = (max((noise for noise, r in e if r < 1), default=math.inf) for e in (charged, needed))
    as_loud = loudest <= allowed or loudest == math.inf
    return enough and as_loud and certain(charged) >= certain(needed) * (1 - 1e-12)


def epsilon_at_least(events: Charges, delta: float) -> float:
    """Return a lower bound of the epsilon of Poisson-subsampled Gaussian steps, by Opacus's own numerical accountant.

    References:
        Gopi, Lee and Wutschitz 2021 (arXiv 2106.02848).
    """
    return _composed(tuple(sorted(events.items())), delta) if events else 0.0


@lru_cache(maxsize=64)
def _composed(events: tuple[tuple[tuple[float, float], int], ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise, rate, steps) for (noise, rate), steps in events]
    with np.errstate(divide="ignore"):  # a rate of 1 has losses without a lower end
        composed = accountant._get_dprv(eps_error=0.02, delta_error=delta / 1000)
    lower, _, _ = composed.compute_epsilon(delta, delta / 1000, 0.02)
    return max(0.0, float(lower))


def account_finding(
    check: str,
    engine: Any,
    needed: Charges,
    rate: float,
    delta: float,
    *,
    replayed: Charges | None = None,
    more: str = "",
) -> Finding:
    """Return whether an engine's account covers what was due.

    Args:
        check: name of the finding.
        engine: the engine.
        needed: what was due.
        rate: sampling rate of an amplified step.
        delta: of the epsilons.
        replayed: what the privacy ledger says, where there is one.
        more: what else to show.
    """
    charged, least = charges(engine), epsilon_at_least(needed, delta)
    try:
        said, told = float(engine.get_epsilon(delta)), ""
    except REFUSED as error:
        said, told = math.nan, f"; no report: {str(error).splitlines()[0][:90]}"
    bad = not covered(needed, charged, rate) or not said >= least
    steps = f"{sum(charged.values())} charges, {sum(n for (_, r), n in charged.items() if r >= 1)} at rate 1"
    if replayed is not None and not covered(needed, replayed, rate):
        bad, steps = True, f"{steps}, {sum(replayed.values())} on disk"
    unamplified = sum(n for (_, r), n in needed.items() if r >= 1)
    claim = f"{sum(needed.values())} releases, {unamplified} of them unamplified: epsilon >= {least:.3f}"
    return Finding(
        check, claim, f"{steps}: epsilon {said:.3f}{told}{more}", bad, None if math.isnan(said) else said, least
    )


def usage_audit(
    engine: Callable[..., Any] | None = None,
    *,
    noise_multiplier: float = 1.0,
    delta: float = 1e-5,
    seed: int | None = None,
    scripts: Iterable[Script] = SCRIPTS,
    **settings: Any,
) -> AuditResult:
    """Audit the account: run the ways in which people use a loader, and compare each release with the charges.

    Each way of use (:data:`~opacus_ac.audit.scripts.SCRIPTS`) runs twice under the same noise, with a record in every
    draw and without it. The auditor counts releases, knows which come from one fresh draw, and sees by how much the
    record moves them. Account, privacy ledger and reported epsilon have to cover that. A way of use that is refused
    passes, unless it is an ordinary one. The least epsilon is computed by Opacus's PRV accountant.

    Args:
        engine: makes the engine, given ``ledger=path``; ``PrivacyEngine`` by default.
        noise_multiplier: z, the claim; passed on.
        delta: delta of the epsilons.
        seed: seed of noise and draws.
        scripts: the ways of use.
        **settings: of ``make_private``.

    Guarantees:
        Nothing is left to chance: an account that covers every release is not refuted.

    Raises:
        ValueError: If an ordinary way of use, or a setting, was refused.
    """
    if engine is None:
        from opacus_ac.engine.privacy_engine import PrivacyEngine

        engine = PrivacyEngine
    if not noise_multiplier > 0:
        raise ValueError(f"noise_multiplier must be > 0 to have a claim to audit, got {noise_multiplier!r}")
    settings = {"noise_multiplier": noise_multiplier, **settings}
    findings, observations = [], 0
    for script in scripts:
        if not script.fits(settings):
            continue
        finding, seen = _play(engine, script, delta, seed or 0, settings)
        findings.append(finding)
        observations += seen
    described = {k: v for k, v in settings.items() if k != "noise_multiplier"}
    return AuditResult(
        audit="account of what a loop does",
        subject=describe(noise_multiplier, described),
        observations=observations,
        confidence=1.0,
        delta=delta,
        findings=tuple(findings),
        notes=("what is refused passes, if it is not the ordinary use",),
    )


def _play(
    engine: Callable[..., Any], script: Script, delta: float, seed: int, settings: dict[str, Any]
) -> tuple[Finding, int]:
    task = model_task("no coupling")
    outside = replay(engine, task, script.play, [False], seed=seed, rate=RATE, **settings)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger.jsonl"
        inside = replay(lambda: engine(ledger=ledger), task, script.play, [True], seed=seed, rate=RATE, **settings)
        if inside.refused is not None and script.ordinary:
            raise ValueError(inside.refused)
        moved = moves(inside, outside)
        more = f"; a record counts up to {max(moved):.3g} times" if moved else ""
        if inside.refused is not None:
            more += f"; refused: {inside.refused.splitlines()[0][:90]}"
        needed = due(inside, moved, settings["noise_multiplier"], RATE)
        # Another engine reads what the next run on these data would know.
        replayed = charges(engine(ledger=ledger))
        found = account_finding(script.name, inside.engine, needed, RATE, delta, replayed=replayed, more=more)
    return found, len(inside.releases)
