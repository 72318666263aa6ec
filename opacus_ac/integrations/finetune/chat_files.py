"""Reads dialogues from local files. Nothing is copied to a cache, and an error names file and line."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import sys
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from opacus_ac.integrations.finetune.chat_forms import (
    ROLES,
    TEXT,
    Messages,
    RowFacts,
    dialogue,
    from_text,
    meant,
    shown_columns,
)

__all__ = [
    "HUGE", "ROLES", "FileFacts", "Messages", "private_cache_dir", "read_dialogues", "read_jsonl", "read_users",
]  # fmt: skip

Parsed = TypeVar("Parsed")
HUGE = 100_000
"""Bytes of text above which a row is counted as huge."""


@dataclass
class FileFacts:
    """Counts about a file. They are private: for the terminal of whoever owns the data, and for no file.

    Attributes:
        forms: number of rows by the columns that were read.
        duplicates: rows that say exactly what an earlier row says.
        huge: rows of more than :data:`HUGE` bytes of text.
        tools: turns and calls of tools that were left out.
    """

    forms: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    huge: int = 0
    tools: int = 0
    _seen: set[bytes] = field(default_factory=set, repr=False)

    def add(self, parsed: Any, row: RowFacts) -> None:
        """Count one row, as :func:`read_dialogues` or :func:`read_users` has parsed it."""
        text = json.dumps(parsed, ensure_ascii=False).encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=16).digest()
        self.forms[row.form] += 1
        self.duplicates += digest in self._seen
        self.huge += len(text) > HUGE
        self.tools += row.tools
        self._seen.add(digest)


def read_dialogues(path: str | os.PathLike[str], facts: FileFacts | None = None) -> list[Messages]:
    """Read the dialogues of a file, one per row.

    The file is ``.jsonl``, ``.json``, ``.csv``, ``.parquet`` or ``.txt``; all but Parquet may be packed, as
    ``.jsonl.gz`` is.
    A row has one of these forms, and its other columns are ignored:

    * ``messages``, a list of objects with ``role`` and ``content``;
    * ``conversations``, a list of objects with ``from`` and ``value`` (ShareGPT);
    * ``prompt`` and ``response``, or ``prompt`` and ``completion``: texts, or lists of messages;
    * ``instruction``, ``output`` and perhaps ``input``, ``system`` and ``history`` (Alpaca);
    * ``text``, or a line of a ``.txt``: a text and no dialogue. It becomes one message of role ``text``.

    Lists are JSON text in CSV. Content may be a list of parts of type ``text``. Turns of tools are left out. The
    ``datasets`` library is not used, because it leaves an Arrow copy of all rows in its cache, even with
    ``keep_in_memory=True``. See :func:`private_cache_dir` if you need that library.

    Args:
        path: a local file in UTF-8, with or without a byte order mark.
        facts: is filled with counts. They are private.

    Returns:
        The list of messages of each dialogue, with ``role`` and ``content`` only.

    Raises:
        ValueError: If the file is of another kind or has no dialogue, or if a row is not a dialogue that ends with a
            reply. The message starts with ``file:line`` (for Parquet, and an array of JSON, ``file:row``, from 1).
    """
    return _read(_known(path), dialogue, facts)


def read_users(
    path: str | os.PathLike[str], group_by: str = "user_id", facts: FileFacts | None = None
) -> dict[str, list[Messages]]:
    """Read a file as :func:`read_dialogues` does, and group the dialogues by user.

    Args:
        path: a local file in UTF-8.
        group_by: the column with the user's name, a string or an integer. 7 and "7" are one user.
        facts: is filled with counts. They are private.

    Returns:
        The dialogues of each user in file order. Users are in the order in which they first appear.

    Raises:
        ValueError: If :func:`read_dialogues` would raise, or if a row does not name its user.
    """
    users: dict[str, list[Messages]] = {}
    for user, messages in _read(_known(path), partial(_of_user, group_by=group_by), facts):
        users.setdefault(user, []).append(messages)
    return users


def read_jsonl(path: str | os.PathLike[str]) -> list[Messages]:
    """Read a file of JSON lines as :func:`read_dialogues` does, whatever its name. Blank lines are skipped."""
    return _read((Path(path), _json_rows), dialogue, None)


def private_cache_dir(folder: str | os.PathLike[str]) -> str:
    """Make ``folder/private_cache``, which only its owner can read, for ``datasets.load_dataset(cache_dir=...)``.

    Raises:
        ValueError: If the folder exists already and others may read it.
    """
    cache = Path(folder) / "private_cache"
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    mode = cache.stat().st_mode & 0o777
    if os.name == "posix" and mode & 0o077:
        raise ValueError(f"{cache} has mode {mode:o}: others could read copies of private rows. chmod 700 {cache}")
    return str(cache)


Rows = Iterator[tuple[int, Callable[[], Any]]]
"""Number of each line, and a function that returns the row or raises ``ValueError``."""


def _known(path: str | os.PathLike[str]) -> tuple[Path, Callable[[Path], Rows]]:
    """Return a path and the function that reads this kind of file."""
    path = Path(path)
    reader = _READERS.get(_suffix(path))
    if reader is None:
        raise ValueError(f"{path}: no known kind of file: give {', '.join(sorted(_READERS))}, or such a text as .gz")
    return path, reader


def _suffix(path: Path) -> str:
    """Return the suffix that says what a file is, without that of a packed one."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" and not path.stem.lower().endswith(".parquet") else suffix


