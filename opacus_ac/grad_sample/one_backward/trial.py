"""Chooses between two ways to compute the same by a short trial on this machine, once per process and size."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

import torch

ROUNDS = 5
"""Number of rounds of a trial, in which both ways take turns."""

CLEAR = 0.85
"""Share of the usual way's time that the other way may need at most. A smaller gain may be chance."""

_found: dict[Hashable, bool] = {}


def is_faster(key: Hashable, prepare: Callable[[], tuple[Callable[[], object], Callable[[], object]]]) -> bool:
    """Say whether the other way is clearly faster than the usual one.

    The other way must win every round, so a machine with other work keeps the usual way. The trial takes milliseconds.
    Its outcome holds until the process ends, or until the number of threads changes. Two processes may decide
    differently, and their results then differ by rounding. A program that asks for repeatable results by
    ``torch.use_deterministic_algorithms(True)`` gets the usual way without a trial.

    Args:
        key: what is computed, and its size.
        prepare: returns the usual way and the other way, ready to be called. It must not draw from torch's global
            generators. It is called for the first trial of ``key`` only.
    """
    if torch.are_deterministic_algorithms_enabled():
        return False
    key = (key, torch.get_num_threads())
    if key not in _found:
        _found[key] = _wins(*prepare())
    return _found[key]


def forget() -> None:
    """Forget all outcomes."""
    _found.clear()


def _wins(usual: Callable[[], object], other: Callable[[], object]) -> bool:
    best = [float("inf"), float("inf")]
    for number in range(ROUNDS + 1):
        seconds = [_seconds(usual), _seconds(other)]
        if number == 0:  # the first calls allocate memory and compile kernels
            continue
        if seconds[1] >= seconds[0]:
            return False
        best = [min(pair) for pair in zip(best, seconds, strict=True)]
    return best[1] <= CLEAR * best[0]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start
