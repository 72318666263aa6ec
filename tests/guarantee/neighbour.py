"""Sensitivity of whole sequences: the same actions on the dataset without one record, with the releases of the first run.

The neighbour's draws are those of the first run without the record, and what it releases is replaced by what the first run
released, so that C, learning rates and everything else that follows from releases are the same (the idea of arXiv 2602.17454).
Then its un-noised vectors differ by one record's part, and everything else must be equal: outcomes of actions, and charges.
"""

from __future__ import annotations

import math
from typing import Any

from actions import World, play
from reference import SLACK, Reference, Release, Violation


def parts_differ(world: World, actions: list[tuple[Any, ...]], record: int) -> bool:
    """Whether without the record some draw comes in another number of physical batches, so that the loop itself differs."""
    sizes = {world.config["physical"]} - {None}
    if world.config["loop"] == "manager" or any(a[0] == "iterate" and a[2] == "manager" for a in actions):
        sizes.add(2)
    for draw in world.reference.draws:
        count = len(draw.order)
        for size in sizes if record in draw.order else ():
            if math.ceil(count / size) != max(1, math.ceil((count - 1) / size)):
                return True
    return False


def distance(first: Release, second: Release) -> float:
    """Norm of the difference of two un-noised release vectors, in units of C, over the declared sensitivity."""
    total = sum(float((first.sums[name] - second.sums[name]).square().sum()) for name in first.sums) / first.bound**2
    if first.vector is not None and second.vector is not None:
        total += float(((first.vector - second.vector) ** 2).sum())
    return math.sqrt(total) / first.sensitivity


def check_without(world: World, actions: list[tuple[Any, ...]], seed: int, record: int) -> float | None:
    """Replay a sequence without a record; return the largest distance, or None where the loop itself would differ.

    Raises:
        Violation: a release moves by more than its sensitivity, or what happens depends on the record.
    """
    if parts_differ(world, actions, record):
        return None
    first: Reference = world.reference
    other = play(world.config, actions, seed, frozen=first, without=record)
    if other.outcomes != world.outcomes:
        where = next(pair for pair in zip(world.outcomes, other.outcomes, strict=True) if pair[0] != pair[1])
        raise Violation("flow", f"what happens depends on record {record}: {where}")
    charged = [[run.book.charged(run.engine.accountant) for run in w.runs] for w in (world, other)]
    if charged[0] != charged[1]:
        raise Violation("flow", f"charges depend on record {record}: {charged}")
    worst = 0.0
    for mine, theirs in zip(first.releases, other.reference.releases, strict=True):
        if (mine.std, mine.scale) != (theirs.std, theirs.scale):
            raise Violation("flow", f"std and scale of a release depend on record {record}: {mine.std}, {mine.scale}")
        moved = distance(mine, theirs)
        if moved > 1 + SLACK:
            raise Violation("sensitivity", f"record {record} moves a release by {moved:.4f} of its sensitivity")
        worst = max(worst, moved)
    return worst
