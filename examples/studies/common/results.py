"""Finished runs as JSON lines: read what there is, run what is missing, append each as it comes."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

AUTO_ADAM = 9  # version of AutoAdam's rule: results of an older one are run again, those of other optimizers are not
Result = dict[str, Any]


def read(out: Path, settings: Any = None) -> list[Result]:
    """Return the finished runs, all or those whose ``settings`` are ``settings.key()``; a torn last line is dropped."""
    found = []
    for line in out.read_text(encoding="utf-8").splitlines() if out.is_file() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if settings is None or result["settings"] == settings.key():
            found.append(result)
    return found


def append(out: Path, result: Result) -> None:
    """Add one line to ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result) + "\n")


def results_of(function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Result]:
    """Yield results as they come, from ``jobs`` processes, or from this one if that is 1."""
    if jobs == 1:
        yield from (function(*task) for task in tasks)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interrupt, what did not begin is not waited for


def run_missing(cells: Iterable[Any], run: Callable[..., Result], out: Path, jobs: int) -> Iterator[tuple[str, Result]]:
    """Run the cells whose ``key()`` is not in ``out`` yet; yield what is done, as "[1/9]", and each result once it is kept."""
    done = {result["key"] for result in read(out)}
    missing = [(cell,) for key, cell in {cell.key(): cell for cell in cells}.items() if key not in done]
    for number, result in enumerate(results_of(run, missing, jobs), start=1):
        append(out, result)
        yield f"[{number}/{len(missing)}]", result


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and, of several values, the standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean with its sign and, of several values, its standard error."""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):+.1f}{error}"
