"""Keeps findings in a file, one JSON object per line, so that a run goes on where it stopped."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import opacus_ac
from opacus_ac.testing.coverage.case import Finding

PACKAGES = ("torch", "transformers", "peft")
MISSING = "missing"


def versions() -> dict[str, str]:
    """Return the versions that a finding holds for; that of this package ends in a digest of its source files."""
    found = {name: _version(name) for name in PACKAGES}
    digest = hashlib.sha256()
    for path in sorted(Path(str(opacus_ac.__file__)).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return {**found, "opacus_ac": f"{opacus_ac.__version__}+{digest.hexdigest()[:8]}"}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def kept(path: Path) -> dict[tuple[Any, ...], Finding]:
    """Return the findings in a file by their keys, none where there is no file; a line that is cut off is left out."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            finding = Finding(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[finding.key()] = finding
    return found


def keep(path: Path, finding: Finding, of: Mapping[str, str]) -> None:
    """Append a finding to a file.

    Args:
        path: the file, which need not exist.
        finding: what came of a case.
        of: the versions that it holds for.
    """
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(finding), "versions": dict(of)}) + "\n")
