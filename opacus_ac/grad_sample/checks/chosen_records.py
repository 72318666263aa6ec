"""Chooses a few records of a dataset that differ from each other, for checks whether records couple."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_PLACES = 32
_IGNORED = -100
_LABELS = ("label", "labels")
_RANDOM = secrets.SystemRandom()


def choose_records(dataset: Any, most: int = 4, usable: Callable[[Any], bool] = lambda record: True) -> list[Any]:
    """Return up to ``most`` records that differ in length and in label, out of some tens that are drawn in secret.

    The largest and the smallest record come first, then one record of each further label. The size of a record is its
    number of entries that are not ignored; the size of a user is its number of rows.

    Args:
        dataset: the dataset.
        most: largest number of records.
        usable: says whether a record may be chosen.
    """
    count = len(dataset)
    seen = [dataset[place] for place in _RANDOM.sample(range(count), min(_PLACES, count))]
    seen = [record for record in seen if usable(record)]
    if not seen:
        return []
    sizes = [_size(record) for record in seen]
    largest = max(range(len(seen)), key=sizes.__getitem__)
    smallest = min(range(len(seen)), key=lambda i: (sizes[i], _label(seen[i]) == _label(seen[largest])))
    chosen = list(dict.fromkeys([largest, smallest]))
    labels = {_label(seen[i]) for i in chosen}
    for i in range(len(seen)):
        if len(chosen) < most and i not in chosen and _label(seen[i]) not in labels:
            chosen.append(i)
            labels.add(_label(seen[i]))
    others = [i for i in range(len(seen)) if i not in chosen]
    return [seen[i] for i in (chosen + others)[:most]]


def fresh(value: Any) -> Any:
    """Return a copy of a record or batch that may be changed, with new containers of the same kinds and new tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return remade(value, {key: fresh(inner) for key, inner in value.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(fresh(inner) for inner in value))
    if type(value) in (list, tuple):
        return type(value)(fresh(inner) for inner in value)
    return value


def remade(like: Mapping[Any, Any], items: Mapping[Any, Any]) -> Any:
    """Return a mapping with ``items``, of the kind of ``like`` (such as ``defaultdict`` or ``BatchEncoding``)."""
    if type(like) is dict:
        return dict(items)
    try:
        made: Any = copy.copy(like)
        for key in list(made):
            if key not in items:
                del made[key]
        made.update(items)
    except Exception:  # it cannot be copied or changed
        return dict(items)
    return made


def same(one: Any, other: Any) -> bool:
    """Say whether two batches have the same content."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return True


def named_rows(batch: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a batch that have at least one dimension, each with a name."""
    if isinstance(batch, Tensor):
        if batch.dim():
            yield name, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from named_rows(value, f"{name}.{key}")
    elif isinstance(batch, tuple | list):
        for place, value in enumerate(batch):
            yield from named_rows(value, f"{name}.{place}")


def _size(record: Any) -> tuple[int, int]:
    """Return the number of rows of a user (1 for a row), and the number of entries that are not ignored."""
    rows = len(record) if isinstance(record, list | tuple) and all(isinstance(row, Mapping) for row in record) else 1
    return rows, _entries(record)


def _entries(value: Any) -> int:
    if isinstance(value, Tensor):
        return int((value != _IGNORED).sum())
    if isinstance(value, Mapping):
        return sum(map(_entries, value.values()))
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(map(_entries, value))
    return int(not (isinstance(value, int) and value == _IGNORED))


def _label(record: Any) -> str | None:
    """Return the class label of a record, or None."""
    if isinstance(record, Mapping):
        found = next((record[name] for name in _LABELS if name in record), None)
    else:
        found = record[-1] if isinstance(record, tuple) and record else None
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    return str(found) if isinstance(found, int | float | str) else None
