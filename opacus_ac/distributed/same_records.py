"""Whether all ranks have the same records under the same numbers.

A record that stands at two places is in the sums of two ranks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from opacus_ac.distributed.group import Ints
from opacus_ac.distributed.reducers import Reducer
from opacus_ac.errors import SamplingWarning

PARTS = 16
"""Parts of a record that are compared each for itself; what a record has beyond them goes into the last one."""

SECONDS = 3.0
"""How long ranks read records, at least and about: small or quick datasets are compared whole."""

_FIRST, _MOST = 16, 1 << 13
"""Records of the first round, and of the largest one."""

_DISPUTED, _READS = 16, 6
"""Places of a round at which a disputed part is read again, and how often."""

_DEPTH = 8
_PLAIN_MODULES = ("datetime", "decimal", "fractions", "pathlib", "uuid", "zoneinfo")
_CONVERSIONS = ("to_pydict", "as_py", "to_dict")  # of arrow tables, their scalars, and data frames


def check_same_records(reducer: Reducer, dataset: Any, seconds: float = SECONDS) -> None:
    """Raise ``ValueError``, on every rank, if the ranks have different records under one number.

    The first, the middle and the last record are read. The others follow in a random order that rank 0 chooses and
    nobody else knows, until all are read or time is up. Parts of records that are made at random whenever they are read
    are found out and left aside.

    Args:
        reducer: the processes.
        dataset: the dataset of this rank; all have the same length.
        seconds: when to stop.

    Warns:
        SamplingWarning: If nothing in the records that were read can be compared.
    """
    seed = reducer.on_first(lambda: secrets.randbits(63))
    random = np.zeros(PARTS, dtype=bool)
    compared, start = False, time.monotonic()
    for places in _rounds(len(dataset), seed):
        rows = np.stack([digests(dataset, place) for place in places])
        passed = int(1000 * (time.monotonic() - start))
        gathered = reducer.gather(np.concatenate([[passed], rows.ravel()]))
        ranks = gathered[:, 1:].reshape(-1, len(places), PARTS)
        known = (ranks != 0).all(0) & ~random
        disputed = (ranks != ranks[0]).any(0) & known
        if disputed.any():
            random |= _settle_dispute(reducer, dataset, places, rows, ranks, disputed)
        compared = compared or bool((known & ~random).any())
        if gathered[:, 0].max() > 1000 * seconds:
            break
    if not compared and len(dataset):
        warnings.warn(
            "the records cannot be compared between the ranks (they are random, or no plain values): make sure that "
            "every rank has the same records in the same order, or one record may be drawn twice",
            SamplingWarning,
            stacklevel=2,
        )


def _rounds(records: int, seed: int) -> Iterator[list[int]]:
    """Yield the places of each round: both ends and the middle, then all others in random order.

    The rounds become larger.
    """
    generator = np.random.default_rng(seed)
    ends = [] if not records else sorted({0, records // 2, records - 1})
    small = records <= 1 << 24
    order = generator.permutation(records) if small else generator.integers(records, size=1 << 22)
    others = [*ends, *order[: _FIRST - len(ends)].tolist()]
    done, size = _FIRST - len(ends), _FIRST
    while others:
        yield others
        size = min(2 * size, _MOST)
        others = order[done : done + size].tolist()
        done += size


def _settle_dispute(
    reducer: Reducer, dataset: Any, places: Sequence[int], rows: Ints, ranks: Ints, disputed: np.ndarray
) -> np.ndarray:
    """Read disputed places again, and return which parts are random.

    Raises if a part stays what it was on every rank.
    """
    where = np.unique([i for part in disputed.T for i in np.flatnonzero(part)[:_DISPUTED]])
    stable = np.stack(
        [(np.stack([digests(dataset, places[i]) for _ in range(_READS)]) == rows[i]).all(0) for i in where]
    )
    everywhere = reducer.gather(stable.astype(np.int64).ravel()).all(0).reshape(stable.shape)
    if (everywhere & disputed[where]).any():
        rank = int(np.flatnonzero([(mine != ranks[0])[disputed].any() for mine in ranks])[0])
        raise ValueError(
            f"ranks 0 and {rank} have other records, or in another order, and one of them could be drawn twice: give "
            "every rank the same dataset, shuffled with the same seed or not at all"
        )
    return disputed[where].any(0)


def digests(dataset: Any, place: int) -> Ints:
    """Return hashes of the parts of a record, ``[PARTS]``. They are private.

    A part that is missing or cannot be compared has the hash 0.
    """
    record = dataset[place]
    parts = None if _array(record) is not None else _items(record, _DEPTH)
    parts = [record] if parts is None else parts
    found = np.zeros(PARTS, dtype=np.int64)
    shared = [*parts[: PARTS - 1], parts[PARTS - 1 :]] if len(parts) > PARTS else parts
    for i, part in enumerate(shared):
        content = plain_bytes(part)
        if content is not None:
            digest = hashlib.blake2b(content, digest_size=8).digest()
            found[i] = int.from_bytes(digest, "little", signed=True) or 1
    return found


def plain_bytes(value: Any, depth: int = _DEPTH) -> bytes | None:
    """Return a form of a value's content that is the same in any process; None where there is none.

    It exists for arrays, texts, numbers, and containers of such values.
    """
    if depth == 0:
        return None
    array = _array(value)
    if array is not None:
        return f"{array.dtype}{array.shape}".encode() + array.tobytes()
    if isinstance(value, str | bytes | bool | int | float | complex | range) or value is None:
        return repr(value).encode()
    if type(value).__module__.split(".")[0] in _PLAIN_MODULES:
        return repr(value).encode()
    items = _items(value, depth)
    if items is None:
        return None
    parts = [plain_bytes(item, depth - 1) for item in items]
    if isinstance(value, set | frozenset):
        parts.sort(key=lambda part: part or b"")
    if any(part is None for part in parts):
        return None
    return b"(" + b"".join(b"%d:" % len(part) + part for part in parts if part is not None) + b")"


def _array(value: Any) -> np.ndarray | None:
    """Return the values of a tensor, an array, or an object that converts to an array (an image); None for others."""
    try:
        if isinstance(value, torch.Tensor):
            dense = value.detach().to_dense() if value.layout != torch.strided else value.detach()
            dense = dense.cpu().resolve_conj().resolve_neg().contiguous()
            return dense.numpy() if dense.dtype != torch.bfloat16 else dense.view(torch.int16).numpy()
        if isinstance(value, np.ndarray | np.generic) or hasattr(value, "__array_interface__"):
            array = np.asarray(value)
            return None if array.dtype.hasobject else array
    except (RuntimeError, TypeError, ValueError):
        pass
    return None


def _items(value: Any, depth: int) -> list[Any] | None:
    """Return what a container holds, in an order that is the same in every process; None for what is no container."""
    if isinstance(value, Mapping):
        return [item for key in sorted(value, key=repr) for item in (key, value[key])]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, np.ndarray):
        return list(value.ravel())  # of objects
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    for name in _CONVERSIONS:
        if callable(getattr(value, name, None)) and not isinstance(value, type):
            converted = getattr(value, name)()
            return [converted] if depth > 1 else None
    held = getattr(value, "__dict__", None)
    if isinstance(value, type) or callable(value) or not held:
        return None
    return [type(value).__qualname__, *(item for key in sorted(held) for item in (key, held[key]))]
