"""``opacus-ac finetune``: from options to a trained model, with every failure told apart."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from opacus.validators.errors import UnsupportedModuleError
from transformers import HfArgumentParser, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from opacus_ac.accounting import plan_epsilon
from opacus_ac.budget.ledger import LedgerError
from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.integrations.finetune.arguments import (
    LEARNING_RATES,
    SAVE_STEPS,
    TRAINING_DEFAULTS,
    DataArguments,
    ModelArguments,
)
from opacus_ac.integrations.finetune.callbacks import Interruption, StepLines
from opacus_ac.integrations.finetune.chat_data import ChatDataset, PadCollate, encode, read_dialogues
from opacus_ac.integrations.finetune.chat_users import UserCollate, UserDataset, read_users
from opacus_ac.integrations.public_rows import PrivateRows, same_file
from opacus_ac.integrations.trainer.arguments import PrivacyArguments
from opacus_ac.integrations.trainer.trainer import PrivateTrainer
from opacus_ac.models.default_model import ModelUnavailableError
from opacus_ac.models.peft import load_trainable

LEDGER = "privacy.ledger"
_TYPES: tuple[Any, ...] = (DataArguments, ModelArguments, PrivacyArguments, TrainingArguments)
_GREETING = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello, how are you?"}]


class FinetuneError(Exception):
    """A failure whose message a user can act on.

    Attributes:
        exit_code: what the process should end with, one of :data:`EXIT_CODES`.
    """

    def __init__(self, message: object, exit_code: int) -> None:
        super().__init__(str(message))
        self.exit_code = exit_code


@contextmanager
def _failing_with(exit_code: int, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn exceptions of some kinds into a :class:`FinetuneError`."""
    try:
        yield
    except PrivacyBudgetExceeded as error:
        raise FinetuneError(error, 4) from error
    except LedgerError as error:
        raise FinetuneError(error, 3) from error
    except kinds as error:
        raise FinetuneError(error, exit_code) from error


@dataclass
class Job:
    """What the options of a run come to."""

    data: DataArguments
    model: ModelArguments
    privacy: PrivacyArguments
    training: Any
    """``TrainingArguments``."""

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.training.output_dir)


# ---------------------------------------------------------------- options


def full_parser(prog: str, usage: str) -> HfArgumentParser:
    """Return the parser of all options, those of ``TrainingArguments`` included."""
    parser = HfArgumentParser(_TYPES, prog=prog, usage=usage, allow_abbrev=False)
    parser.set_defaults(**TRAINING_DEFAULTS, learning_rate=None, save_steps=None, accountant="vpld")
    return parser


def parse(arguments: Sequence[str], config: str | None, *, prog: str, usage: str) -> Job:
    """Return the job that a configuration file and the command line, which overrides it, describe.

    Raises:
        SystemExit: bad options; the message is on stderr.
        FinetuneError: settings that contradict each other, or a configuration file that cannot be read.
    """
    parser = full_parser(prog, usage)
    values = vars(parser.parse_args([*_of_config(config, parser), *arguments]))
    for name in ("train_file", "output_dir"):
        if values[name] is None:
            parser.error(f"--{name} is missing")
    for name, usual in (("learning_rate", LEARNING_RATES), ("save_steps", SAVE_STEPS)):
        if values[name] is None:
            values[name] = usual["full" if values["full"] else "lora"]
    if values["report_to"] == ["tensorboard"] and importlib.util.find_spec("tensorboard") is None:
        values["report_to"] = ["none"]
    values["disable_tqdm"] = True  # see StepLines
    if values["ledger"] is None:
        values["ledger"] = str(Path(values["output_dir"]) / LEDGER)
    with _failing_with(2, ValueError, OSError, ImportError):
        made = [kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init}) for kind in _TYPES]
    return Job(*made)


