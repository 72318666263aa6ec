"""The file of results: one line of JSON for every entry that has ended, so that a run can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, WAITING = "passed", "failed", "skipped", "not run"


@dataclass
class Result:
    """How an entry ended: ``values`` are what its table shows, ``reason`` why it failed or was skipped."""

    entry: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)


class Results:
    """Results on disk, under a first line that says where they come from.

    Args:
        path: the file; it may exist.
        origin: what results must have in common: the machine, the versions, the sizes.

    Raises:
        ValueError: If the file has results of another origin.
    """

    def __init__(self, path: Path, origin: Mapping[str, str]) -> None:
        self.path, self.found = path, {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"origin": dict(origin)}) + "\n", encoding="utf-8")
            return
        before = json.loads(lines[0])["origin"]
        different = sorted(name for name in {*before, *origin} if before.get(name) != origin.get(name))
        if different:
            name = different[0]
            raise ValueError(
                f"{path} has results of another {name} ({before.get(name)}, now {origin.get(name)}): give another --out"
            )
        for line in lines[1:]:
            try:
                result = Result(**json.loads(line))
            except json.JSONDecodeError:  # the process was killed while it wrote the last line
                continue
            self.found[result.entry] = result

    def add(self, result: Result) -> None:
        """Keep a result; a later one of the same entry takes its place."""
        self.found[result.entry] = result
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._torn() + json.dumps(asdict(result)) + "\n")

    def _torn(self) -> bool:
        """Say whether the last line has no end."""
        return not self.path.read_bytes().endswith(b"\n")
