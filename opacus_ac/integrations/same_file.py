"""The check that a file of public data is not the private file. It needs no torch: it comes before anything large."""

from __future__ import annotations

import os
from pathlib import Path

from opacus_ac.integrations.file_digest import file_sha256


def same_file(public: str | os.PathLike[str], private: str | os.PathLike[str]) -> str | None:
    """Return a sentence that says how two paths are one file, or have the same content; None if they differ."""
    first, second = Path(public), Path(private)
    if not (first.is_file() and second.is_file()):
        return None
    if first.samefile(second):
        return f"{public} is the private file {private}" + (" under another name" if first != second else "")
    if first.stat().st_size == second.stat().st_size and file_sha256(first) == file_sha256(second):
        return f"{public} has the content of the private file {private}"
    return None
