"""The privacy ledger: every charge is on disk before its release, whatever crashes afterwards.

A JSON line per charge, each with the hash of the line before. The lines are padded to whole disk sectors, so that a process
that is killed while it writes leaves a whole line or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

from filelock import FileLock

from opacus_ac.accounting import Event
from opacus_ac.budget.charges import RECORD, Charge, Limit, privacy_unit
from opacus_ac.errors import LedgerError

__all__ = ["SECTOR", "VERSIONS", "PrivacyLedger", "privacy_unit", "repair"]

VERSIONS = {1: "gaussian", 2: "laplace"}
"""What the charges of a ledger are, by the version in its first line: those who know version 1 only take all for Gaussian."""

SECTOR = 512
"""Lines are padded with spaces to a multiple of this many bytes: a sector and a page hold whole lines."""


def _canonical(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _encode(entry: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """Return (line as it is written, its hash)."""
    chained = {**entry, "previous": previous}
    digest = hashlib.sha256(_canonical(chained).encode()).hexdigest()
    text = _canonical({**chained, "hash": digest}).encode()
    return text + b" " * (-(len(text) + 1) % SECTOR) + b"\n", digest


def _origin(entry: Mapping[str, Any]) -> tuple[bool | None, Limit | None]:
    """Return what a line says of the origin of its charge: whether it is adaptive (None in old files), and its filter."""
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


class _Chain:
    """The lines of a ledger, checked one by one: each must be as it was written, and follow the one before.

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
        """Check one more line and take it in."""
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
                f"{str(self.mechanism).capitalize()} releases, which do not add up: {_REMEDIES[written]}, or a ledger of its own"
            )
        self.mechanism = written

    def check_mechanism(self, event: Event, number: int) -> None:
        """Raise ``LedgerError`` for a charge of another kind than the ledger's."""
        if event.mechanism != self.mechanism:
            raise LedgerError(
                f"{self.path}:{number}: a {event.mechanism.capitalize()} release in a ledger of "
                f"{str(self.mechanism).capitalize()} ones: no accountant here adds them up. Use a ledger of its own for each"
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
                f"{where}: the last line is incomplete. If a full disk or a power failure explains that, its step was not "
                "released: opacus_ac.budget.ledger.repair(path) drops it. If the file was copied, copy it again"
            )
        try:
            entry = json.loads(line)
            digest = entry.pop("hash")
            previous = entry.pop("previous")
            intact = _encode(entry, previous) == (line, digest)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise LedgerError(
                f"{where}: damaged, or not a line of a privacy ledger: restore the file from a copy"
            ) from None
        if not intact:
            raise LedgerError(f"{where}: the line was changed after it was written: restore the file from a copy")
        if previous != self.last:
            raise LedgerError(f"{where}: a line before this one is missing or changed: restore the file from a copy")
        return entry, digest


