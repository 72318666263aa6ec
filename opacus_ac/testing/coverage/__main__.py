"""``python -m opacus_ac.testing.coverage``: prints which models train privately with exact gradients."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from opacus_ac.testing.coverage import log, table
from opacus_ac.testing.coverage.case import Finding
from opacus_ac.testing.coverage.run import KINDS, MODES, examined, jobs, missing


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m opacus_ac.testing.coverage", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="lists of cases (all)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="modes (both)")
    parser.add_argument("--only", default="", metavar="PATTERN", help='regular expression, searched in "kind/name"')
    parser.add_argument("--format", choices=("text", "markdown"), default="text", help="of the table (text)")
    parser.add_argument(
        "--file", type=Path, default=Path("coverage.jsonl"), help="findings are kept here, and a run goes on from it"
    )
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 4), help="at a time")
    parser.add_argument("--limit", type=int, default=60, help="seconds for a case (60)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases, and examine none")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status, 1 if a case is wrong or crashes."""
    arguments = _arguments(given)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling BitNet's layers takes longer than the case
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are made here, and none is fetched
    for kind in arguments.kinds:
        if absent := missing(kind):
            print(f"{kind} is left out: {' and '.join(absent)} cannot be imported", file=sys.stderr)
    wanted = jobs(arguments.kinds, arguments.modes, arguments.only)
    if arguments.list:
        print("\n".join(dict.fromkeys(f"{kind}/{name}" for kind, name, _ in wanted)))
        return 0
    found = _findings(wanted, arguments)
    print(table.text(found) if arguments.format == "text" else table.markdown(found, log.versions()), end="\n")
    return int(any(one.outcome in ("wrong", "crash") for one in found))


def _findings(wanted: Sequence[tuple[str, str, str]], arguments: argparse.Namespace) -> list[Finding]:
    """Return what came of the cases, from the file where it is known."""
    now = log.versions()
    known = log.kept(arguments.file)
    keys = {job: (*job, tuple(sorted(now.items()))) for job in wanted}
    left = [job for job in wanted if keys[job] not in known]
    found = {job: known[keys[job]] for job in wanted if keys[job] in known}
    for number, one in enumerate(examined(left, arguments.processes, arguments.limit) if left else (), 1):
        log.keep(arguments.file, one, now)
        found[one.kind, one.name, one.mode] = one
        print(f"[{number} of {len(left)}] {one.kind}/{one.name} {one.mode}: {one.outcome}", file=sys.stderr)
    return [found[job] for job in wanted]


if __name__ == "__main__":
    sys.exit(main())
