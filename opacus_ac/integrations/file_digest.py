"""The digest of a file's content. It needs no torch: files are compared before anything large is imported."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(path: Path) -> bytes:
    """Return the SHA-256 of a file's content, read a MiB at a time.

    Raises:
        OSError: If the file cannot be read.
    """
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.digest()
