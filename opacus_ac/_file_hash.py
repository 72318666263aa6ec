"""The SHA-256 of a file. It needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK = 1 << 20


def file_sha256(path: Path) -> bytes:
    """Return the SHA-256 of what is in a file. It is read in blocks, as it may be larger than memory."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total.update(block)
    return total.digest()
