"""Files that hold a run: written atomically, read without running code, checked as a whole before they are loaded."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opacus_ac._bytes import raw_bytes

DIGEST = "digest"


def write(state: dict[str, Any], path: Any, **save_options: Any) -> None:
    """Save ``state`` to a binary file object, or to a path, where the file is replaced as a whole or not at all."""
    if not isinstance(path, str | os.PathLike):
        torch.save(state, path, **save_options)
        return
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file, **save_options)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def digest(state: Mapping[str, Any]) -> str:
    """Return a hash over names, types and values of all entries but the digest itself.

    It finds damage and edits made without it in mind; it is no signature.
    """
    total = hashlib.sha256()
    _update(total, {key: value for key, value in state.items() if key != DIGEST})
    return total.hexdigest()


def _update(total: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        total.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        total.update(raw_bytes(value).data)
    elif isinstance(value, Mapping):
        total.update(f"mapping {len(value)};".encode())
        for key in sorted(value, key=repr):
            total.update(f"{key!r}:".encode())
            _update(total, value[key])
    elif isinstance(value, list | tuple):
        total.update(f"sequence {len(value)};".encode())
        for item in value:
            _update(total, item)
    else:
        total.update(f"{type(value).__name__} {value!r};".encode())


def check_digest(state: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` when the entries are not those that the digest was computed from."""
    if state[DIGEST] != digest(state):
        raise ValueError("the checkpoint was changed after it was written, or is damaged: its digest differs")


def check_settings(saved: Mapping[str, Any] | None, mine: Mapping[str, Any] | None) -> None:
    """Raise ``ValueError`` when a run would continue under other privacy settings than it began with.

    Args:
        saved: public settings of the run that was saved; None if none had begun.
        mine: public settings of this run; None for an optimizer that the engine did not make.
    """
    if saved is None or mine is None:
        return  # an optimizer that this engine did not make: its own state is checked
    for name in sorted(saved.keys() | mine.keys()):
        if saved.get(name) != mine.get(name):
            raise ValueError(
                f"the checkpoint was written with {name} = {saved.get(name)!r}, this run has {mine.get(name)!r}: call "
                "make_private with the same settings"
            )
