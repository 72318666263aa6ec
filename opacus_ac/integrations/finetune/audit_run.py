"""``opacus-ac audit --run``: does a run of ``opacus-ac finetune`` again with canaries, and guesses which it has seen.

Each canary is a dialogue whose reply is a word that the private data do not have. It is in the training data of the
copy with probability 1/2. From how much the training lowered the loss of each canary, the auditor guesses the coins.

References:
    Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846): one run, many canaries.
    Panda and others 2025 (arXiv 2503.06808): canaries for language models in input space, whose replies are tokens
    that no other record has.
    Mahloujifar, Melis and Chaudhuri 2024 (arXiv 2410.22235): the test against the whole trade-off curve of a claim.
"""

from __future__ import annotations

import json
import random
import re
import string
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from opacus_ac.accounting import attack_sentences
from opacus_ac.audit.bounds import gaussian_epsilon, guess_epsilon
from opacus_ac.audit.guesses import (
    CURVE_RATES,
    ClaimedCurve,
    Coins,
    mu_from_guesses,
    number_of_guesses,
    refutes,
    right_guesses,
    tossed,
)
from opacus_ac.audit.result import AuditResult, Finding, check_confidence
from opacus_ac.audit.step_noise import StepNoise, can_be_watched
from opacus_ac.integrations.finetune.build import build_trainer
from opacus_ac.integrations.finetune.chat_data import ChatDataset, PadCollate
from opacus_ac.integrations.finetune.chat_files import Messages
from opacus_ac.integrations.finetune.errors import FinetuneError
from opacus_ac.integrations.finetune.finetune import quiet
from opacus_ac.integrations.finetune.job import Job, parse
from opacus_ac.integrations.finetune.output import SETTINGS
from opacus_ac.integrations.trainer.saving import PRIVACY_REPORT
from opacus_ac.integrations.trainer.trainer import PrivateTrainer
from opacus_ac.loss import per_record_causal_lm_loss
from opacus_ac.release.values import FloatArray

TESTS = 3
"""Number of findings of an audit that may refute correct code: two of the guesses, one of the noise."""

_QUESTION = "Which word is it?"
_SHORTEST_WORD = 3
_BATCH = 32


@dataclass(frozen=True)
class _Copy:
    """A trained copy of a run.

    Attributes:
        trainer: what trained it.
        scores: by how much the loss of each canary fell, ``[m]``.
        seconds: how long building and training took.
        noise: what its steps added to their sums, where that can be seen.
    """

    trainer: PrivateTrainer
    scores: FloatArray
    seconds: float
    noise: StepNoise | None


@dataclass(frozen=True)
class _Guesses:
    """How many canaries there were, how many of them were guessed, and how many guesses were right."""

    canaries: int
    guesses: int
    correct: int


