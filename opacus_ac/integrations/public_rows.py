"""Checks that data that are called public share no row with the private data."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

COMPUTED_ROWS = 50_000
"""Number of rows, evenly spread, that are compared of a dataset that computes its rows (decodes images, say)."""

_REMEDY = "take them out of one of the two, or evaluate on other public data"


class _NotPlainError(Exception):
    """Raised for a value that is not a number, a text, an array, or a collection of them."""


class PrivateRows:
    """Hashes of the rows of the private data, for comparison with other data. They are computed once, when needed.

    Args:
        dataset: the private data, or None.

    Guarantees:
        Two rows are equal if their plain values are equal. Numbers are compared by value, whatever their type or
        container; so are texts, arrays, sequences and mappings. A None in a mapping counts as missing. Of a dataset of
        users each row is compared. Data that cannot be compared are let through: iterable datasets, rows with other
        objects in them, rows with other columns, and rows beyond :data:`COMPUTED_ROWS` of a dataset that computes them.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._digests: dict[frozenset[str] | None, set[bytes]] = {}
        self._columns: frozenset[str] | None = None
        self._answers: list[tuple[Any, int, str | None]] = []  # holds the dataset, so that no other object gets its id

    def shared_by(self, public: Any) -> str | None:
        """Return a sentence that says what ``public`` shares with the private data, and the remedy.

        Args:
            public: a dataset, or a mapping of names to datasets.

        Returns:
            None if no shared row was found.
        """
        if self.dataset is None or public is None:
            return None
        if isinstance(public, Mapping):
            found = ((name, self.shared_by(data)) for name, data in public.items())
            return next((f"{name}: {reason}" for name, reason in found if reason is not None), None)
        length = len(public) if hasattr(public, "__len__") else -1
        for data, size, answer in self._answers:
            if data is public and size == length:
                return answer
        answer = self._compare(public)
        self._answers = [*self._answers[-7:], (public, length, answer)]
        return answer

    def _compare(self, public: Any) -> str | None:
        if same_rows_of_one(public, self.dataset):
            return f"it is, or has rows of, the private dataset itself: {_REMEDY}"
        with _unmoved():
            rows = [(number, row) for number, row in _rows(public)]
            columns = _columns(row for _, row in rows[:1])
            shared = self._common(columns)
            if shared is _NOTHING:
                return None
            wanted = self._hashes(shared)
            found = [number for number, row in rows if _digest(row, shared) in wanted]
        if not found:
            return None
        shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        return f"{len(found)} of its rows are rows of the private data (from 0: {shown}): {_REMEDY}"

    def _common(self, columns: frozenset[str] | None) -> Any:
        """Return the columns to compare.

        Returns:
            None for rows that are not mappings, ``_NOTHING`` for rows that cannot be compared.
        """
        first = next((row for _, row in _rows(self.dataset)), None)
        own = _columns([first])
        if own == columns:
            return columns
        common = None if own is None or columns is None else own & columns
        # Many rows have the same label, so a column with more than one value per row is needed for a comparison.
        if not common or not isinstance(first, Mapping) or not any(_is_rich(first[name]) for name in common):
            return _NOTHING
        return common

    def _hashes(self, columns: frozenset[str] | None) -> set[bytes]:
        if columns not in self._digests:
            found = (_digest(row, columns) for _, row in _rows(self.dataset))
            self._digests[columns] = {digest for digest in found if digest is not None}
        return self._digests[columns]


_NOTHING = object()


def _is_rich(value: Any) -> bool:
    try:
        return len(value) > 1
    except TypeError:
        return False


def _columns(rows: Iterable[Any]) -> frozenset[str] | None:
    first = next(iter(rows), None)
    return frozenset(first) if isinstance(first, Mapping) else None


