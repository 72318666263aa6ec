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

Bits = npt.NDArray[np.uint64]


class KeyStream:
    """AES-256-CTR key stream with key and first counter from ``os.urandom``; for one thread of one process.

    References:
        NIST SP 800-38A (counter mode), FIPS 197 (AES).
    """

    def __init__(self) -> None:
        self._take_key()

    def _take_key(self) -> None:
        key, counter = os.urandom(32), os.urandom(16)
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()
        self._left = _LIMIT

    def fill(self, words: Bits) -> None:
        """Overwrite ``words [n]`` with independent uniform 64-bit integers."""
        buffer = words.data.cast("B")
        for start in range(0, len(buffer), len(_ZEROS)):
            piece = buffer[start : start + len(_ZEROS)]
            if self._left < len(piece):
                self._take_key()
            self._left -= len(piece)
            self._encryptor.update_into(memoryview(_ZEROS)[: len(piece)], piece)
