"""One-run audit: many canaries, each in or out by a coin, and one training run from which the coins are guessed."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch

from opacus_ac.audit.bounds import guess_epsilon
from opacus_ac.audit.canary import describe
from opacus_ac.audit.guesses import Coins, number_of_guesses, right_guesses, tossed
from opacus_ac.audit.neighbours import new_engine
from opacus_ac.audit.result import AuditResult, Finding, check_confidence
from opacus_ac.audit.streams import WithoutRecords
from opacus_ac.audit.task import CanaryTask
from opacus_ac.audit.usage import account_finding
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.release.values import FloatArray


def one_run_audit(
    engine: Any = None,
    *,
    target_epsilon: float = 1.0,
    canaries: int = 1000,
    records: int = 200,
    batch_size: int = 600,
    epochs: int = 8,
    guesses: int | None = None,
    learning_rate: float = 1e-3,
    confidence: float = 0.999,
    delta: float = 1e-5,
    seed: int | None = None,
    **settings: Any,
) -> AuditResult:
    """Audit a whole training run by guessing from its published weights which canaries it saw.

    Each canary is in the dataset with probability 1/2. The model trains in the ordinary way (AdamW, learning-rate
    control, adaptive clipping, the loader's Poisson batches), and the auditor sees nothing but the weights before and
    after. Canaries along whose gradient the weights moved most are guessed in, and those with the least move are
    guessed out. The others are passed over.

    This is an end-to-end check of one whole run, calibration and accountant included. It is weak: of an exact claim it
    shows a fraction, and it refutes gross errors only. :func:`~opacus_ac.audit.canary_audit` is the sharp instrument.

    Args:
        engine: engine whose ``make_private_with_epsilon`` and ``get_epsilon`` are audited; a new ``PrivacyEngine`` by
            default.
        target_epsilon: epsilon of the run. Beyond what a perfect guesser could show (the result says how much that
            is) nothing can be refuted.
        canaries: m, number of canaries.
        records: ordinary records beside them.
        batch_size: expected batch size.
        epochs: passes of the loader.
        guesses: number of canaries to guess, half of them in; by default a quarter of them. Fixed before the run.
        learning_rate: of AdamW.
        confidence: of the lower bound and the verdict.
        delta: delta of the claim.
        seed: seed of coins, noise and sampling for a run that can be repeated.
        **settings: of ``make_private_with_epsilon``.

    Guarantees:
        A run that keeps its (epsilon, delta) is refuted with probability at most ``1 - confidence``.

    Raises:
        ValueError: If the number of guesses is odd or impossible, or ``make_private`` refuses the settings.

    References:
        Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846), algorithm 1 and theorem 5.2.
    """
    alpha = check_confidence(confidence)
    guesses = number_of_guesses(canaries // 8 * 2 if guesses is None else guesses, canaries)
    if not settings.get("poisson_sampling", True):
        raise ValueError("the audit needs poisson_sampling=True: absent canaries are records that are never drawn")
    engine = new_engine() if engine is None else engine
    inside = tossed(canaries, seed)
    settings = {"target_epsilon": target_epsilon, "target_delta": delta, "epochs": epochs, **settings}
    task = CanaryTask(records, canaries, strength=30.0)
    scores, optimizer, releases = _train(engine, task, inside, batch_size, learning_rate, seed, settings)
    rate = min(1.0, batch_size / task.size)
    due = Counter({(optimizer.mechanism.noise_multiplier, rate): releases})
    correct = right_guesses(scores, inside, guesses)
    # The claim is (epsilon, delta); with delta 0 the same count would rule out more, but nobody claims that.
    epsilon = guess_epsilon(canaries, guesses, correct, delta, alpha)
    return AuditResult(
        audit="one training run",
        subject=describe(optimizer.mechanism.noise_multiplier, settings),
        observations=canaries,
        confidence=confidence,
        delta=delta,
        findings=(
            _finding(epsilon, f"{correct} of {guesses}", float(engine.get_epsilon(delta)), optimizer.steps_taken),
            account_finding("charges of the steps seen", engine, due, rate, delta),
        ),
        notes=(f"a perfect guesser could show epsilon {guess_epsilon(canaries, guesses, guesses, delta, alpha):.2f}",),
    )


def _finding(epsilon: float, right: str, claim: float, steps: int) -> Finding:
    shown = f"epsilon >= {epsilon:.3f} ({right} guesses right)"
    promised = f"epsilon <= {claim:.3f} after {steps} steps"
    return Finding("guessing the canaries", promised, shown, epsilon > claim, claim, epsilon)


def _train(
    engine: Any,
    task: CanaryTask,
    inside: Coins,
    batch_size: int,
    learning_rate: float,
    seed: int | None,
    settings: dict[str, Any],
) -> tuple[FloatArray, Any, int]:
    """Train without the canaries whose coin says out.

    Returns:
        How far the weights went down each canary's loss, ``[m]``, the optimizer, and how often it released something.
    """
    bare = task.model()
    before = [p.detach().clone() for p in bare.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPrivateWarning)
        model, optimizer, loader = engine.make_private_with_epsilon(
            module=bare,
            optimizer=torch.optim.AdamW(bare.parameters(), lr=learning_rate, weight_decay=0.0),
            data_loader=task.loader(batch_size),
            noise_generator=None if seed is None else torch.Generator().manual_seed(seed),
            **settings,
        )
    absent = [index for index, there in zip(task.canaries, inside, strict=True) if not there]
    loader.batch_sampler.stream = WithoutRecords(loader.batch_sampler.stream, absent)
    releases, last = 0, optimizer.released
    for _ in range(settings["epochs"]):
        for batch in loader:
            task.step(model, batch, optimizer)
            releases, last = releases + (optimizer.released is not last), optimizer.released
    engine.detach(model)
    moved = [
        (start - p.detach()).double().flatten().numpy() for start, p in zip(before, bare.parameters(), strict=True)
    ]
    gradients = zip(task.gradients().values(), moved, strict=True)
    return np.asarray(sum(g[task.canaries] @ change for g, change in gradients)), optimizer, releases
