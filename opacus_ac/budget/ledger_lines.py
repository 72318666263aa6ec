"""The lines of a privacy ledger: how each is written, and how all are checked as they are read.

A line is a JSON object with the hash of the line before. Lines are padded to whole disk sectors, so that a process that
is killed while it writes leaves a whole line or none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from opacus_ac.accounting import Event
from opacus_ac.budget.charges import Charge, Limit
from opacus_ac.errors import LedgerError

VERSIONS = {1: "gaussian", 2: "laplace"}
"""What the charges of a ledger are, by the version in its first line. Readers of version 1 assume Gaussian charges."""

SECTOR = 512
"""Lines are padded with spaces to a multiple of this many bytes, so that a sector and a page hold whole lines."""


def _canonical(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode_line(entry: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """Return the line of an entry as it is written, and its hash.

    Args:
        entry: content of the line.
        previous: hash of the line before; empty for the first.
    """
    chained = {**entry, "previous": previous}
    digest = hashlib.sha256(_canonical(chained).encode()).hexdigest()
    text = _canonical({**chained, "hash": digest}).encode()
    return text + b" " * (-(len(text) + 1) % SECTOR) + b"\n", digest


def _origin(entry: Mapping[str, Any]) -> tuple[bool | None, Limit | None]:
    """Return whether the charge of a line is adaptive (None in old files), and the filter that accepted it."""
    adaptive, limit = entry.get("adaptive"), entry.get("limit")
    if adaptive is not None and not isinstance(adaptive, bool):
        raise ValueError(f"adaptive = {adaptive!r} is neither true nor false")
    if limit is None:
        return adaptive, None
    order, budget = (float(value) for value in limit)
    if not (order > 1.0 and 0.0 < budget < float("inf")):
        raise ValueError(f"limit = {limit!r} is no order and budget of a privacy filter")
    return adaptive, Limit(order, budget)


_REMEDIES = {"gaussian": 'use an accountant such as "vrdp"', "laplace": 'use accountant="pure"'}


class Chain:
    """The lines of a ledger, checked one by one. Each must be as it was written, and follow the one before.

    Args:
        path: the file, for messages.
        mechanism: what its charges have to be; None for whatever its first line says.
    """

    def __init__(self, path: Path, mechanism: str | None = None) -> None:
        self.path, self.mechanism = path, mechanism
        self.size = 0  # bytes of the lines taken in
        self.hashes: list[str] = []
        self.header: dict[str, Any] | None = None
        self.runs: set[str] = set()
        self.settings: dict[str, Any] | None = None  # of the run that began last
        self.charges: list[Charge] = []

    @property
    def last(self) -> str:
        """Hash of the last line; empty before the first."""
        return self.hashes[-1] if self.hashes else ""

    def take(self, line: bytes) -> None:
        """Check one more line and take it in.

        Raises:
            LedgerError: If it is damaged, out of place, or no line of a ledger.
        """
        number = len(self.hashes) + 1
        entry, digest = self._check(line, number)
        if number == 1:
            self._begin(entry)
        try:
            self._add(entry, number)
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"{self.path}:{number}: not a line of a privacy ledger: {error}") from error
        self.hashes.append(digest)
        self.size += len(line)

    def _begin(self, entry: dict[str, Any]) -> None:
        """Learn from the first line what the charges are."""
        version = entry.get("version")
        written = VERSIONS.get(version) if entry.get("kind") == "ledger" and isinstance(version, int) else None
        if written is None:
            raise LedgerError(f"{self.path}:1: no privacy ledger of version {' or '.join(map(str, VERSIONS))}")
        if self.mechanism not in (None, written):
            raise LedgerError(
                f"{self.path}:1: the ledger holds {written.capitalize()} releases, and the accountant is one of "
                f"{str(self.mechanism).capitalize()} releases, which do not add up: {_REMEDIES[written]}, or a ledger "
                "of its own"
            )
        self.mechanism = written

    def check_mechanism(self, event: Event, number: int) -> None:
        """Raise ``LedgerError`` for a charge of another kind than the ledger's."""
        if event.mechanism != self.mechanism:
            raise LedgerError(
                f"{self.path}:{number}: a {event.mechanism.capitalize()} release in a ledger of "
                f"{str(self.mechanism).capitalize()} ones: no accountant here adds them up. Use a ledger of its own "
                "for each"
            )

    def _add(self, entry: dict[str, Any], number: int) -> None:
        kind = entry.get("kind")
        if kind == "charge":
            values = {f.name: entry[f.name] for f in fields(Event) if f.name in entry}
            event = Event(**values)  # old lines do not name their mechanism: it is Gaussian
            self.check_mechanism(event, number)
            self.charges.append(Charge(event, *_origin(entry)))
        elif kind == "run":
            self.runs.add(entry["run"])
            self.settings = dict(entry.get("settings") or {})
        elif kind == "ledger" and number == 1:
            self.header = {"dataset_size": int(entry["dataset_size"]), "unit": str(entry["unit"])}
        else:
            raise ValueError(f"unknown kind {kind!r}")

    def _check(self, line: bytes, number: int) -> tuple[dict[str, Any], str]:
        """Return the content of a line and its hash."""
        where = f"{self.path}:{number}"
        if not line.endswith(b"\n"):
            raise LedgerError(
                f"{where}: the last line is incomplete. If a full disk or a power failure explains that, its step was "
                "not released: opacus_ac.budget.ledger.repair(path) drops it. If the file was copied, copy it again"
            )
        try:
            entry = json.loads(line)
            digest = entry.pop("hash")
            previous = entry.pop("previous")
            intact = encode_line(entry, previous) == (line, digest)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise LedgerError(
                f"{where}: damaged, or not a line of a privacy ledger: restore the file from a copy"
            ) from None
        if not intact:
            raise LedgerError(f"{where}: the line was changed after it was written: restore the file from a copy")
        if previous != self.last:
            raise LedgerError(f"{where}: a line before this one is missing or changed: restore the file from a copy")
        return entry, digest
