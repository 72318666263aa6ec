"""``opacus-ac finetune``: runs a job, and prints its result and its privacy cost."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

import opacus_ac
from opacus_ac.accounting import plan_epsilon
from opacus_ac.integrations.finetune.build import build_trainer
from opacus_ac.integrations.finetune.callbacks import Interruption
from opacus_ac.integrations.finetune.changes import changed_options, noted_words
from opacus_ac.integrations.finetune.errors import BAD_DATA, BAD_MODEL, BAD_OPTION, FinetuneError, failing_with
from opacus_ac.integrations.finetune.job import Job
from opacus_ac.integrations.finetune.outcome import Look, compared, local_files, look, next_commands
from opacus_ac.integrations.finetune.output import LAST, SETTINGS, resume_from
from opacus_ac.integrations.trainer.checkpoint import damage
from opacus_ac.integrations.trainer.trainer import PrivateTrainer


def run(job: Job, *, dry_run: bool = False) -> int:
    """Fine-tune, save, and print the privacy statement.

    Args:
        job: the options of the run.
        dry_run: whether only to print what the run would be and cost.

    Returns:
        The exit code.

    Guarantees:
        Each charge is written to the ledger before the step is released. The ledger is in the output folder, unless the
        job names another. So steps of a killed process that no checkpoint has stay charged when the run is resumed, and
        the resumed run ends that many steps earlier.

    Raises:
        FinetuneError: If data, model, a setting or the budget does not allow the run.
    """
    with quiet():
        return _dry_run(job) if dry_run else _run(job)


def _run(job: Job) -> int:
    checkpoint, words = _checkpoint(job), noted_words(job.folder)
    trainer = build_trainer(job)
    if checkpoint is None or words is None:
        _note_settings(job)
    trainer.local_files = local_files(job.data)
    trainer.data_files = [Path(str(job.data.train_file))]
    if "tensorboard" in job.training.report_to:
        print(f"watch it: tensorboard --logdir {job.folder} --host 127.0.0.1", file=sys.stderr)
        print("          and its Privacy tab at http://127.0.0.1:6006/#opacus_ac", file=sys.stderr)
    with failing_with(BAD_MODEL, ValueError):
        before = look(trainer, logged=False)
    interruption = Interruption()
    trainer.add_callback(interruption)
    with failing_with(BAD_MODEL, ValueError), _naming_changes(job, words), interruption.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.was_complete:
        print(trainer.privacy_report())
        return 0  # a warning has said that no step was left
    if interruption.signal is None:
        return _finish(trainer, job, before)
    step = trainer.state.global_step
    where = job.folder / f"checkpoint-{step}"
    print(f"interrupted after step {step}; go on with --resume_from_checkpoint {where}", file=sys.stderr)
    return 128 + interruption.signal


@contextmanager
def _naming_changes(job: Job, words: list[str] | None) -> Iterator[None]:
    """Return a context that says in options which settings of a resumed run are others than those it began with."""
    try:
        yield
    except ValueError as error:
        changed = changed_options(words, job.arguments) if "was written with" in str(error) else ""
        if not changed:
            raise
        raise FinetuneError(changed, BAD_OPTION) from error


def _note_settings(job: Job) -> None:
    """Write down what the run was asked for, without the private file's content."""
    settings = {"command": "finetune", "version": opacus_ac.__version__, "arguments": job.arguments}
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _dry_run(job: Job) -> int:
    """Build everything, train nothing, and print what the run would be."""
    if not Path(str(job.privacy.ledger)).exists():
        job.privacy.ledger = None
    with tempfile.TemporaryDirectory() as folder:
        job.training.output_dir = folder
        print(describe(build_trainer(job)))
    return 0


