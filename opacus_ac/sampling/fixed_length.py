"""Whether a loader gives every record one length, whatever other records its batch has."""

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
    """Say whether the length of a row in a batch is sure not to depend on the other rows.

    Either ``collate`` cannot pad, so that rows of different lengths are an error, or it is seen to pad a row that is
    cut to one entry to the same length as the whole row, alone and together, and not to pad any row to the length of a
    longer one.

    Args:
        dataset: where rows come from.
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
    """Whether a dataset makes the rows of a batch together, by ``__getitems__``, and might pad them to the longest."""
    if not callable(getattr(dataset, "__getitems__", None)):
        return False
    if type(dataset) is Subset:
        return _sees_the_batch(dataset.dataset)
    if type(dataset).__module__.startswith("datasets."):  # its transform is called with all rows of the batch
        return bool(dataset.format["type"] == "custom")
    return True


def _stacks(collate: Any) -> bool:
    """Whether a collate function puts rows of one length together, and fails for others."""
    if type(collate).__name__ == "RemoveColumnsCollator":  # what transformers' Trainer puts around one
        collate = collate.data_collator
    if collate is default_collate:
        return True
    known = collate if hasattr(collate, "__qualname__") else type(collate)
    return getattr(known, "__module__", "") == "transformers.data.data_collator" and known.__qualname__ in _STACKING


def _pads_to_one_length(collate: Callable[[list[Any]], Any], row: Any, size: int) -> bool:
    """Whether rows with shorter or longer sequences of ``size`` get the length of ``row``, or are an error."""
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
    """Return the shapes of the batch of some rows; None where it cannot be made."""
    try:
        return {name: tuple(tensor.shape) for name, tensor in named_rows(collate(fresh(list(rows))))}
    except Exception:  # whatever the user's function raises
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
    """Return a row with its sequences of ``size`` entries changed."""
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
