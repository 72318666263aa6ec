"""Random bits that nobody can predict: the key stream of AES-256 in counter mode, keyed by the operating system."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_ZEROS = bytes(1 << 20)
_LIMIT = 1 << 40
"""Bytes (2^36 cipher blocks) after which a stream takes a new key.

Blocks of one key never repeat, as random ones would; with so few of them nobody can tell (advantage 2^-57).
"""

SEED = 48
"""Bytes of a seed: key and first counter."""

Bits = npt.NDArray[np.uint64]


def _fresh() -> bytes:
    """Return a new key and a new first counter."""
    return os.urandom(32) + os.urandom(16)


class KeyStream:
    """AES-256-CTR key stream with key and first counter from ``os.urandom``; for one thread of one process.

    Args:
        seed: 48 secret bytes, key and first counter, for processes that have to draw alike; None for new ones.

    References:
        NIST SP 800-38A (counter mode), FIPS 197 (AES).
    """

    def __init__(self, seed: bytes | None = None) -> None:
        self._shared = seed is not None
        self._take_key(_fresh() if seed is None else seed)

    def _take_key(self, seed: bytes) -> None:
        if len(seed) != SEED:
            raise ValueError(f"the seed of a key stream has {SEED} bytes, got {len(seed)}")
        self._encryptor = Cipher(algorithms.AES(seed[:32]), modes.CTR(seed[32:])).encryptor()
        self._left = _LIMIT

    def _next_seed(self) -> bytes:
        """Return what the next key is made of: of shared streams their own bits, so that they stay alike."""
        return self._encryptor.update(bytes(SEED)) if self._shared else _fresh()

    def fill(self, words: Bits) -> None:
        """Overwrite ``words [n]`` with independent uniform 64-bit integers."""
        buffer = words.data.cast("B")
        for start in range(0, len(buffer), len(_ZEROS)):
            piece = buffer[start : start + len(_ZEROS)]
            if self._left < len(piece):
                self._take_key(self._next_seed())
            self._left -= len(piece)
            self._encryptor.update_into(memoryview(_ZEROS)[: len(piece)], piece)
