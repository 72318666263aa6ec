"""Entries for ``device_check.py`` that go wrong, each in a way of its own; the script's process imports them from here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wrong:
    """An entry that raises, kills its process, or never ends."""

    name: str
    way: str
    seconds: float = 60.0

    def run(self, device: str, tiny: bool) -> dict[str, Any]:
        if self.way == "dies":
            os._exit(7)
        if self.way == "hangs":
            time.sleep(600)
        raise RuntimeError("CUDA error: planted\nand a second line")