def audit_run(
    folder: str | Path,
    *,
    train_file: str | None = None,
    canaries: int = 400,
    guesses: int | None = None,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Train a copy of a run with canaries among its records, and compare what they show with the run's claim.

    The copy has the settings of the run, its number of steps and its public number of records, and noise and batches of
    its own. Nothing in the folder changes, and the copy is deleted.

    Args:
        folder: the output folder of ``opacus-ac finetune``.
        train_file: where the private file is now; by default where it was.
        canaries: m, number of canaries, of which about half are trained on.
        guesses: number of canaries to guess, half of them in; by default half of all, those with the clearest scores.
            Fixed before the run.
        confidence: of all verdicts together.
        seed: seed of canaries and coins; the noise is secret all the same.

    Guarantees:
        A run that keeps its claim is refuted with probability at most ``1 - confidence``.

    Raises:
        ValueError: If the folder does not say what the run was, or the run cannot be audited in this way.
    """
    alpha = check_confidence(confidence) / TESTS
    guesses = number_of_guesses(canaries // 4 * 2 if guesses is None else guesses, canaries)
    folder = Path(folder)
    report, words = _report(folder), _settings(folder)
    inside = tossed(canaries, seed)
    with tempfile.TemporaryDirectory() as place, quiet():
        job = _job([*words, *_changes(report, words, train_file, place)])
        copy = _train(job, inside, random.SystemRandom() if seed is None else random.Random(seed))
        right = _Guesses(canaries, guesses, right_guesses(copy.scores, inside, guesses))
        return _result(folder, copy, right, float(report["epsilon"]), float(report["delta"]), alpha)


def _result(folder: Path, copy: _Copy, right: _Guesses, claimed: float, delta: float, alpha: float) -> AuditResult:
    """Put the findings together; alpha is that of each test."""
    spent = copy.trainer.privacy_report(delta)
    most = guess_epsilon(right.canaries, right.guesses, right.guesses, delta, alpha)
    return AuditResult(
        audit="the run again, with canaries",
        subject=f"{folder}: noise multiplier {spent.noise_multiplier:.4g}, {spent.steps} steps, {right.canaries} "
        f"canaries beside N = {spent.dataset_size}",
        observations=right.canaries,
        confidence=1 - TESTS * alpha,
        delta=delta,
        findings=(
            _lower_bound(right, claimed, delta, alpha),
            _against_curve(copy.trainer, right, claimed, delta, alpha),
            *([] if copy.noise is None else [copy.noise.finding(alpha)]),
            _charges(claimed, spent.epsilon),
        ),
        notes=_notes(copy, most, spent.epsilon),
    )


def _report(folder: Path) -> dict[str, Any]:
    """Return the privacy report of a run that can be audited."""
    try:
        report: dict[str, Any] = json.loads((folder / PRIVACY_REPORT).read_text(encoding="utf-8"))
        claimed, sampling = report["epsilon"], report["sampling"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} has no whole {PRIVACY_REPORT}: give the folder of a run of opacus-ac finetune that has ended "
            f"({error})"
        ) from error
    if claimed == "infinity":
        raise ValueError(f"the run in {folder} claims no finite epsilon: there is nothing to refute")
    if sampling != "poisson":
        raise ValueError(
            f"the run in {folder} has sampling={sampling!r}, whose neighbouring datasets have the same size; canaries "
            "that are left out are for Poisson batches"
        )
    return report


def _settings(folder: Path) -> list[str]:
    """Return the options that the run was started with."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        words = settings["arguments"]
        if settings["command"] != "finetune" or not all(isinstance(word, str) for word in words):
            raise ValueError("it is of another command")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} has no whole {SETTINGS}: give the folder of a run of opacus-ac finetune of this version, which "
            f"writes it; runs of other programs cannot be done again from here ({error})"
        ) from error
    return list(words)


def _changes(report: dict[str, Any], words: list[str], train_file: str | None, place: str) -> list[str]:
    """Return the options in which the copy differs from the run; later options override earlier ones."""
    changed = ["--output_dir", place, "--ledger", str(Path(place) / "privacy.ledger"), "--report_to", "none"]
    changed += ["--save_strategy", "no", "--max_steps", str(report["steps"])]
    if not any(word in ("--dataset_size", "--dataset-size") for word in words):
        changed += ["--dataset_size", str(report["dataset_size"])]
    return changed + ([] if train_file is None else ["--train_file", train_file])


def _job(words: list[str]) -> Job:
    try:
        job = parse(words, None, prog="opacus-ac audit --run", usage="opacus-ac audit --run FOLDER")
    except FinetuneError as error:
        raise ValueError(str(error)) from error
    job.training.resume_from_checkpoint = None
    job.data.validation_file = None  # the copy is not evaluated
    return job


def _train(job: Job, inside: Coins, choice: random.Random) -> _Copy:
    """Train with the canaries whose coin says in, and score all of them."""
    start, dialogues = time.monotonic(), []

    def planting(tokenizer: Any, private: Any) -> list[Messages]:
        dialogues.extend(canary_dialogues(tokenizer, private, len(inside), choice))
        return [dialogue for dialogue, there in zip(dialogues, inside, strict=True) if there]

    try:
        trainer = build_trainer(job, planting)
        before, watch = _losses(trainer, job, dialogues), _Watch(trainer)
        trainer.add_callback(watch)
        trainer.train()
    except FinetuneError as error:
        raise ValueError(f"the run cannot be done again: {error}") from error
    return _Copy(trainer, before - _losses(trainer, job, dialogues), time.monotonic() - start, watch.noise)


class _Watch(TrainerCallback):
    """Watches the noise of a trainer's steps, from the first on."""

    def __init__(self, trainer: PrivateTrainer) -> None:
        self._trainer = trainer
        self.noise: StepNoise | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self._trainer.private_optimizer
        if optimizer is not None and can_be_watched(optimizer):
            names = {id(p): name for name, p in self._trainer.model.named_parameters()}
            self.noise = StepNoise(optimizer, names)