def _finish(trainer: PrivateTrainer, job: Job, before: Look) -> int:
    """Compare the model with what it was, save it, and print the privacy statement. Returns the exit code."""
    found = compared(before, look(trainer, logged=True), job.data.validation_file)
    trainer.save_model()
    print(*([found] if found else []), trainer.privacy_report(), sep="\n\n")
    print(f"saved {job.folder}, with privacy_report.json and a model card in README.md")
    print(next_commands(job.folder, adapters=not job.model.full, tensorboard="tensorboard" in job.training.report_to))
    planned, taken = trainer._planned_steps(), trainer.state.global_step
    charged = sum(steps for *_, steps in trainer.engine.accountant.history)
    if taken < planned:
        print(f"{taken} of {planned} planned steps were taken: the budget is spent", file=sys.stderr)
    return 4 if taken < planned and charged < planned else 0


def _checkpoint(job: Job) -> str | None:
    """Return the checkpoint to resume from, or None. Refuse a folder with another run in it.

    Raises:
        FinetuneError: If there is none that is whole.
    """
    wanted = job.training.resume_from_checkpoint
    found = resume_from(job.folder, wanted)
    if not found:
        if wanted is not None:
            print(f"note: {job.folder} has no checkpoint, nothing to resume: starting afresh", file=sys.stderr)
        return None
    reasons: list[str] = []
    for folder in found:
        reason = damage(folder)
        if reason is None:
            if reasons:
                print(f"note: {reasons[0]}: going on from {folder}, the one before", file=sys.stderr)
            return str(folder)
        reasons.append(reason)
    hint = (
        "no checkpoint there is whole: begin anew in another --output_dir, with --ledger "
        f"{job.privacy.ledger}, which knows what was spent"
        if wanted == LAST
        else "resume from the one before, which --resume_from_checkpoint last finds"
    )
    raise FinetuneError(f"{reasons[0]}: {hint}", BAD_DATA)


def describe(trainer: PrivateTrainer) -> str:
    """Return a text that says what a run would be, cost and publish. Call ``create_optimizer`` before."""
    privacy, plan = trainer.privacy, trainer.get_train_dataloader().loader.plan
    optimizer = trainer.private_optimizer
    assert optimizer is not None
    steps, rate = trainer._planned_steps(), plan.sizes.rate(0)
    noise = optimizer.mechanism.noise_multiplier
    tight = privacy.accountant == "vpld"
    charges, charged_rate = (-(-steps // plan.steps_per_pass), 1.0) if plan.sampling == "shuffled" else (steps, rate)
    epsilon = plan_epsilon(
        noise, sample_rate=charged_rate, steps=charges, delta=privacy.target_delta, method="pld" if tight else "rdp"
    )
    trained = sum(p.numel() for p in optimizer.params)
    facts = {
        "protects": trainer.privacy_report().unit,
        "records N": plan.sizes.dataset_size,
        "expected batch": f"{plan.sizes.expected(0):g} (sample rate {rate:.6g}, {plan.sampling})",
        "steps": steps,
        "noise multiplier": f"{noise:.6g}",
        "epsilon at the end": f"{epsilon:.4f} at delta {privacy.target_delta:g} ({privacy.accountant})",
        "trained weights": f"{trained:,} of {sum(p.numel() for p in trainer.model.parameters()):,}",
        "gradients": f"mode {privacy.grad_sample_mode}, clipping {privacy.clipping}",
        "released per step": "; ".join(trainer.privacy_report().released),
        "shown and saved": "epsilon, C, noisy clip rate, noisy loss, learning rate; weights; nothing without noise",
        "ledger": privacy.ledger or "in the output folder",
    }
    return "\n".join(f"{name:20} {value}" for name, value in facts.items())


@contextmanager
def quiet() -> Iterator[None]:
    """Return a context that shows warnings of this package in one line each, and none of the libraries it uses."""
    own = str(Path(opacus_ac.__file__).parent)

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if str(filename).startswith(own) or category.__module__.startswith("opacus_ac"):
            print(f"note: {message}", file=sys.stderr)

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = show
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
