"""The cases by kind, and processes that examine them."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import re
import signal
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any

from opacus_ac.testing.coverage.case import Case, Finding

#: Kind -> the module that lists its cases, and the packages that they need.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "causal": ("causal", ("transformers",)),
    "encoders": ("encoders", ("transformers",)),
    "seq2seq": ("seq2seq", ("transformers",)),
    "audio": ("audio", ("transformers",)),
    "vision": ("vision", ("transformers",)),
    "layers": ("layers", ()),
    "peft": ("adapters", ("transformers", "peft")),
}
MODES = ("bk", "hooks")
Job = tuple[str, str, str]  # kind, name, mode


def missing(kind: str) -> list[str]:
    """Return the packages that the cases of a kind need and that are not installed."""
    return [name for name in KINDS[kind][1] if importlib.util.find_spec(name) is None]


@cache
def cases(kind: str) -> dict[str, Case]:
    """Return the cases of a kind by name; none where a package is missing."""
    if missing(kind):
        return {}
    module = importlib.import_module(f"opacus_ac.testing.coverage.{KINDS[kind][0]}")
    found = list(module.cases())
    named = {case.name: case for case in found}
    assert len(named) == len(found), f"two cases of {kind} have one name"
    return named


def jobs(kinds: Sequence[str], modes: Sequence[str], only: str = "") -> list[Job]:
    """Return what is to be examined: cases whose "kind/name" has the pattern ``only`` in it, in every mode."""
    pattern = re.compile(only)
    return [(k, n, mode) for k in kinds for n in cases(k) for mode in modes if pattern.search(f"{k}/{n}")]


def examined(wanted: Collection[Job], processes: int, limit: int) -> Iterator[Finding]:
    """Yield what came of cases, in the order in which they are done.

    Args:
        wanted: what to examine.
        processes: number of processes at a time.
        limit: seconds for a case.
    """
    left = list(wanted)
    with _pool(processes) as pool:
        futures = {pool.submit(one, job, limit): job for job in left}
        for future in as_completed(futures):
            try:
                found = future.result()
            except BrokenProcessPool:  # all that were not done are told so
                continue
            left.remove(futures[future])
            yield found
    for job in left:  # one of them ends its process: each gets one of its own
        with _pool(1) as pool:
            try:
                found = pool.submit(one, job, limit).result()
            except BrokenProcessPool:
                found = Finding(*job, outcome="crash", message="its process ended")
            yield found


def _pool(processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, mp_context=context, initializer=_quiet)


def _quiet() -> None:
    """Use one thread per process, and keep the log of transformers out of the table."""
    import torch

    torch.set_num_threads(1)
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        transformers.logging.set_verbosity(transformers.logging.CRITICAL)


def one(job: Job, limit: int) -> Finding:
    """Examine a case.

    Args:
        job: kind, name, mode.
        limit: seconds, where the system has alarms.
    """
    from opacus_ac.testing.coverage.comparison import examine

    kind, name, mode = job
    try:
        with _Alarm(limit):
            return examine(kind, cases(kind)[name], mode)
    except TimeoutError:
        return Finding(kind, name, mode, "time out", message=f"not done in {limit} seconds", seconds=float(limit))


class _Alarm:
    """Raises ``TimeoutError`` in this thread when the time is up."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds if hasattr(signal, "SIGALRM") else 0

    def __enter__(self) -> None:
        if self.seconds:
            self.before = signal.signal(signal.SIGALRM, self._ring)
            signal.alarm(self.seconds)

    def __exit__(self, *_: Any) -> None:
        if self.seconds:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, self.before)

    def _ring(self, *_: Any) -> None:
        raise TimeoutError
