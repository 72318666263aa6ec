"""Reads dialogues from local files. Nothing is copied to a cache, and an error names file and line."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

Messages = list[dict[str, str]]
Parsed = TypeVar("Parsed")
ROLES = ("system", "user", "assistant")


def read_dialogues(path: str | os.PathLike[str]) -> list[Messages]:
    """Read the dialogues of a ``.jsonl``, ``.csv`` or ``.parquet`` file, one per row.

    A row has ``messages``, a list of objects with ``role`` and ``content`` (in CSV as JSON text), or ``prompt`` and
    ``response``. Other columns are ignored. The ``datasets`` library is not used, because it leaves an Arrow copy of
    all rows in its cache, even with ``keep_in_memory=True``. See :func:`private_cache_dir` if you need that library.

    Args:
        path: a local file in UTF-8.

    Returns:
        The list of messages of each dialogue, with ``role`` and ``content`` only.

    Raises:
        ValueError: If the file is of another kind or has no dialogue, or if a row is not a dialogue that ends with a
            reply. The message starts with ``file:line`` (for Parquet ``file:row``, from 1).
    """
    return _read(_known(path), _dialogue)


def read_users(path: str | os.PathLike[str], group_by: str = "user_id") -> dict[str, list[Messages]]:
    """Read a file as :func:`read_dialogues` does, and group the dialogues by user.

    Args:
        path: a local file in UTF-8.
        group_by: the column with the user's name, a string or an integer. 7 and "7" are one user.

    Returns:
        The dialogues of each user in file order. Users are in the order in which they first appear.

    Raises:
        ValueError: If :func:`read_dialogues` would raise, or if a row does not name its user.
    """
    users: dict[str, list[Messages]] = {}
    for user, messages in _read(_known(path), partial(_of_user, group_by=group_by)):
        users.setdefault(user, []).append(messages)
    return users


def read_jsonl(path: str | os.PathLike[str]) -> list[Messages]:
    """Read a file of JSON lines as :func:`read_dialogues` does, whatever its name. Blank lines are skipped."""
    return _read((Path(path), _json_lines), _dialogue)


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
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"{path}: no known kind of file: give {', '.join(sorted(_READERS))}")
    return path, reader


def _read(source: tuple[Path, Callable[[Path], Rows]], parse: Callable[[Any], Parsed]) -> list[Parsed]:
    path, reader = source
    records: list[Parsed] = []
    for number, row in reader(path):
        try:
            records.append(parse(row()))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not records:
        raise ValueError(f"{path}: no dialogues in this file")
    return records


def _json_lines(path: Path) -> Rows:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, partial(_json, line)


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None


def _csv_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        while True:
            try:
                header = reader.fieldnames  # read now, so that the first row starts on the line after it
                number = reader.line_num + 1
                row = next(reader, None) if header else None
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}:{reader.line_num + 1}: not valid CSV in UTF-8: {error}") from None
            if row is None:
                return
            yield number, partial(_csv_row, row)


def _csv_row(row: dict[Any, Any]) -> dict[Any, Any]:
    if None in row or None in row.values():
        raise ValueError("this row has another number of fields than the header")
    return {**row, "messages": _json(row["messages"])} if "messages" in row else row


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


_READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _dialogue(record: Any) -> Messages:
    """Return the messages of a row after a check of each."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if "messages" not in record and {"prompt", "response"} <= record.keys():
        pair = {"user": record["prompt"], "assistant": record["response"]}
        record = {"messages": [{"role": role, "content": text} for role, text in pair.items()]}
    if "messages" not in record:
        raise ValueError('"messages" is missing (or "prompt" and "response")')
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list that is not empty')
    for index, message in enumerate(messages, start=1):
        _check_message(index, message)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be a reply of the assistant")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _of_user(record: Any, group_by: str) -> tuple[str, Messages]:
    """Return the user of a row, and the messages of the row."""
    messages = _dialogue(record)
    user = record.get(group_by)
    if user is None or user == "":  # an empty CSV field would make one user of all such rows
        raise ValueError(f'"{group_by}" is missing')
    if isinstance(user, bool) or not isinstance(user, str | int):
        raise ValueError(f'"{group_by}" must be a string or an integer')
    return str(user), messages


def _check_message(index: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"message {index} is not an object")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f'message {index}: "{key}" is missing')
        if not isinstance(message[key], str):
            raise ValueError(f'message {index}: "{key}" must be a string')
    if message["role"] not in ROLES:
        raise ValueError(f"message {index}: role must be one of {', '.join(ROLES)}, got {message['role']!r}")