def _of_config(path: str | None, parser: argparse.ArgumentParser) -> list[str]:
    """Return the options in a YAML file as arguments."""
    if path is None:
        return []
    with _failing_with(2, OSError):
        content = Path(path).read_bytes()
    try:
        found = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise FinetuneError(f"{path} is not valid YAML: {' '.join(str(error).split())}", 2) from error
    if not isinstance(found, dict):
        raise FinetuneError(f"{path} is not a mapping of options, such as: target_epsilon: 8", 2)
    known = {action.dest for action in parser._actions}
    arguments = []
    for name, value in found.items():
        if str(name).replace("-", "_") not in known:
            raise FinetuneError(f"{path}: there is no option {name!r}", 2)
        if value is not None:
            values = value if isinstance(value, list) else [value]
            shown = [json.dumps(v) if isinstance(v, dict | bool) else str(v) for v in values]
            for text in shown:
                _refuse_option(path, name, text)
            arguments += [f"--{name}", *shown]
    return arguments


def _refuse_option(path: str, name: str, text: str) -> None:
    """Raise for a value that the parser would take for an option of its own: a value is not to change another setting."""
    try:
        float(text)  # a negative number
    except ValueError:
        if text.startswith("-"):
            raise FinetuneError(
                f"{path}: the value {text!r} of {name} starts with '-' and would be read as an option: write options as "
                "names of their own, such as: target_epsilon: 8",
                2,
            ) from None


def _check_output(job: Job) -> str | None:
    """Return the checkpoint to resume from; refuse a folder with a run that is not resumed."""
    folder = job.folder
    wanted = job.training.resume_from_checkpoint
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if wanted is None:
        if last is not None or (folder / LEDGER).exists():
            raise FinetuneError(
                f"{folder} holds a run already: go on with --resume_from_checkpoint last, or choose another --output_dir",
                2,
            )
        return None
    if wanted == "last" and not Path(wanted).is_dir():
        return last  # None: the run died before its first checkpoint, and starts anew with what it has spent
    if not Path(wanted).is_dir():
        raise FinetuneError(f"--resume_from_checkpoint {wanted}: there is no such folder", 2)
    return str(wanted)


# ---------------------------------------------------------------- the run


def run(job: Job, *, dry_run: bool = False) -> int:
    """Fine-tune, save, and print the privacy statement; returns an exit code.

    Guarantees:
        The ledger, in the output folder unless named, has every charge before its release: what a killed process released
        after its last checkpoint stays charged when the run is resumed, which then ends that many steps earlier.

    Raises:
        FinetuneError: bad data, model, setting or budget.
    """
    with _quiet():
        return _dry_run(job) if dry_run else _run(job)


def _run(job: Job) -> int:
    checkpoint = _check_output(job)
    trainer = build_trainer(job)
    if "tensorboard" in job.training.report_to:
        print(f"watch it: tensorboard --logdir {job.folder} --host 127.0.0.1", file=sys.stderr)
        print("          and its Privacy tab at http://127.0.0.1:6006/#opacus_ac", file=sys.stderr)
    interruption = Interruption()
    trainer.add_callback(interruption)
    with _failing_with(5, ValueError), interruption.listening():
        trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.was_complete:
        print(trainer.privacy_report())
        return 0  # the warning has said why
    if interruption.signal is None:
        return _finish(trainer, job)
    step = trainer.state.global_step
    where = job.folder / f"checkpoint-{step}"
    print(f"interrupted after step {step}; go on with --resume_from_checkpoint {where}", file=sys.stderr)
    return 128 + interruption.signal


def _dry_run(job: Job) -> int:
    """Build everything but train nothing, and say what the run would be."""
    if not Path(str(job.privacy.ledger)).exists():
        job.privacy.ledger = None
    with tempfile.TemporaryDirectory() as folder:
        job.training.output_dir = folder
        print(describe(build_trainer(job)))
    return 0


def _finish(trainer: PrivateTrainer, job: Job) -> int:
    """Evaluate, save, and say what was done and what it cost."""
    if job.data.validation_file is not None:
        print(f"loss on {job.data.validation_file}: {trainer.evaluate()['eval_loss']:.4f}")
    trainer.save_model()
    print(trainer.privacy_report())
    print(f"saved {job.folder}, with privacy_report.json")
    planned, taken = trainer._planned_steps(), trainer.state.global_step
    charged = sum(steps for *_, steps in trainer.engine.accountant.history)
    if taken < planned:
        print(f"{taken} of {planned} planned steps were taken: the budget is spent", file=sys.stderr)
    return 4 if taken < planned and charged < planned else 0


