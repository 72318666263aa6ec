"""The study: what DP-Adam-AC and each of its parts do to the loss, from runs that anyone can repeat.

    python examples/studies/small_model_study.py --quick                 # a reduced table and all figures, in less than 20 minutes on two cores
    python examples/studies/small_model_study.py --grid full --jobs 2    # the tables of docs/study.md; stop it and go on at any time
    python examples/studies/small_model_study.py --grid tuning --jobs 2
    python examples/studies/small_model_study.py --grid full --report docs/figures

Finished runs are lines of JSON in ``--out``; a run that is there is not repeated. Noise is seeded, so that methods with the same
seed share data, draws and gradient noise and differences come from the method: a study of invented records, which protects nobody.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.results import read, run_missing
from small_model import cell as cells
from small_model import public
from small_model.grids import GRIDS
from small_model.report import figures, tables


def run_all(grid: list[cells.Cell], out: Path, jobs: int) -> None:
    """Run what is missing and append each result as soon as it is there."""
    for model in sorted({c.model for c in grid}):
        public.public_model(model)  # before there are several processes, of which each would train it
    start = time.perf_counter()
    for done, result in run_missing(grid, cells.run, out, jobs):
        print(
            f"{done} {time.perf_counter() - start:.0f} s: {result['method']} {result['model']} {result['tone']} "
            f"epsilon {result['epsilon']} seed {result['seed']}: loss {result['loss']:.3f}, {result['seconds']:.0f} s",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a grid, or report it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--grid", choices=sorted(GRIDS), default="full")
    parser.add_argument(
        "--quick", action="store_true", help="the grid 'quick', then tables and figures beside the results"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the grid")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/study/results.jsonl"))
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="run nothing; print the tables and draw the figures there"
    )
    arguments = parser.parse_args(argv)
    name = "quick" if arguments.quick else arguments.grid
    grid = GRIDS[name](tuple(arguments.seeds)) if arguments.seeds else GRIDS[name]()
    if arguments.report is None:
        run_all(grid, arguments.out, arguments.jobs)
    if arguments.report is None and not arguments.quick:
        return 0
    folder = arguments.report or arguments.out.parent
    places = {c.key(): place for place, c in enumerate(grid)}
    known = {result["key"]: result for result in read(arguments.out) if result["key"] in places}
    results = sorted(known.values(), key=lambda result: places[result["key"]])
    if not results:
        raise SystemExit(f"no finished run of grid {name!r} in {arguments.out}: run it first, without --report")
    print(tables(results))
    missing = len(places) - len(results)
    if missing:
        print(f"\n{missing} of {len(places)} runs are missing.")
    for path in figures(results, folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
