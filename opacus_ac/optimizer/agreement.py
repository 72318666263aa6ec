"""Where the ranks meet before a step is charged: they must be in the same step, with the same draw and the same C."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from opacus_ac.distributed.group import Ints
from opacus_ac.distributed.reducers import Reducer
from opacus_ac.release.statistics import StepStatistics
from opacus_ac.sampling.plan import Draw

_DRAWN = "the records drawn"  # their hash is private


def meet(reducer: Reducer, statistics: StepStatistics, draw: Draw | None, constants: Mapping[str, float | int]) -> None:
    """Add up the statistics of all ranks, after it was made sure that they belong to one step.

    Args:
        reducer: the processes.
        statistics: the sums of this rank; afterwards, on every rank, those of all.
        draw: the draw of the batch in hand; None where the loader did not draw it.
        constants: what must be the same to the last bit everywhere, by name; integers have 63 bits.

    Guarantees:
        A record is in the sums of one rank only: all ranks drew the same logical batch and have parts of it.

    Raises:
        ValueError: on every rank: the ranks differ. Nothing was charged or released.
    """
    place = {
        "batch of the loader": -1 if draw is None else draw.batch,
        _DRAWN: 0 if draw is None else draw.selection,
    }
    shared = {**place, **constants}
    header = np.array([_bits(value) for value in shared.values()], dtype=np.int64)
    rows = reducer.gather(np.concatenate([[0], header, statistics.tally()]))
    failed, rows = np.flatnonzero(rows[:, 0]), rows[:, 1:]
    if failed.size:
        raise ValueError(
            f"rank {failed[0]} failed before the release of this step, so no rank takes it, and nothing was charged. "
            "Look for the error of that rank; every rank may try the batch again, or go on with the next one"
        )
    _check_alike(shared, rows[:, : header.size])
    if (rows[:, 0] < 0).any():
        raise ValueError(
            "optimizer.step() on a batch that the private loader did not just draw: ranks that choose batches for "
            "themselves could have the same record twice. Take one step per batch of the loader that make_private "
            "returned"
        )
    statistics.merge(rows[:, header.size :])


def report_failure(reducer: Reducer, statistics: StepStatistics, constants: int) -> None:
    """Meet the other ranks in the place of :func:`meet`, to say that this one has failed.

    Args:
        reducer: the processes.
        statistics: the sums of this rank, for their number.
        constants: number of values that all ranks compare.
    """
    reducer.gather(np.array([1] + [0] * (2 + constants + statistics.tally_size), dtype=np.int64))


def _bits(value: float | int) -> int:
    return value if isinstance(value, int) else int(np.float64(value).view(np.int64))


def _check_alike(shared: Mapping[str, float | int], rows: Ints) -> None:
    for column, (name, mine) in enumerate(shared.items()):
        values = rows[:, column]
        if (values != values[0]).any():
            other = int(np.flatnonzero(values != values[0])[0])
            shown = values if isinstance(mine, int) else values.view(np.float64)
            which = "differ" if name == _DRAWN else f"is {shown[0]} on rank 0 and {shown[other]} on rank {other}"
            raise ValueError(
                f"the ranks are not in the same step: {name} {which}. Every rank has to take every batch of its loader "
                "and step once for it, with nothing changed on one rank alone"
            )
