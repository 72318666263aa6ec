"""Settings of Weights & Biases, MLflow, Trackio and others that would show values of private batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

_TRUE = {"1", "on", "true", "yes", "y", "t"}
_FILES = (
    "it copies files of the run, which may have paths of this machine, or weights without their privacy report: unset "
    "it, and publish the folder that save_model writes"
)


def _on(value: str) -> bool:
    return value.strip().lower() not in ("", "0", "off", "false", "no", "n", "f", "none")


# Reporter, name of an environment variable, test for a value that is refused, and the reason with the remedy.
_VARIABLES: tuple[tuple[str, str, Callable[[str], bool], str], ...] = (
    (
        "wandb",
        "WANDB_WATCH",
        _on,
        "it reads gradients of private batches without noise, and counts forward passes: unset it",
    ),
    ("wandb", "WANDB_LOG_MODEL", _on, _FILES),
    ("mlflow", "HF_MLFLOW_LOG_ARTIFACTS", _on, _FILES),
    (
        "mlflow",
        "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING",
        _on,
        "use of memory and processors follows the realised batches: unset it",
    ),
    ("dagshub", "HF_DAGSHUB_LOG_ARTIFACTS", _on, _FILES),
    ("comet_ml", "COMET_LOG_ASSETS", _on, _FILES),
    ("dvclive", "HF_DVCLIVE_LOG_MODEL", _on, _FILES),
    ("swanlab", "SWANLAB_LOG_MODEL", _on, _FILES),
)
_NO_STATISTICS = ("WANDB_X_DISABLE_STATS", "WANDB__DISABLE_STATS")


def refused_reporters(args: Any, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the reasons against what reporters of the Trainer would write beside its log, each with its remedy.

    Args:
        args: ``TrainingArguments``.
        environment: environment variables.
    """
    given = getattr(args, "report_to", None)
    reporters = given if isinstance(given, list | tuple) else [given]
    names = {str(getattr(name, "value", name)) for name in reporters if name}
    every = "all" in names
    found = [
        f"{name}={environment[name]!r} with report_to={reporter!r}: {reason}"
        for reporter, name, refused, reason in _VARIABLES
        if (every or reporter in names) and refused(environment.get(name, ""))
    ]
    if (every or "wandb" in names) and not any(
        environment.get(name, "").strip().lower() in _TRUE for name in _NO_STATISTICS
    ):
        found.append(
            f"report_to='wandb' samples the use of memory and processors, which follows the realised batches: set the "
            f"environment variable {_NO_STATISTICS[0]}=true"
        )
    if "clearml" in names and _on(environment.get("CLEARML_LOG_MODEL", "TRUE")):
        found.append(f"report_to='clearml': set the environment variable CLEARML_LOG_MODEL=FALSE, because {_FILES}")
    if "codecarbon" in names:
        found.append("report_to='codecarbon': the energy of a step follows the realised batches: leave it out")
    return found
