"""A plugin of pytest that writes a line for every test as it ends, and leaves out those that have a line.

So a run that is stopped, by its time limit or by a GPU that answers with errors only, loses no result and goes on where it
stopped. ``DEVICE_CHECK_LINES`` names the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "DEVICE_CHECK_LINES"
PASSED, FAILED, ERROR, SKIPPED = "passed", "failed", "error", "skipped"


def read(path: Path) -> dict[str, dict[str, str]]:
    """Return the outcome of every test that has a line, by its name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {entry["test"]: entry for entry in map(json.loads, filter(None, lines))}


def forget_bad(path: Path) -> None:
    """Take the lines of tests that did not pass out, so that they run again."""
    kept = [entry for entry in read(path).values() if entry["outcome"] not in (FAILED, ERROR)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


def _path() -> Path:
    return Path(os.environ[VARIABLE])


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out what an earlier process has run."""
    done = read(_path())
    left_out = [item for item in items if item.nodeid in done]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in done]


def outcome(when: str, result: str) -> str | None:
    """Return the word for a phase of a test; None where the phase decides nothing."""
    if result == "failed":
        return FAILED if when == "call" else ERROR
    if result == "skipped":
        return SKIPPED
    return PASSED if when == "call" else None


def pytest_runtest_logreport(report: Any) -> None:
    """Write the outcome of a phase; what fails at the end of a test takes the place of its pass."""
    word = outcome(report.when, report.outcome)
    if word is None:
        return
    text = (
        report.longrepr[2]
        if isinstance(report.longrepr, tuple)
        else str(getattr(report.longrepr, "reprcrash", "") or "")
    )
    line = {"test": report.nodeid, "outcome": word, "reason": (text or str(report.longrepr or "")).strip()[-600:]}
    with _path().open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collectreport(report: Any) -> None:
    """Write a file that could not be read as an error: its tests are missing."""
    if report.outcome == "failed" or (report.outcome == "skipped" and report.longrepr):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        line = {
            "test": report.nodeid,
            "outcome": ERROR if report.outcome == "failed" else SKIPPED,
            "reason": reason[-600:],
        }
        with _path().open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


__all__ = ["ERROR", "FAILED", "PASSED", "SKIPPED", "VARIABLE", "forget_bad", "outcome", "read"]
