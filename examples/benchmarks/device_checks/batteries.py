"""Exactness on the device: test files that take a device, run by pytest in a process of its own."""

from __future__ import annotations

import collections
import importlib.util
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from device_checks import pytest_lines
from device_checks.results import FAILED, PASSED, SKIPPED, Result

ROOT = Path(__file__).parents[3]
_RESTARTS = 3
_WORDS = (pytest_lines.PASSED, pytest_lines.FAILED, pytest_lines.ERROR, pytest_lines.SKIPPED)


@dataclass(frozen=True)
class Battery:
    """A test file; ``few`` chooses some tests of it by pytest's ``-k``, for a machine without a GPU."""

    name: str
    file: str
    few: str
    seconds: float

    def run(self, device: str, tiny: bool, folder: Path, seconds: float) -> Result:
        """Run the tests that have no result yet, in new processes while one ends early."""
        if (reason := _missing(ROOT / self.file)) is not None:
            return Result(self.name, SKIPPED, reason)
        lines = folder / f"{self.name.replace(' ', '-')}.tests.jsonl"
        pytest_lines.forget_bad(lines)
        start, reason = time.monotonic(), ""
        for _ in range(_RESTARTS):
            known = len(pytest_lines.read(lines))
            left = seconds - (time.monotonic() - start)
            reason = self._process(device, tiny, lines, left)
            if not reason or left <= 0 or len(pytest_lines.read(lines)) == known:
                break
        return self._result(pytest_lines.read(lines), reason)

    def _process(self, device: str, tiny: bool, lines: Path, seconds: float) -> str:
        """Run pytest once; return why it ended early, or ""."""
        command = [sys.executable, "-m", "pytest", "-p", "device_checks.pytest_lines", "-p", "no:cacheprovider"]
        command += ["-q", "--tb=short", self.file, *(["-k", self.few] if tiny else [])]
        path = [str(ROOT / "examples" / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        variables = {
            pytest_lines.VARIABLE: str(lines.resolve()),
            "OPACUS_AC_TEST_DEVICE": device,
            "PYTHONPATH": os.pathsep.join(path),
        }
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **variables},
                capture_output=True,
                text=True,
                timeout=max(1, seconds),
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        if done.returncode in (0, 1, 5):  # 5: every test has its result from before
            return ""
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        return next((line for line in said if "Exit:" in line), said[-1] if said else f"pytest: {done.returncode}")

    def _result(self, tests: dict[str, dict[str, str]], reason: str) -> Result:
        counts = collections.Counter(test["outcome"] for test in tests.values())
        bad = {name: test["reason"] for name, test in tests.items() if test["outcome"] in ("failed", "error")}
        values = {"counts": {word: counts[word] for word in _WORDS}, "bad": bad}
        if bad and not reason:
            name, why = next(iter(bad.items()))
            reason = f"{name.rpartition('::')[2] or name}: {why.splitlines()[-1] if why else 'no reason was given'}"
        if not tests and not reason:
            reason = "no test was found"
        skips = [test["reason"] for test in tests.values() if test["outcome"] == pytest_lines.SKIPPED]
        if not reason and skips and not counts[pytest_lines.PASSED]:
            return Result(self.name, SKIPPED, skips[0], values=values)
        return Result(self.name, FAILED if reason else PASSED, reason, values=values)


def _missing(file: Path) -> str | None:
    """Return why tests cannot be run here."""
    if not file.exists():
        return f"{file} is not there: run the script from a checkout"
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    return None


BATTERIES = (
    Battery(
        "private runs",
        "tests/engine/test_devices.py",
        "fixed or fused_step or autocast and gpt2 or zeroth and sphere",
        150,
    ),
    Battery("routes and shards", "tests/engine/test_device_routes.py", "one_rank and gpt2", 60),
    Battery("gradients", "tests/grad_sample/test_book_keeping.py", "one_token or both_routes and opt", 120),
    Battery("noise kernel", "tests/noise/test_device_noise.py", "every_value and 7", 60),
)