def _read(
    source: tuple[Path, Callable[[Path], Rows]], parse: Callable[[Any, RowFacts], Parsed], facts: FileFacts | None
) -> list[Parsed]:
    path, reader = source
    records: list[Parsed] = []
    number = 0
    try:
        for number, row in reader(path):
            own = RowFacts()
            try:
                records.append(parse(row(), own))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            if facts is not None:
                facts.add(records[-1], own)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole .gz file, after row {number}: {error}") from None
    if not records:
        raise ValueError(f"{path}: no dialogues in this file")
    return records


def _opened(path: Path) -> BinaryIO:
    """Open a file for reading, unpacked, behind a byte order mark."""
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    stream = cast(BinaryIO, opener(path, "rb"))
    if stream.read(len(BOM_UTF8)) != BOM_UTF8:
        stream.seek(0)
    return stream


def _json_rows(path: Path) -> Rows:
    """Return the rows of JSON lines; or of one array, with which the file then begins."""
    first = True
    with _opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            if first and line.lstrip().startswith(b"["):
                yield from _array(path, number, line + stream.read())
                return
            if line.strip():
                first = False
                yield number, partial(_json_line, line)


def _array(path: Path, number: int, content: bytes) -> Rows:
    """Return the rows of an array that begins on a line."""
    try:
        rows = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {_not_utf8(error)}") from None
    except json.JSONDecodeError as error:
        line = number + error.lineno - 1
        raise ValueError(f"{path}:{line}: not valid JSON: {error.msg} at column {error.colno}") from None
    for index, row in enumerate(rows, start=1):
        yield index, partial(_same, row)


def _same(row: Any) -> Any:
    return row


def _json_line(line: bytes) -> Any:
    try:
        return _json(line)
    except ValueError as error:
        hint = "" if line.strip().endswith(b"}") else ". A row must stand on one line, or the file be one array [...]"
        raise ValueError(f"{error}{hint}") from None


def _text_lines(path: Path) -> Rows:
    """Return the lines of a text that are not blank, each of them a row."""
    with _opened(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, partial(_text_line, line)


def _text_line(line: bytes) -> dict[str, str]:
    try:
        return {TEXT: line.decode("utf-8").strip()}
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: {error.reason} at byte {error.start + 1}. Save the file in UTF-8"


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None


def _csv_rows(path: Path) -> Rows:
    limit = csv.field_size_limit(sys.maxsize)  # 131,072 characters are less than a long dialogue
    try:
        with TextIOWrapper(_opened(path), encoding="utf-8", newline="") as stream:
            yield from _rows_of_reader(path, csv.DictReader(stream, strict=True))
    finally:
        csv.field_size_limit(limit)


def _rows_of_reader(path: Path, reader: csv.DictReader[str]) -> Rows:
    while True:
        try:
            header = reader.fieldnames  # read now, so that the first row starts on the line after it
            number = reader.line_num + 1
            row = next(reader, None) if header and not _separator(header) else None
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{reader.line_num + 1}: not valid CSV in UTF-8: {error}") from None
        if header and (separator := _separator(header)):
            raise ValueError(f"{path}:1: the columns are separated by {separator}: separate them by commas")
        if row is None:
            return
        yield number, partial(_csv_row, row)


def _separator(header: Sequence[str]) -> str | None:
    """Return what separates the columns of a file that is no comma-separated one; None where commas do."""
    found = {";": "semicolons", "\t": "tabs", "|": "bars"}
    return next((name for sign, name in found.items() if sign in header[0]), None) if len(header) == 1 else None


def _csv_row(row: dict[Any, Any]) -> dict[Any, Any]:
    if None in row or None in row.values():
        raise ValueError("this row has another number of fields than the header")
    return from_text(row, _json)


def _parquet_rows(path: Path) -> Rows:
    from pyarrow import ArrowInvalid, parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, partial(dict, row)
    except ArrowInvalid as error:
        raise ValueError(f"{path}:{number + 1}: not valid Parquet: {error}") from None


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_lines,
}


def _of_user(record: Any, facts: RowFacts, group_by: str) -> tuple[str, Messages]:
    """Return the user of a row, and the messages of the row."""
    messages = dialogue(record, facts)
    user = record.get(group_by)
    if user is None or user == "":  # an empty CSV field would make one user of all such rows
        hint = "" if group_by in record else f"{meant(group_by, record) or f'. The row has {shown_columns(record)}'}"
        raise ValueError(f'"{group_by}" is missing{hint}')
    if isinstance(user, bool) or not isinstance(user, str | int):
        raise ValueError(f'"{group_by}" must be a string or an integer')
    return str(user), messages
