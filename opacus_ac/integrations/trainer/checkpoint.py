"""The privacy state in a checkpoint folder of the Trainer: what the run has spent, and hashes of all files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opacus_ac.checkpoint.file import DIGEST, check_digest
from opacus_ac.checkpoint.one_process import SETTINGS
from opacus_ac.engine.privacy_engine import PrivacyEngine
from opacus_ac.integrations.file_digest import file_sha256
from opacus_ac.integrations.trained.card import SECOND_CARD
from opacus_ac.integrations.trained.folder import CARD

PRIVACY_STATE = "privacy_state.pt"
"""File beside ``optimizer.pt`` with accountant, settings, head of the ledger, step, and hashes of all other files."""

_INERT = (".md", ".csv", ".html", ".png", ".svg", ".log")
"""Suffixes of files that may be added to a folder later: nothing loads them. ``vocab.txt`` is loaded."""


_UNCHECKED = (PRIVACY_STATE, CARD, SECOND_CARD)


def save(engine: PrivacyEngine, folder: Path, step: int) -> None:
    """Write the privacy state of a folder that has all other files already. Every rank calls this; rank 0 writes."""
    files = engine.reducer.on_first(lambda: _digests(folder))
    engine.save_account(folder / PRIVACY_STATE, step=step, files=files)


@contextmanager
def sealing(state: Any, seal: Callable[[], None], *, writes: bool) -> Iterator[None]:
    """Return a context that calls ``seal`` once, after the last file of a checkpoint has been written.

    The call comes before the Trainer pushes the checkpoint or deletes older ones.

    Args:
        state: the ``TrainerState``, which the Trainer writes last.
        seal: writes the privacy state; every rank calls it.
        writes: whether this rank writes ``state``.
    """

    def save_to_json(path: str) -> None:
        type(state).save_to_json(state, path)
        seal()

    if writes:
        state.save_to_json = save_to_json
    try:
        yield
        if not writes:
            seal()
    finally:
        vars(state).pop("save_to_json", None)


def verify(engine: PrivacyEngine, folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse, on every rank alike, a folder that is not one whole checkpoint of a run with these public settings.

    Raises:
        ValueError: If a file is missing, new or changed, if a setting differs, or if ranks read different folders.
        LedgerError: If the ledger does not contain the charges that the checkpoint states.
    """
    ranks = engine.reducer
    state: dict[str, Any] = {}
    error: Exception | None = None
    try:
        state = _verified(engine, folder, settings)
    except Exception as reason:  # raised again below, after the other ranks have heard of it
        error = reason
    found = ranks.gather_objects((state.get(DIGEST), None if error is None else str(error)))
    if error is not None:
        raise error
    for rank, (digest, failure) in enumerate(found):
        if failure is not None:
            raise ValueError(f"rank {rank} cannot resume: {failure}")
        if digest != found[0][0]:
            raise ValueError(
                f"ranks 0 and {rank} read different checkpoints at {folder}: use a folder that all of them see"
            )
    engine.check_account(state)


def _verified(engine: PrivacyEngine, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the privacy state of the folder as this rank reads it, after a check of all files."""
    state = _read(engine, folder)
    _check_settings(state[SETTINGS] or {}, settings)
    wrong = _wrong_files(folder, state["files"])
    if wrong is not None:
        raise ValueError(wrong)
    return state


def damage(folder: Path) -> str | None:
    """Return what is missing, new or changed in a checkpoint; None for a whole one.

    No setting and no ledger is looked at. A run that is killed while it writes a checkpoint, or whose disk is full
    then, leaves one that is not whole.
    """
    path = folder / PRIVACY_STATE
    if not path.is_file():
        return f"{folder} is no whole checkpoint: {PRIVACY_STATE}, which is written last, is missing"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_digest(state)
        return _wrong_files(folder, state["files"])
    except Exception as error:  # whatever a damaged file makes its readers raise
        return f"{path} is damaged ({' '.join(str(error).split())[:120]})"


def _wrong_files(folder: Path, written: Mapping[str, Any]) -> str | None:
    """Return a sentence about the files that are not as ``written`` says; None where all are."""
    found = _digests(folder)
    known = written.keys() | {name for name in found if Path(name).suffix not in _INERT}
    wrong = sorted(name for name in known if found.get(name) != written.get(name))
    if not wrong:
        return None
    more = f" ({len(wrong)} files in all)" if len(wrong) > 1 else ""
    return f"{folder / wrong[0]} is missing, new or changed since the checkpoint was written{more}"


def load(engine: PrivacyEngine, folder: Path) -> None:
    """Take over what the checkpoint's run has spent. Every rank calls this, after :func:`verify`."""
    engine.load_account(_read(engine, folder))


def _read(engine: PrivacyEngine, folder: Path) -> dict[str, Any]:
    path = folder / PRIVACY_STATE
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: what the run has spent is not known, so it cannot be resumed. Resume from a "
            "checkpoint of PrivateTrainer that was saved without save_only_model"
        )
    return engine.read_account(path, "step", "files")


def _digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file but the privacy state, the cards, and hidden files.

    A person may edit a card, and a download keeps its notes in hidden files.
    """
    files = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    checked = (path for path in files if path.name not in _UNCHECKED and not _is_hidden(path))
    return {path.as_posix(): file_sha256(folder / path).hex() for path in checked}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check_settings(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    for name in sorted(theirs.keys() | mine.keys()):
        if theirs.get(name) != mine.get(name):
            raise ValueError(
                f"the checkpoint was written with {name} = {theirs.get(name)!r}, this run has {mine.get(name)!r}: "
                "resume with the same PrivacyArguments, batch size, dataset and number of steps"
            )
