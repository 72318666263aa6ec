"""The privacy ledger: every charge is on disk before its release, whatever crashes afterwards."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import Any

from filelock import FileLock

from opacus_ac.accounting import Event
from opacus_ac.budget.charges import RECORD, Charge, Limit
from opacus_ac.budget.ledger_lines import SECTOR, VERSIONS, Chain, encode_line
from opacus_ac.errors import LedgerError

__all__ = ["SECTOR", "VERSIONS", "PrivacyLedger", "repair"]


class PrivacyLedger:
    """Append-only account of all runs on one dataset, in a file.

    Args:
        path: the file; it is created with the first charge. A file beside it, ``path.lock``, keeps writers apart.
        mechanism: "gaussian" or "laplace", the noise that the reader's accountant knows; None takes either.

    Guarantees:
        :meth:`charge` returns when the charge is on disk. A crash can leave a charge without its release, never a
        release without its charge. Several processes may use one ledger at a time: each sees all charges before it adds
        its own. A line that was changed, lost, inserted or cut is found through the chain of hashes. Whole lines that
        are missing at the end, and a file replaced by an older copy, can only be found by comparing :attr:`head` with
        one noted elsewhere; a checkpoint holds one. The hashes are no signature: whoever may write the file can write
        another one. All charges are of one mechanism, which the first line says.

    Raises:
        LedgerError: If the file is damaged, no ledger, or of another mechanism; the message has the number of the line.
    """

    def __init__(self, path: str | os.PathLike[str], mechanism: str | None = None) -> None:
        self.path = Path(path)
        self.run = secrets.token_hex(8)
        self._lock = FileLock(f"{self.path}.lock")
        self._chain = Chain(self.path, mechanism)
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
        """Noise of the charges, "gaussian" or "laplace"; None where neither the file nor its reader has said so."""
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
        """Keep other writers out; the context gives the charges that others added since the last look."""
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
        """Write a charge. Call it inside of :meth:`locked`, before the release.

        Args:
            event: what the release costs.
            dataset_size: N, for the first line of a new ledger.
            unit: the privacy unit, for the first line of a new ledger.
            settings: public settings of the run, noted with its first charge.
            adaptive: whether rate or noise of the event may have followed from earlier releases; None if nobody knows.
            limit: the privacy filter that has accepted it.

        Raises:
            LedgerError: If the ledger is about another dataset or unit, or another mechanism.
            OSError: If the line cannot be written. The file is as before then, and nothing may be released.
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
        line, _ = encode_line(entry, self._chain.last)
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
        LedgerError: If a line before it is damaged; nothing is changed then.
    """
    path = Path(path)
    with FileLock(f"{path}.lock"):
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        chain = Chain(path)
        for line in BytesIO(data[:whole]):
            chain.take(line)
        if whole < len(data):
            os.truncate(path, whole)
    return len(data) - whole
