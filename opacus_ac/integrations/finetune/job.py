"""The options of ``opacus-ac finetune``, from a file and the command line, become one checked job."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from opacus_ac.budget.ledger import LedgerError
from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.integrations.finetune.arguments import (
    AUTO,
    LEARNING_RATES,
    SAVE_STEPS,
    TRAINING_DEFAULTS,
    DataArguments,
    ModelArguments,
)
from opacus_ac.integrations.trainer.arguments import ADAMW, USUAL_BETA1, PrivacyArguments

LEDGER = "privacy.ledger"
SETTINGS = "_run_arguments.json"
"""What a run was asked for, in its output folder: ``opacus-ac audit --run`` does it again."""
_TYPES: tuple[Any, ...] = (DataArguments, ModelArguments, PrivacyArguments, TrainingArguments)


class FinetuneError(Exception):
    """A failure with a message for the user.

    Attributes:
        exit_code: exit code of the process, one of :data:`EXIT_CODES`.
    """

    def __init__(self, message: object, exit_code: int) -> None:
        super().__init__(str(message))
        self.exit_code = exit_code


@contextmanager
def failing_with(exit_code: int, *kinds: type[BaseException]) -> Iterator[None]:
    """Return a context that turns exceptions of some kinds into a :class:`FinetuneError`."""
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
    """The options of a run, parsed and checked."""

    data: DataArguments
    model: ModelArguments
    privacy: PrivacyArguments
    training: Any
    """``TrainingArguments``."""
    arguments: list[str] = dataclasses.field(default_factory=list)
    """The options that were given, in the file and on the command line, as words of a command line."""

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.training.output_dir)


def full_parser(prog: str, usage: str) -> HfArgumentParser:
    """Return the parser of all options, including those of ``TrainingArguments``."""
    parser = HfArgumentParser(_TYPES, prog=prog, usage=usage, allow_abbrev=False)
    parser.set_defaults(**TRAINING_DEFAULTS, learning_rate=None, adam_beta1=None, save_steps=None, accountant="vpld")
    for action in parser._actions:
        if action.dest == "learning_rate":
            action.type = _rate
    return parser


def _rate(text: str) -> float | str:
    """Return the learning rate that a word of the command line stands for."""
    if text == AUTO:
        return AUTO
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or {AUTO!r}, got {text!r}") from None


def _choose_momentum_and_rate(values: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """Put what was left out, or left to the run, into the values that the arguments have."""
    adamw = str(values["optim"]) in ADAMW
    if values["learning_rate"] == AUTO and values["fused_step"]:
        parser.error("--learning_rate auto needs all gradients at once: leave out --fused_step, or give a rate")
    if values["learning_rate"] == AUTO and not adamw:
        parser.error(f"--learning_rate auto brings its own optimizer: leave out --optim {values['optim']}")
    if values["adam_beta1"] is None:
        values["adam_beta1"] = USUAL_BETA1
    else:
        values["planned_momentum"] = False
    found = adamw and not values["fused_step"] and values["preset"] is None
    if (values["learning_rate"] is None and found) or values["learning_rate"] == AUTO:
        values["auto_learning_rate"], values["learning_rate"] = True, None


def parse(arguments: Sequence[str], config: str | None, *, prog: str, usage: str) -> Job:
    """Return the job that a configuration file and the command line describe. The command line overrides the file.

    Args:
        arguments: words of the command line.
        config: path of the YAML file, or None.
        prog: name of the program, for messages.
        usage: usage line, for messages.

    Raises:
        SystemExit: If an option is wrong. The message is on stderr.
        FinetuneError: If settings contradict each other, or the configuration file cannot be read.
    """
    parser = full_parser(prog, usage)
    words = [*_of_config(config, parser), *arguments]
    values = vars(parser.parse_args(words))
    for name in ("train_file", "output_dir"):
        if values[name] is None:
            parser.error(f"--{name} is missing")
    _choose_momentum_and_rate(values, parser)
    for name, usual in (("learning_rate", LEARNING_RATES), ("save_steps", SAVE_STEPS)):
        if values[name] is None:
            values[name] = usual["full" if values["full"] else "lora"]
    if values["report_to"] == ["tensorboard"] and importlib.util.find_spec("tensorboard") is None:
        values["report_to"] = ["none"]
    values["disable_tqdm"] = True  # StepLines shows the progress
    if values["ledger"] is None:
        values["ledger"] = str(Path(values["output_dir"]) / LEDGER)
    with failing_with(2, ValueError, OSError, ImportError):
        made = [kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init}) for kind in _TYPES]
    job = Job(*made)
    job.arguments = words
    return job


def _of_config(path: str | None, parser: argparse.ArgumentParser) -> list[str]:
    """Return the options in a YAML file as arguments."""
    if path is None:
        return []
    with failing_with(2, OSError):
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
    """Refuse a value that the parser would read as an option: a value must not change another setting."""
    try:
        float(text)  # a negative number
    except ValueError:
        if text.startswith("-"):
            raise FinetuneError(
                f"{path}: the value {text!r} of {name} starts with '-' and would be read as an option: write options "
                "as names of their own, such as: target_epsilon: 8",
                2,
            ) from None