class PrivacyLedger:
    """Append-only account of all runs on one dataset, in a file.

    Args:
        path: the file; it is created with the first charge. A file beside it, ``path.lock``, keeps writers apart.
        mechanism: "gaussian" or "laplace", what the reader's accountant can account for; None takes either.

    Guarantees:
        :meth:`charge` returns when the charge is on disk, so a crash can leave a charge without its release, never a release
        without its charge. Several processes may use one ledger at a time: each sees all charges before it adds its own.
        A line that was changed, lost, inserted or cut is found through the chain of hashes. Lines cut off as a whole from the
        end, and a file replaced by an older copy, can only be found by comparing :attr:`head` with one noted elsewhere; a
        checkpoint holds one. The hashes are no signature: whoever may write the file can write another one. All charges are of
        one mechanism, which the first line says.

    Raises:
        LedgerError: the file is damaged, no ledger, or one of another mechanism; with the number of the line.
    """

    def __init__(self, path: str | os.PathLike[str], mechanism: str | None = None) -> None:
        self.path = Path(path)
        self.run = secrets.token_hex(8)
        self._lock = FileLock(f"{self.path}.lock")
        self._chain = _Chain(self.path, mechanism)
        if self.path.exists():
            with self._lock:
                self._read_on()

    @property
    def charges(self) -> list[Event]:
        """Every charge known so far, in order, of all runs."""
        return [charge.event for charge in self._chain.charges]

    def __len__(self) -> int:
        """Number of charges known so far."""
        return len(self._chain.charges)

    def entries(self, start: int = 0) -> list[Charge]:
        """Return the charges from number ``start`` on, with what is noted of their origin."""
        return self._chain.charges[start:]

    @property
    def unit(self) -> str | None:
        """What all charges protect; None before the first."""
        return None if self._chain.header is None else str(self._chain.header["unit"])

    @property
    def last_settings(self) -> dict[str, Any] | None:
        """Public settings of the run that began last; None before the first."""
        return self._chain.settings

    def refresh(self) -> None:
        """Read and check what other processes have written since the last look."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._chain.size:
            with self._lock:
                self._read_on()

    @property
    def mechanism(self) -> str | None:
        """What the charges are, "gaussian" or "laplace"; None where neither the file nor its reader has said so."""
        return self._chain.mechanism

    @property
    def head(self) -> dict[str, Any]:
        """Number of lines and hash of the last one, to be noted elsewhere; see :meth:`check_head`."""
        return {"lines": len(self._chain.hashes), "hash": self._chain.last}

    @property
    def summary(self) -> str:
        """The ledger in words, for the report."""
        runs = len(self._chain.runs)
        return (
            f"{len(self._chain.charges)} charges of {runs} run{'' if runs == 1 else 's'}, head {self._chain.last[:16]}"
        )

    def _read_on(self) -> list[Event]:
        """Read and check what was written since the last look; return its events."""
        chain = self._chain
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < chain.size:
            raise LedgerError(
                f"{self.path}:{len(chain.hashes)}: lines vanished while the ledger was in use: restore it from a copy"
            )
        before = len(chain.charges)
        if size > chain.size:
            with self.path.open("rb") as file:
                file.seek(chain.size)
                for line in file:
                    chain.take(line)
        return [charge.event for charge in chain.charges[before:]]

    def check_dataset(self, dataset_size: int, unit: str = RECORD) -> None:
        """Raise ``LedgerError`` when the ledger is about another dataset or another privacy unit."""
        header = self._chain.header or {}
        for name, value in {"dataset_size": dataset_size, "unit": unit}.items():
            if header.get(name, value) != value:
                raise LedgerError(
                    f"{self.path}:1: the ledger has {name} {header[name]!r}, this run {value!r}: charges of different "
                    "datasets or units do not add up. Use a ledger of its own for this dataset"
                )

    def check_head(self, head: Mapping[str, Any]) -> None:
        """Raise ``LedgerError`` unless the ledger continues from ``head``, as noted earlier."""
        hashes = self._chain.hashes
        lines = int(head["lines"])
        if lines > len(hashes):
            raise LedgerError(
                f"{self.path}:{len(hashes) + 1}: the ledger has {len(hashes)} lines, but had {lines} before: lines are "
                "missing at the end, or it is another ledger"
            )
        if lines and hashes[lines - 1] != head["hash"]:
            raise LedgerError(f"{self.path}:{lines}: the ledger is another one than before: the hashes differ")

    @contextmanager
    def locked(self) -> Iterator[list[Event]]:
        """Keep other writers out; gives the charges that others added since the last look."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            yield self._read_on()

    def charge(
        self,
        event: Event,
        *,
        dataset_size: int,
        unit: str = RECORD,
        settings: Mapping[str, Any],
        adaptive: bool | None = False,
        limit: Limit | None = None,
    ) -> None:
        """Write a charge; call it inside of :meth:`locked`, before the release.

        Args:
            event: what the release costs.
            dataset_size: N, for the first line of a new ledger.
            unit: the privacy unit, likewise.
            settings: public settings of the run, noted with its first charge.
            adaptive: whether rate or noise of the event may have followed from earlier releases; None if nobody knows.
            limit: the privacy filter that has accepted it.

        Raises:
            LedgerError: the ledger is about another dataset or unit, or another mechanism.
            OSError: the line could not be written; the file is as before, and nothing may be released.
        """
        self.check_dataset(dataset_size, unit)
        if self.mechanism is not None:
            self._chain.check_mechanism(event, len(self._chain.hashes) + 1)
        if self._chain.header is None:
            version = next(number for number, mechanism in VERSIONS.items() if mechanism == event.mechanism)
            self._append({"kind": "ledger", "version": version, "dataset_size": dataset_size, "unit": unit})
        if self.run not in self._chain.runs:
            started = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self._append({"kind": "run", "run": self.run, "started": started, "settings": dict(settings)})
        values = {name: value for name, value in asdict(event).items() if value is not None}
        origin: dict[str, Any] = {} if adaptive is None else {"adaptive": adaptive}
        if limit is not None:
            origin["limit"] = [limit.order, limit.budget]
        self._append({"kind": "charge", "run": self.run, **values, **origin})

    def _append(self, entry: dict[str, Any]) -> None:
        line, _ = _encode(entry, self._chain.last)
        new = not self.path.exists()
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            try:
                written = os.write(handle, line)
                if written != len(line):
                    raise OSError(f"{self.path}: {written} of {len(line)} bytes could be written: is the disk full?")
                os.fsync(handle)
            except BaseException:
                os.ftruncate(handle, self._chain.size)
                raise
        finally:
            os.close(handle)
        if new:
            _sync_directory(self.path.parent)
        self._chain.take(line)


def _sync_directory(folder: Path) -> None:
    """Make the name of a new file durable, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def repair(path: str | os.PathLike[str]) -> int:
    """Drop an incomplete last line, whose step was never released, and return its length in bytes; 0 if there is none.

    Raises:
        LedgerError: a line before it is damaged; nothing is changed.
    """
    path = Path(path)
    with FileLock(f"{path}.lock"):
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        chain = _Chain(path)
        for line in BytesIO(data[:whole]):
            chain.take(line)
        if whole < len(data):
            os.truncate(path, whole)
    return len(data) - whole
