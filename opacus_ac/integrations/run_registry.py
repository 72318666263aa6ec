"""Remembers on which data private runs were made, so that runs whose epsilons add up are not overlooked."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opacus_ac.integrations.file_digest import file_sha256
from opacus_ac.integrations.public_rows import sample_digest

OFF = "OPACUS_AC_REGISTRY"
"""Environment variable that keeps the registry out of use where it is 0."""
_SHOWN = 5


@dataclass(frozen=True)
class EarlierRun:
    """A run on private data.

    Attributes:
        data: keyed hash of its data.
        ledger: absolute path of its ledger; None without one.
        folder: absolute path of its output folder; None without one.
        day: the day on which it began, in UTC.
    """

    data: str
    ledger: str | None
    folder: str | None
    day: str

    @property
    def words(self) -> str:
        """Where and when, for a person."""
        return f"{self.ledger or self.folder or 'no folder'} ({self.day})"


class RunRegistry:
    """List of private runs in the state folder of the user.

    The folder is ``$XDG_STATE_HOME/opacus_ac``, or ``~/.local/state/opacus_ac``. The file holds hashes of data under a
    key that is kept beside it, paths of ledgers and output folders, and days. The environment variable
    ``OPACUS_AC_REGISTRY=0`` keeps it out of use.

    Not guaranteed:
        That all runs are found. Data are known again if 64 of their rows, evenly spread, or the file that they come
        from, are the same. A folder that cannot be written is passed over in silence, because training does not depend
        on it.

    Args:
        data: datasets, or paths of files, that the run is made on. Those that cannot be hashed count for nothing.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self._digests: list[str] = []
        self._folder = _state_folder()
        if os.environ.get(OFF) == "0":
            return
        with contextlib.suppress(OSError):
            key = self._key()
            found = [file_sha256(item) if isinstance(item, Path) else sample_digest(item) for item in data]
            self._digests = [hmac.new(key, digest, "sha256").hexdigest() for digest in found if digest is not None]

    def others(self, *, ledger: str | None, folder: str | None, resumed: bool = False) -> list[EarlierRun]:
        """Return the earlier runs on these data that the ledger of a run does not count.

        Args:
            ledger: path of the run's ledger; None without one.
            folder: output folder of the run; None without one.
            resumed: whether the run continues an earlier one in its folder.
        """
        ledger, folder = _absolute(ledger), _absolute(folder)
        found: dict[EarlierRun, None] = {}
        for run in self._runs():
            counted = ledger is not None and run.ledger == ledger
            itself = resumed and run.folder is not None and run.folder == folder
            if run.data in self._digests and not (counted or itself):
                found[EarlierRun("", run.ledger, run.folder, run.day)] = None
        return list(found)

    def note(self, *, ledger: str | None, folder: str | None) -> None:
        """Add a run that has charged its first step."""
        if not self._digests:
            return
        day = datetime.now(timezone.utc).date().isoformat()
        known = set(self._runs())
        runs = [EarlierRun(digest, _absolute(ledger), _absolute(folder), day) for digest in self._digests]
        lines = [json.dumps(asdict(run)) + "\n" for run in runs if run not in known]
        with contextlib.suppress(OSError), self._file.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    @property
    def _file(self) -> Path:
        return self._folder / "runs.jsonl"

    def _runs(self) -> list[EarlierRun]:
        """Return all runs of the file; lines that cannot be read are passed over."""
        if not self._digests or not self._file.is_file():
            return []
        found = []
        for line in self._file.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                found.append(EarlierRun(**json.loads(line)))
        return found

    def _key(self) -> bytes:
        """Return the key of the hashes; the first call makes it."""
        path = self._folder / "key"
        if not path.is_file():
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
        return path.read_bytes()


def warning(others: list[EarlierRun], ledger: str | None) -> str | None:
    """Return a sentence on runs that no common ledger counts, with the remedy; None where there are none."""
    if not others:
        return None
    shown = ", ".join(run.words for run in others[-_SHOWN:])
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    ledgers = sorted({run.ledger for run in others if run.ledger is not None})
    remedy = ledgers[-1] if ledgers else ledger or "one file for all of them"
    return (
        f"these records were trained on before, in {len(others)} run{'s' if len(others) > 1 else ''} that this run's "
        f"ledger does not count: {shown}{more}. What was spent there adds up with what is spent here. Give all runs on "
        f"the same records one ledger, such as {remedy}"
    )


def _state_folder() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "opacus_ac"


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().resolve())
