"""Which runs are one run that was interrupted and resumed, and their curves put together. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

SAME = ("target_epsilon", "delta", "accountant", "unit", "adjacency", "dataset_size", "clip_policy", "loss_bound")
"""Entries of the privacy record that a resumed run shares with the one before."""

Column = list[list[Any]]


def first_step(meta: Mapping[str, Any]) -> int:
    """Return how many steps had been taken when a run's writing began; 0 where the record does not say."""
    found = meta.get("first_step", 0)
    return found if isinstance(found, int) and found > 0 else 0


def join(
    records: Mapping[str, Mapping[str, Any]], order: Sequence[str], bounds: Mapping[str, Column]
) -> dict[str, list[str]]:
    """Return for each run that continues others their names, oldest first.

    A run is joined to another of the same folder with the same settings that had reached its first step. C tells runs
    apart, because it follows from noisy releases: it must be the same where both know it. Where several runs fit
    equally well, none is joined.

    Args:
        records: privacy records by run.
        order: names of the runs, latest first.
        bounds: ``[steps, values]`` of C by run, possibly thinned.
    """
    before: dict[str, str] = {}
    for place, run in enumerate(order):
        own, start = bounds.get(run, [[], []]), first_step(records[run])
        if not start or (own[0] and own[0][0] <= start):
            continue  # it has its beginning
        fits = {other: _fit(records, run, other, bounds.get(other, [[], []])) for other in order[place + 1 :]}
        for wanted in (2, 1):
            found = [other for other, fit in fits.items() if fit == wanted]
            if found:
                if len(found) == 1:
                    before[run] = found[0]
                break
    return {run: _chain(before, run) for run in before}


def candidates(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the runs whose C must be known to join runs: those beside a resumed one."""
    folders = {_folder(run) for run, meta in records.items() if first_step(meta)}
    return [run for run in records if _folder(run) in folders]


def merge(parts: Sequence[tuple[int, Mapping[str, Column]]]) -> dict[str, Column]:
    """Return the curves of a run from its parts, oldest first, each with its first step.

    What a part holds beyond the first step of the next one was not in the checkpoint, and is left out.
    """
    merged: dict[str, Column] = {}
    for place, (start, curves) in enumerate(parts):
        end = parts[place + 1][0] if place + 1 < len(parts) else math.inf
        for name, (steps, values) in curves.items():
            kept = [i for i, step in enumerate(steps) if (step > start or place == 0) and step <= end]
            column = merged.setdefault(name, [[], []])
            column[0] += [steps[i] for i in kept]
            column[1] += [values[i] for i in kept]
    return merged


def _folder(run: str) -> str:
    return run.rpartition("/")[0]


def _chain(before: Mapping[str, str], run: str) -> list[str]:
    chain: list[str] = []
    while run in before:
        run = before[run]
        chain.insert(0, run)
    return chain


def _fit(records: Mapping[str, Mapping[str, Any]], run: str, other: str, bounds: Column) -> int:
    """Return 2 if C says that ``run`` continues ``other``, 1 if nothing speaks against it, 0 if something does."""
    meta, earlier = records[run], records[other]
    start = first_step(meta)
    if start <= first_step(earlier) or _folder(run) != _folder(other):
        return 0
    if any(meta.get(name) != earlier.get(name) for name in SAME):
        return 0
    steps, values = bounds
    if not steps or steps[-1] < start:
        return 0
    known = values[steps.index(start + 1)] if start + 1 in steps else None
    if known is None and steps[-1] == start and earlier.get("ended"):
        known = earlier.get("next_bound")
    wanted = meta.get("first_bound")
    if not isinstance(known, float | int) or not isinstance(wanted, float | int):
        return 1
    if not math.isclose(known, wanted, rel_tol=1e-5):
        return 0
    return 2 if known != values[0] else 1  # a C that has not moved is that of many runs
