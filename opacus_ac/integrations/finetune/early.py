"""Checks the options of ``opacus-ac finetune`` before torch and transformers are imported, which takes many seconds.

What is refused here would be refused later too, or would fail in the middle of a run. What is let through is checked
again, in full, by those who use it.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from opacus_ac._validate import count, fraction, not_negative, positive
from opacus_ac.budget.ledger import PrivacyLedger
from opacus_ac.errors import LedgerError
from opacus_ac.integrations.finetune.arguments import AUTO, TRAINING_DEFAULTS, DataArguments
from opacus_ac.integrations.finetune.changes import changed_budget, noted_words
from opacus_ac.integrations.finetune.errors import BAD_DATA, BAD_MODEL, BAD_OPTION, FinetuneError, failing_with
from opacus_ac.integrations.finetune.output import check_writable, resume_from
from opacus_ac.integrations.finetune.rows import Rows, read_rows
from opacus_ac.integrations.finetune.spelling import OWN_TYPES
from opacus_ac.integrations.finetune.words import given_values, words_of_config
from opacus_ac.integrations.trained.folder import LEDGER
from opacus_ac.models.default_model import check_model_folder, is_offline

_REPORTERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",), "clearml": ("clearml",), "codecarbon": ("codecarbon",), "comet_ml": ("comet_ml",),
    "dagshub": ("mlflow",), "dvclive": ("dvclive",), "flyte": ("flytekit",), "mlflow": ("mlflow",),
    "neptune": ("neptune",), "swanlab": ("swanlab",), "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",), "wandb": ("wandb",),
}  # fmt: skip
"""Packages of which one is needed for each value of ``--report_to``."""
_PACKAGES = {"comet_ml": "comet-ml", "flyte": "flytekit", "azure_ml": "azureml-sdk"}

_OR_DEFAULT = ", or leave --model_name_or_path out for the default model"
_STEPS = "max_steps"
_RANGES: dict[str, Callable[..., object]] = {
    "noise_multiplier": not_negative,
    "target_clip_rate": fraction,
    "loss_bound": not_negative,
    "ema_decay": not_negative,
    "per_device_train_batch_size": count,
    "per_device_eval_batch_size": count,
    "gradient_accumulation_steps": count,
    "num_train_epochs": positive,
    "logging_steps": positive,
    "save_steps": positive,
    "weight_decay": not_negative,
    "learning_rate": not_negative,
}
"""Ranges of numbers that no class of options checks by itself."""


@dataclass(frozen=True)
class Checked:
    """What the early checks have found.

    Attributes:
        words: all options, those of the configuration file first.
        rows: the rows of the files.
    """

    words: list[str]
    rows: Rows


def check(arguments: Sequence[str], config: str | None, *, dry_run: bool = False) -> Checked:
    """Check options, paths and rows.

    Args:
        arguments: options of the command line, without those of the command itself.
        config: path of a file of options, or None.
        dry_run: whether nothing will be written.

    Raises:
        FinetuneError: If the run cannot begin. The message has the remedy.
    """
    words = [*words_of_config(config), *arguments]
    values = given_values(words)
    _check_missing(values)
    data = _check_numbers(values)
    _check_public(values)
    _check_reporters(values.get("report_to"))
    _check_packages()
    _check_hub(values)
    if not dry_run:
        _check_output(values, words)
    ledger = _read_ledger(values)
    check_model(values.get("model_name_or_path"))
    rows = read_rows(data)
    size = values.get("dataset_size") or len(rows.private)
    _check_batch_size(values, size)
    if ledger is not None and data.group_by is None:
        with failing_with(BAD_DATA):
            ledger.check_dataset(size)
    return Checked(words, rows)


# ---------------------------------------------------------------- options


def _check_missing(values: Mapping[str, Any]) -> None:
    for name in ("train_file", "output_dir"):
        if not values.get(name):
            raise FinetuneError(f"--{name} is missing", BAD_OPTION)
    if "target_epsilon" not in values and "noise_multiplier" not in values:
        raise FinetuneError("give --target_epsilon, or --noise_multiplier", BAD_OPTION)


def _check_numbers(values: Mapping[str, Any]) -> DataArguments:
    """Refuse numbers out of their range, and settings that contradict each other."""
    with failing_with(BAD_OPTION, ValueError):
        made = [kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values}) for kind in OWN_TYPES]
        for name, in_range in _RANGES.items():
            if name in values and values[name] != AUTO:
                in_range(**{name: values[name]})
    steps = values.get(_STEPS)
    if steps is not None and steps < 1 and steps != -1:
        raise FinetuneError(f"--{_STEPS} must be at least 1, got {steps}", BAD_OPTION)
    return next(one for one in made if isinstance(one, DataArguments))


def _check_public(values: Mapping[str, Any]) -> None:
    if values.get("validation_file") and not values.get("evaluation_is_public"):
        raise FinetuneError(
            "--validation_file: its loss is published without noise. If these data need no protection, say "
            "--evaluation_is_public; otherwise leave the file out",
            BAD_OPTION,
        )


def _check_reporters(wanted: Any) -> None:
    """Refuse a reporter that there is not, or whose package is not installed."""
    for name in [wanted] if isinstance(wanted, str) else wanted or []:
        if name in ("none", "all"):
            continue
        if name not in _REPORTERS:
            near = difflib.get_close_matches(name, _REPORTERS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_REPORTERS)}, all and none"
            raise FinetuneError(f"--report_to {name}: there is no such reporter: {hint}", BAD_OPTION)
        if not any(map(_is_installed, _REPORTERS[name])):
            package = _PACKAGES.get(name, _REPORTERS[name][0])
            raise FinetuneError(
                f"--report_to {name} needs a package that is not installed: pip install {package}, or --report_to none",
                BAD_OPTION,
            )


def _check_packages() -> None:
    missing = [name for name in ("torch", "transformers", "peft") if not _is_installed(name)]
    if missing:
        text = f'not installed: {", ".join(missing)}. Run: pip install "opacus_ac[lm]"'
        raise FinetuneError(text, BAD_MODEL)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _check_hub(values: Mapping[str, Any]) -> None:
    """Refuse a push from a machine that is told to stay off the hub."""
    if values.get("push_to_hub") and is_offline():
        raise FinetuneError(
            "--push_to_hub needs the hub, and HF_HUB_OFFLINE is set: leave it out, and push later with hf upload",
            BAD_OPTION,
        )


# ---------------------------------------------------------------- folders


def _check_output(values: Mapping[str, Any], words: Sequence[str]) -> None:
    folder, wanted = Path(values["output_dir"]), values.get("resume_from_checkpoint")
    if folder.exists() and not folder.is_dir():
        check_writable(folder)
    found = resume_from(folder, wanted)
    if found:
        changed = changed_budget(noted_words(folder), words)
        if changed:
            raise FinetuneError(changed, BAD_OPTION)
    check_writable(folder)


def _read_ledger(values: Mapping[str, Any]) -> PrivacyLedger | None:
    """Return the ledger of the run, where there is one; refuse one that is a folder, damaged, or no ledger."""
    path = Path(values.get("ledger") or Path(values["output_dir"]) / LEDGER)
    if not path.exists():
        return None
    if path.is_dir():
        raise FinetuneError(f"--ledger {path} is a folder: name a file in it", BAD_OPTION)
    try:
        return PrivacyLedger(path)
    except LedgerError as error:
        remedy = "" if "copy" in str(error) else ". Restore it from a copy: what it held is spent"
        raise FinetuneError(f"{error}{remedy}", BAD_DATA) from error
    except OSError as error:
        raise FinetuneError(f"--ledger {path} cannot be used: {error.strerror}", BAD_OPTION) from error


def check_model(name: str | None) -> None:
    """Refuse the folder of a model that is not there, or has no whole model.

    Raises:
        FinetuneError: If it cannot be loaded.
    """
    reason = check_model_folder(name, offline=is_offline())
    if reason is not None:
        raise FinetuneError(f"cannot load the model {name!r}: {reason}{_OR_DEFAULT}", BAD_MODEL)


# ---------------------------------------------------------------- data


def _check_batch_size(values: Mapping[str, Any], size_of_data: int) -> None:
    """Refuse an expected batch size that is larger than the dataset."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    size, times = (int(values.get(name, TRAINING_DEFAULTS[name])) for name in names)
    if size * times > size_of_data:
        raise FinetuneError(
            f"a step expects {size * times} records, {values['train_file']} has fewer: lower "
            f"--gradient_accumulation_steps (now {times}) or --per_device_train_batch_size",
            BAD_OPTION,
        )
