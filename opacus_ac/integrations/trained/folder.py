"""Finds what a training run has left in its folder: model, report, settings, ledger. Needs neither torch nor opacus."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
CARD = "README.md"
LEDGER = "privacy.ledger"
PRIVACY_REPORT = "privacy_report.json"
SETTINGS = "run_settings.json"
"""Public settings of the run, which may be published with the model."""
LOCAL_PATHS = "_local_paths.json"
"""Paths of this machine. ``Trainer.push_to_hub`` leaves out files whose name begins with an underscore."""

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class RunError(ValueError):
    """A run folder lacks what is asked of it; the message has the remedy."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run of ``opacus-ac finetune``, of ``PrivateTrainer``, or of the examples; finished or not.

    Attributes:
        path: the folder: the output folder, one that ``save_model`` wrote, or a checkpoint.
    """

    path: Path

    @classmethod
    def at(cls, path: str | Path) -> RunFolder:
        """Return the run folder at a path.

        Raises:
            RunError: If it is no folder.
        """
        if not Path(path).is_dir():
            what = "is a file" if Path(path).exists() else "does not exist"
            raise RunError(f"{path} {what}: give the folder of a run, such as the --output_dir of opacus-ac finetune")
        return cls(Path(path))

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints whose last file is there, the newest first."""
        found = {int(m[1]): p for p in self.path.iterdir() if (m := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()}
        return [found[step] for step in sorted(found, reverse=True) if (found[step] / "trainer_state.json").is_file()]

    def model_folder(self) -> Path:
        """Return the folder that has the weights: the folder itself, or its newest checkpoint that has some.

        Raises:
            RunError: If nothing was saved.
        """
        for folder in (self.path, *self.checkpoints):
            if is_adapter(folder) or is_model(folder):
                return folder
        saved = (p.parent for p in sorted(self.path.glob(f"*/{SETTINGS}")))
        inner = next((p for p in saved if is_adapter(p) or is_model(p)), None)
        hint = f"name {inner}, which has" if inner is not None else "train first: opacus-ac finetune"
        if (self.path / LEDGER).exists():
            hint = "the run was ended before its first checkpoint; go on with --resume_from_checkpoint last"
        raise RunError(f"{self.path} has no model, neither saved nor in a checkpoint: {hint}")

    # ---------------------------------------------------------------- files beside the weights

    def _places(self) -> list[Path]:
        """Return the folders where files of the run may be. A checkpoint is inside of the output folder."""
        outer = [self.path.resolve().parent] if _CHECKPOINT.fullmatch(self.path.resolve().name) else []
        return [self.path, *outer, *self.checkpoints]

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in a file of the run, which is looked for in its checkpoints too; None without one.

        Raises:
            RunError: If the file holds no JSON object.
        """
        path = next((folder / name for folder in self._places() if (folder / name).is_file()), None)
        return None if path is None else read_object(path)

    @property
    def settings(self) -> dict[str, Any]:
        """Public settings of the run; empty where they were not written."""
        return self.read(SETTINGS) or {}

    @property
    def local_paths(self) -> dict[str, Any]:
        """Paths of the machine that trained, by name; empty where they were not written."""
        return self.read(LOCAL_PATHS) or {}

    @property
    def ledger(self) -> Path | None:
        """Path of the privacy ledger; None without one on this machine."""
        named = self.local_paths.get("ledger")
        places = [*([Path(named)] if named else []), *(folder / LEDGER for folder in self._places())]
        return next((path for path in places if path.is_file()), None)


def is_adapter(folder: Path) -> bool:
    """Say whether a folder has adapters of peft."""
    return (folder / ADAPTER_CONFIG).is_file() and any(folder.glob("adapter_model.*"))


def is_model(folder: Path) -> bool:
    """Say whether a folder has a whole model of transformers."""
    return (folder / MODEL_CONFIG).is_file() and any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        RunError: If there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} is not a JSON object")
    return found


def write_object(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object to a file."""
    path.write_text(json.dumps(dict(values), indent=2) + "\n", encoding="utf-8")