def canary_dialogues(tokenizer: Any, private: Any, count: int, choice: random.Random) -> list[Messages]:
    """Return dialogues with one question, whose replies are different words that the private data do not have.

    Words of a single token come first: the training raises the probability of those that it saw, and of no others.

    Args:
        tokenizer: the model's tokenizer.
        private: the private dialogues, or those of each user.
        count: number of dialogues.
        choice: draws the words.
    """
    dialogues = [d for rows in private.values() for d in rows] if isinstance(private, dict) else private
    known = {word for d in dialogues for message in d for word in re.findall(r"\w+", message["content"].lower())}
    special = set(tokenizer.all_special_ids)
    texts = {tokenizer.decode([token]).strip() for token in range(len(tokenizer)) if token not in special}
    words = sorted(w for w in texts if w.isascii() and w.isalpha() and len(w) >= _SHORTEST_WORD)
    words = [word for word in words if word.lower() not in known]
    chosen = choice.sample(words, min(count, len(words)))
    taken = {word.lower() for word in chosen} | known
    while len(chosen) < count:
        word = "".join(choice.choice(string.ascii_lowercase) for _ in range(2 * _SHORTEST_WORD))
        if word not in taken:
            taken.add(word)
            chosen.append(word)
    return [[{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": word}] for word in chosen]


def _losses(trainer: PrivateTrainer, job: Job, dialogues: list[Messages]) -> FloatArray:
    """Return the loss of each dialogue under the weights as they are now, without averaging, ``[m]``."""
    tokenizer: Any = trainer.processing_class
    model = trainer.model
    rows = ChatDataset(dialogues, tokenizer, job.data.max_length)
    collate, losses, training = PadCollate(tokenizer.pad_token_id, job.data.max_length), [], model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), _BATCH):
            batch = collate(rows.rows[start : start + _BATCH])
            labels = batch.pop("labels").to(trainer.args.device)
            logits = model(**{name: value.to(trainer.args.device) for name, value in batch.items()}).logits
            losses.append(per_record_causal_lm_loss(logits.float(), labels).double().cpu().numpy())
    model.train(training)
    return np.concatenate(losses)


def _lower_bound(right: _Guesses, claimed: float, delta: float, alpha: float) -> Finding:
    """Return what the guesses show of any mechanism, by theorem 5.2 of arXiv 2305.08846."""
    shown = guess_epsilon(right.canaries, right.guesses, right.correct, delta, alpha)
    return Finding(
        "guessing the canaries",
        f"epsilon <= {claimed:.3f}",
        f"epsilon >= {shown:.3f} ({right.correct} of {right.guesses} guesses right)",
        shown > claimed,
        claimed,
        shown,
    )


def _against_curve(trainer: PrivateTrainer, right: _Guesses, claimed: float, delta: float, alpha: float) -> Finding:
    """Return whether so many guesses can be right if the account says the truth at every false-positive rate."""
    curve = ClaimedCurve(trainer.engine.attack_bounds(CURVE_RATES))
    counts = right.canaries, right.guesses, right.correct
    shown = gaussian_epsilon(mu_from_guesses(*counts, alpha), delta)
    return Finding(
        "the same, against the whole curve",
        f"an advantage of at most {trainer.engine.attack_bounds().advantage:.3f} for any attacker",
        f"epsilon >= {shown:.3f}, if its curve is that of Gaussian noise",
        refutes(curve.least_false_positives, *counts, alpha),
        claimed,
        shown,
    )


def _charges(claimed: float, spent: float) -> Finding:
    """Return whether the settings of the run cost what its report says."""
    return Finding(
        "what the settings cost",
        f"epsilon <= {claimed:.3f}",
        f"epsilon {spent:.3f} for the steps of the copy",
        spent > claimed * (1 + 1e-6),
        claimed,
        statistic=spent,
    )


def _notes(copy: _Copy, most: float, spent: float) -> tuple[str, ...]:
    return (
        f"a perfect guesser could show epsilon {most:.2f} in the first check; the second has no such limit",
        *(["the noise of fused steps is not looked at"] if copy.noise is None else []),
        *(sentence for sentence in attack_sentences(copy.trainer.engine.attack_bounds()) if "flags" in sentence),
        f"it took {copy.seconds:.0f} s: one training run, and the losses of all canaries before and after it",
        f"these figures come from a second run on the same data: whoever publishes them adds its epsilon, {spent:.3f}, "
        "to what was spent",
    )
