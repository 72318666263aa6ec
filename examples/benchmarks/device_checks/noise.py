"""Noise made on the device beside noise made by the processor, as ``benchmark_noise.py`` measures it."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "benchmark_noise.py"
_ROW = re.compile(r"^(\S.*?)\s{2,}([\d.]+)\s+([\d.]+)\s+\(")


@dataclass(frozen=True)
class Noise:
    """Throughput of everything that makes noise for weights there."""

    name: str
    seconds: float

    def run(self, device: str, tiny: bool) -> dict[str, Any]:
        """Measure; return millions of values a second by what makes them.

        Raises:
            RuntimeError: If the script fails; with its last line.
        """
        size, rounds = (20_000, 1) if tiny else (100_000_000, 3)
        command = [sys.executable, str(SCRIPT), "--device", device, "--rounds", str(rounds), "--size", str(size)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=self.seconds)
        rates = {row[1]: float(row[2]) for line in done.stdout.splitlines() if (row := _ROW.match(line))}
        if done.returncode or not rates:
            raise RuntimeError((done.stderr.strip() or "the script printed nothing").splitlines()[-1])
        return {"size": size, "rates": rates}
