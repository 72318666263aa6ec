"""Everything that is checked, in the order of its importance, and one process that works on it."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from device_checks.batteries import BATTERIES, Battery
from device_checks.lengths import Lengths
from device_checks.noise import Noise
from device_checks.results import FAILED, PASSED, SKIPPED, Result
from device_checks.speed import SPEEDS

EXACTNESS, SPEED, NOISE, LENGTH = "exactness", "speed and memory", "noise", "memory against length"
_KINDS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (EXACTNESS, BATTERIES[:2]),
    (SPEED, SPEEDS[:2]),
    (NOISE, (Noise("noise of the device", 60),)),
    (EXACTNESS, BATTERIES[2:]),
    (SPEED, SPEEDS[2:]),
    (LENGTH, (Lengths("peak memory", 60),)),
)
ENTRIES: dict[str, tuple[str, Any]] = {entry.name: (part, entry) for part, group in _KINDS for entry in group}
"""Name -> part of the check, and what runs it."""


def work(pipe: Connection, device: str, tiny: bool) -> None:
    """Body of the process: run entries as they come, until None does."""
    warnings.filterwarnings("ignore")
    while (entry := pipe.recv()) is not None:
        try:
            answer = (PASSED, entry.run(device, tiny))
        except Exception as error:
            traceback.print_exc()
            answer = (FAILED, f"{type(error).__name__}: {error}".splitlines()[0])
        pipe.send(answer)


class Process:
    """Runs entries in a process of their own, so that one that hangs, or breaks the GPU, spoils no other."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.child: Any = None

    def run(self, name: str, folder: Path, seconds: float) -> Result:
        """Run an entry and return its result; after a failure the next entry has a new process."""
        entry, start = ENTRIES[name][1], time.monotonic()
        for package in getattr(entry, "needs", ()):
            if importlib.util.find_spec(package) is None:
                return Result(name, SKIPPED, f"{package} is not installed")
        tests = isinstance(entry, Battery)
        result = entry.run(self.device, self.tiny, folder, seconds) if tests else self._ask(name, entry, seconds)
        result.seconds = round(time.monotonic() - start, 1)
        return result

    def _ask(self, name: str, entry: Any, seconds: float) -> Result:
        self._start()
        try:
            self.pipe.send(entry)
            if not self.pipe.poll(seconds):
                self.stop(at_once=True)
                return Result(name, FAILED, f"stopped after {seconds:.0f} s")
            status, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.child.join()
            status, answer = FAILED, f"the process ended with status {self.child.exitcode} (-9: probably out of memory)"
        if status == FAILED:
            self.stop(at_once=True)
            return Result(name, FAILED, answer)
        return _judged(name, answer)

    def _start(self) -> None:
        if self.child is not None:
            return
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.child = context.Process(target=work, args=(theirs, self.device, self.tiny))
        self.child.start()
        theirs.close()

    def stop(self, at_once: bool = False) -> None:
        """End the process, if there is one."""
        if self.child is None:
            return
        with contextlib.suppress(OSError):
            self.child.kill() if at_once else self.pipe.send(None)
        self.child.join()
        self.pipe.close()
        self.child = None


def _judged(name: str, values: dict[str, Any]) -> Result:
    """Return the result of what ran to its end: it failed where a variant of this package, or the ordinary step, did."""
    for variant, figures in values.get("figures", {}).items():
        if figures["failure"] and not variant.startswith("opacus-"):
            return Result(name, FAILED, f"{variant}: {figures['failure'].splitlines()[-1]}", values=values)
    for variant, lengths in values.get("mib", {}).items():
        reason = next(
            (value for value in lengths.values() if isinstance(value, str) and "OutOfMemory" not in value), None
        )
        if reason is not None:
            return Result(name, FAILED, f"{variant}: {reason}", values=values)
    return Result(name, PASSED, values=values)


def allowance(name: str) -> float:
    """Return the seconds that an entry may take."""
    return float(ENTRIES[name][1].seconds) * float(os.environ.get("DEVICE_CHECK_PATIENCE", "1"))
