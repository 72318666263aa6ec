"""Finds out whether a loader gives every record the same length, whatever other records are in its batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Subset, default_collate

from opacus_ac.grad_sample.checks.chosen_records import fresh, named_rows
from opacus_ac.noise.secret_state import secret_randomness

_STACKING = ("default_data_collator", "torch_default_data_collator", "DefaultDataCollator")
"""Collators of transformers that stack rows of one length and cannot pad."""


def length_is_fixed(dataset: Any, collate: Callable[[list[Any]], Any], row: Any) -> bool:
    """Say whether the length of a row in a batch certainly does not depend on the other rows.

    This holds if ``collate`` cannot pad, because rows of different lengths are then an error. Otherwise ``collate`` is
    tried on ``row``, on ``row`` cut to one entry, and on ``row`` made longer. It must give the cut row the length of
    the whole row, alone and together with it, and must not give ``row`` the length of the longer row.

    Args:
        dataset: the dataset of the rows.
        collate: makes a batch of a list of rows.
        row: a row of the dataset.
    """
    if _sees_the_batch(dataset):
        return False
    if _stacks(collate):
        return True
    with secret_randomness():
        return any(_pads_to_one_length(collate, row, size) for size in {len(s) for s in _sequences(row) if len(s) > 1})


def _sees_the_batch(dataset: Any) -> bool:
    """Say whether a dataset makes the rows of a batch together (``__getitems__``), and so might pad them alike."""
    if not callable(getattr(dataset, "__getitems__", None)):
        return False
    if type(dataset) is Subset:
        return _sees_the_batch(dataset.dataset)
    if type(dataset).__module__.startswith("datasets."):  # its transform is called with all rows of the batch
        return bool(dataset.format["type"] == "custom")
    return True


def _stacks(collate: Any) -> bool:
    """Say whether a collate function stacks rows of the same length, and fails for others."""
    if type(collate).__name__ == "RemoveColumnsCollator":  # the wrapper of transformers' Trainer
        collate = collate.data_collator
    if collate is default_collate:
        return True
    known = collate if hasattr(collate, "__qualname__") else type(collate)
    return getattr(known, "__module__", "") == "transformers.data.data_collator" and known.__qualname__ in _STACKING


def _pads_to_one_length(collate: Callable[[list[Any]], Any], row: Any, size: int) -> bool:
    """Say whether rows with shorter or longer sequences get the length of ``row``, or are an error.

    Args:
        collate: makes a batch of a list of rows.
        row: a row of the dataset.
        size: length of the sequences that are changed.
    """
    whole = _shapes(collate, row, row)
    if whole is None:
        return False
    short = _resized(row, size, lambda s: s[:1])
    if _shapes(collate, short, short) != whole or _shapes(collate, row, short) != whole:
        return False
    longest = max(n for shape in whole.values() for n in shape)
    long = _resized(row, size, lambda s: _repeated(s, longest // size + 1))
    return _shapes(collate, row, long) in (None, whole)


def _shapes(collate: Callable[[list[Any]], Any], *rows: Any) -> dict[str, tuple[int, ...]] | None:
    """Return the shapes of the batch of some rows; None if ``collate`` fails."""
    try:
        return {name: tuple(tensor.shape) for name, tensor in named_rows(collate(fresh(list(rows))))}
    except Exception:  # a user's function may raise anything
        return None


def _sequences(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _sequences(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _sequences(item)
    elif isinstance(value, str | list) or (hasattr(value, "shape") and len(value.shape) > 0):
        yield value


def _resized(value: Any, size: int, change: Callable[[Any], Any]) -> Any:
    """Return a row with ``change`` applied to its sequences of ``size`` entries."""
    if isinstance(value, Mapping):
        made: Any = copy.copy(value) if type(value) is not dict else {}
        for key, item in value.items():
            made[key] = _resized(item, size, change)
        return made
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_resized(item, size, change) for item in value)
    is_sequence = isinstance(value, str | list) or (hasattr(value, "shape") and len(value.shape) > 0)
    return change(value) if is_sequence and len(value) == size else value


def _repeated(sequence: Any, times: int) -> Any:
    if isinstance(sequence, Tensor):
        return sequence.repeat(times, *[1] * (sequence.dim() - 1))
    return sequence * times if isinstance(sequence, str | list) else sequence.repeat(times, axis=0)
