"""The rows of a run's files: read once, before anything large is imported. Needs neither torch nor transformers."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opacus_ac.integrations.finetune.arguments import DataArguments
from opacus_ac.integrations.finetune.chat_files import HUGE, FileFacts, read_dialogues, read_users
from opacus_ac.integrations.finetune.errors import BAD_DATA, FinetuneError, failing_with
from opacus_ac.integrations.same_file import same_file


@dataclass(frozen=True)
class Rows:
    """What the files of a run hold.

    Attributes:
        private: the private dialogues; those of each user, by name, with ``group_by``.
        public: the public dialogues, or None.
        facts: counts about the private file. They are private: for the terminal of whoever owns the data only.
    """

    private: Any
    public: Any
    facts: FileFacts = field(default_factory=FileFacts)


def read_rows(data: DataArguments) -> Rows:
    """Read the private and the public file of a run.

    Raises:
        FinetuneError: If a file or one of its rows cannot be read.
    """
    facts, private, public = FileFacts(), str(data.train_file), data.validation_file
    check_file("--train_file", private)
    if public is not None:
        check_file("--validation_file", public)
        shared = same_file(public, private)
        if shared is not None:
            raise FinetuneError(f"--validation_file {public} is not public: {shared}", BAD_DATA)
    with failing_with(BAD_DATA, ValueError, OSError, ImportError):
        rows: Any = (
            read_dialogues(private, facts) if data.group_by is None else read_users(private, data.group_by, facts)
        )
        return Rows(rows, None if public is None else read_dialogues(public), facts)


def check_file(option: str, name: str) -> None:
    """Refuse a path that is no file that can be read.

    Raises:
        FinetuneError: If it is not there, a folder, or may not be read.
    """
    path = Path(name)
    if path.is_dir():
        raise FinetuneError(f"{option} {name} is a folder: name the file in it", BAD_DATA)
    if not path.is_file():
        raise FinetuneError(f"{option} {name}: there is no such file{_near(path)}", BAD_DATA)
    try:
        with path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise FinetuneError(f"{option} {name} cannot be read: {error.strerror}", BAD_DATA) from error


def _near(path: Path) -> str:
    """Return a question for the end of a message: a file there with nearly this name."""
    try:
        there = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    except OSError:
        return f", and no folder {path.parent}"
    found = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    return f": did you mean {path.parent / found[0]}?" if found else ""


def notes(facts: FileFacts, *, on_terminal: bool) -> list[str]:
    """Return what a user should know of the private file before training.

    Args:
        facts: counts about the file, which are private.
        on_terminal: whether only the user sees the text. Elsewhere, in a log say, it has no count.
    """
    if not on_terminal:
        return ["turns and calls of tools are left out"] if facts.tools else []
    forms = ", ".join(f"{rows} as {form}" for form, rows in facts.forms.items())
    found = [f"{sum(facts.forms.values())} private rows were read: {forms} (counts are shown on a terminal only)"]
    if facts.tools:
        found.append(f"{facts.tools} turns and calls of tools are left out")
    if facts.duplicates:
        found.append(
            f"{facts.duplicates} rows repeat an earlier row exactly. Each is a record; what k rows say is protected "
            "k times less. Take them out, or protect people with --group_by"
        )
    if facts.huge:
        found.append(
            f"{facts.huge} rows have more than {HUGE // 1000} kB: slow to read, and cut at --max_length tokens"
        )
    return found