def build_trainer(job: Job) -> PrivateTrainer:
    """Read the data, load the model, and return a trainer that reports to stderr; its optimizer is private already.

    Raises:
        FinetuneError: either cannot be had, or this training cannot be made private.
    """
    if job.training.world_size > 1:
        raise FinetuneError(
            f"the command line runs in one process, not {job.training.world_size}: start one, or use PrivateTrainer under "
            "torchrun",
            2,
        )
    with _failing_with(3, ValueError, OSError, ImportError):
        private = _read(job.data)
        public = read_dialogues(job.data.validation_file) if job.data.validation_file else None
        if public is not None and job.privacy.evaluation_is_public:  # without it, refused by the Trainer
            _check_public(job.data, private, public)
    torch.manual_seed(job.training.seed)
    options: dict[str, Any] = {"full": job.model.full, "rank": job.model.lora_r, "layers": job.model.lora_layers}
    with _failing_with(5, ModelUnavailableError, ValueError, ImportError):
        model, tokenizer = load_trainable(job.model.model_name_or_path, **options)
        encode(_GREETING, tokenizer, job.data.max_length)
    length, training = job.data.max_length, job.training
    expected = training.per_device_train_batch_size * training.gradient_accumulation_steps
    if expected > (job.privacy.dataset_size or len(private)):
        raise FinetuneError(
            f"a step expects {expected} records, {job.data.train_file} has fewer: lower --gradient_accumulation_steps (now "
            f"{training.gradient_accumulation_steps}) or --per_device_train_batch_size",
            2,
        )
    with _failing_with(3, ValueError):
        train, collate = _records(job.data, private, tokenizer)
        evaluation = None if public is None else ChatDataset(public, tokenizer, length)
    with _failing_with(5, ValueError, NotImplementedError, UnsupportedModuleError):
        trainer = PrivateTrainer(
            model,
            job.training,
            privacy=job.privacy,
            train_dataset=train,
            eval_dataset=evaluation,
            data_collator=collate,
            processing_class=tokenizer,
        )
    for kind in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(kind)
    trainer.add_callback(StepLines(trainer))
    with _failing_with(5, ValueError, NotImplementedError, UnsupportedModuleError):
        trainer.create_optimizer()
    return trainer


def _read(data: DataArguments) -> Any:
    """Return the private dialogues, or those of each user."""
    if data.group_by is None:
        return read_dialogues(str(data.train_file))
    return read_users(str(data.train_file), data.group_by)


def _check_public(data: DataArguments, private: Any, public: Any) -> None:
    """Raise ``ValueError`` for a validation file that is the private one, or has dialogues of it."""
    assert data.train_file is not None
    assert data.validation_file is not None
    shared = same_file(data.validation_file, data.train_file)
    if shared is None:
        dialogues = [d for rows in private.values() for d in rows] if data.group_by is not None else private
        shared = PrivateRows(dialogues).shared_by(public)
    if shared is not None:
        raise ValueError(f"--validation_file {data.validation_file} is not public: {shared}")


def _records(data: DataArguments, dialogues: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Return the dataset of what :func:`_read` returned, and its collate function."""
    length = data.max_length
    if data.group_by is None:
        return ChatDataset(dialogues, tokenizer, length), PadCollate(tokenizer.pad_token_id, length)
    users = UserDataset(dialogues, tokenizer, max_length=length, max_rows_per_user=data.max_rows_per_user)
    return users, UserCollate(tokenizer.pad_token_id, length)


def describe(trainer: PrivateTrainer) -> str:
    """Return what a run would be, cost and show, from public constants; after ``create_optimizer``."""
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
        "shown and saved": "epsilon, C, noisy clip rate, noisy loss, learning rate; weights; nothing un-noised",
        "ledger": privacy.ledger or "in the output folder",
    }
    return "\n".join(f"{name:20} {value}" for name, value in facts.items())


@contextmanager
def _quiet() -> Iterator[None]:
    """A context in which this package's warnings take one line each, and the libraries below say nothing."""
    own = str(Path(__file__).parent.parent)

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