def sample_digest(dataset: Any, rows: int = 64) -> bytes | None:
    """Return a hash of the length of a dataset and of some of its rows, evenly spread.

    Args:
        dataset: a dataset with a length.
        rows: how many rows are read.

    Returns:
        None for data that cannot be read or compared.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return None
    raw = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    total, size = hashlib.sha256(str(len(dataset)).encode()), len(dataset)
    with _unmoved():
        for number in sorted({size * k // rows for k in range(rows)}) if size else ():
            try:
                digest = _digest(raw[number], None)
            except Exception:  # a row that cannot be read fails where it is used
                return None
            if digest is None:
                return None
            total.update(digest)
    return total.digest()


# ---------------------------------------------------------------- reading datasets


def _base(dataset: Any) -> tuple[Any, set[int] | None]:
    """Return the dataset below all ``Subset``s, and the set of its rows that are used (None for all rows)."""
    indices: list[int] | None = None
    while isinstance(dataset, Subset):
        own = [int(i) for i in dataset.indices]
        indices = own if indices is None else [own[i] for i in indices]
        dataset = dataset.dataset
    return dataset, None if indices is None else set(indices)


def same_rows_of_one(first: Any, second: Any) -> bool:
    """Say whether two datasets are the same, or ``Subset``s of one dataset with a common row. Reads no row."""
    (a, of_a), (b, of_b) = _base(first), _base(second)
    if a is not b:
        return False
    return of_a is None or of_b is None or bool(of_a & of_b)


def _rows(dataset: Any) -> Iterator[tuple[int, Any]]:
    """Yield (number, row) for a dataset with a length. Of a dataset of users, all rows of a user have its number."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return
    raw = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
    users = getattr(dataset, "max_rows_per_user", None) is not None
    for number in _numbers(dataset):
        try:
            item = raw[number]
        except Exception:  # a row that cannot be read fails where it is used
            continue
        for row in item if users else (item,):
            yield number, row


def _numbers(dataset: Any) -> range:
    rows = len(dataset)
    return range(0, rows, 1 if _is_stored(dataset) else max(1, -(-rows // COMPUTED_ROWS)))


def _is_stored(dataset: Any) -> bool:
    """Say whether the rows are stored and not computed, so that all of them can be read."""
    if isinstance(dataset, Subset):
        return _is_stored(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(_is_stored, dataset.datasets))
    stored = getattr(dataset, "rows", getattr(dataset, "users", None))
    return (
        isinstance(dataset, list | tuple | TensorDataset) or hasattr(dataset, "with_format") or isinstance(stored, list)
    )


@contextmanager
def _unmoved() -> Iterator[None]:
    """Return a context that leaves the global random generators as they were. A dataset may draw from them."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


# ---------------------------------------------------------------- plain values


def _digest(row: Any, columns: frozenset[str] | None) -> bytes | None:
    """Return a hash of a row's plain values; None if a value is of another kind."""
    total = hashlib.blake2b(digest_size=16)
    try:
        if columns is not None:
            row = {name: value for name, value in row.items() if name in columns}
        _update(total, row)
    except (_NotPlainError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    return total.digest()


def _update(total: Any, value: Any) -> None:
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        total.update(b"t%d:" % len(value) + value)
    elif isinstance(value, Mapping):
        kept = {str(name): item for name, item in value.items() if item is not None}
        total.update(b"m%d:" % len(kept))
        for name in sorted(kept):
            _update(total, name)
            _update(total, kept[name])
    elif isinstance(value, list | tuple) and not _all_numbers(value):
        total.update(b"s%d:" % len(value))
        for item in value:
            _update(total, item)
    elif value is None:
        total.update(b"n")
    else:
        _update_array(total, value)


def _all_numbers(value: Any) -> bool:
    return len(value) > 0 and all(isinstance(item, bool | int | float) for item in value)


def _update_array(total: Any, value: Any) -> None:
    """Add a number or an array of numbers, by value."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    if not isinstance(
        value, bool | int | float | np.ndarray | np.generic | torch.Tensor | list | tuple
    ) and not hasattr(value, "__array__"):
        raise _NotPlainError(type(value).__name__)
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise _NotPlainError(str(array.dtype))
    if array.dtype.kind == "f":
        array = array.astype(np.float32)  # a Python float equals the same number in a float32 tensor
    shape = array.shape
    total.update(b"a" + struct.pack(f"<{len(shape) + 1}q", len(shape), *shape))
    total.update(np.ascontiguousarray(array, dtype=np.float64).tobytes())
