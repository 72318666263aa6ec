"""Looks at the output folder of a run before anything is loaded: may a run begin, or go on, there?"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from opacus_ac.integrations.finetune.errors import BAD_OPTION, FinetuneError
from opacus_ac.integrations.trained.folder import LEDGER

SETTINGS = "_run_arguments.json"
"""What a run was asked for, in its output folder: ``opacus-ac audit --run`` does it again."""
LAST = "last"
"""Value of ``--resume_from_checkpoint`` that stands for the newest checkpoint that is whole."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first. They may be damaged."""
    if not folder.is_dir():
        return []
    found = {int(m[1]): p for p in folder.iterdir() if (m := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()}
    return [found[step] for step in sorted(found, reverse=True)]


def resume_from(folder: Path, wanted: str | None) -> list[Path]:
    """Return the checkpoints that a run may go on from, the best first; none for a run that starts.

    Args:
        folder: the output folder.
        wanted: value of ``--resume_from_checkpoint``, or None.

    Raises:
        FinetuneError: If a new run would mix with one that is there, or the checkpoint is not there.
    """
    found = checkpoints(folder)
    if wanted is None:
        if found or (folder / LEDGER).exists():
            raise FinetuneError(
                f"{folder} holds a run already: go on with --resume_from_checkpoint last, or choose another "
                "--output_dir",
                BAD_OPTION,
            )
        return []
    if wanted == LAST and not Path(wanted).is_dir():
        return found  # none if the run died before its first checkpoint: it starts anew, and its charges stay
    if not Path(wanted).is_dir():
        names = ", ".join(str(path) for path in found[:3])
        hint = f": there are {names}" if found else f": {folder} has no checkpoint, leave the option out"
        raise FinetuneError(f"--resume_from_checkpoint {wanted}: there is no such folder{hint}", BAD_OPTION)
    return [Path(wanted)]


def check_writable(folder: Path, option: str = "--output_dir") -> None:
    """Refuse a path where no folder is or can be made, by writing a file that is gone at once.

    Raises:
        FinetuneError: If it is a file, or nothing can be written there.
    """
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = "is a file" if place == folder else f"cannot be made, because {place} is a file"
        raise FinetuneError(f"{option} {folder} {what}: name a folder", BAD_OPTION)
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise FinetuneError(
            f"{option} {folder}: nothing can be written in {place} ({reason}): choose another folder, or change its "
            "permissions",
            BAD_OPTION,
        ) from error
