"""The options of ``opacus-ac finetune``, from a file and the command line, become one checked job."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from opacus_ac.integrations.finetune.arguments import (
    AUTO,
    LEARNING_RATES,
    SAVE_STEPS,
    TRAINING_DEFAULTS,
    DataArguments,
    ModelArguments,
)
from opacus_ac.integrations.finetune.errors import failing_with
from opacus_ac.integrations.finetune.rows import Rows
from opacus_ac.integrations.finetune.words import learning_rate, words_of_config
from opacus_ac.integrations.trained.folder import LEDGER
from opacus_ac.integrations.trainer.arguments import ADAMW, USUAL_BETA1, PrivacyArguments

_TYPES: tuple[Any, ...] = (DataArguments, ModelArguments, PrivacyArguments, TrainingArguments)


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
    rows: Rows | None = None
    """The rows of the files, where they were read before; whoever uses them takes them out of here."""

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
            action.type = learning_rate
    return parser


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
    words = [*words_of_config(config), *arguments]
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
