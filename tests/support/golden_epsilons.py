"""The epsilon of fixed histories by every accountant of the package, kept in ``tests/accounting/golden.json``.

``python tests/support/golden_epsilons.py`` prints what would change in that file, and ``--write`` changes it. A change
is a privacy change: CONTRIBUTING.md says what it needs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opacus.accountants import IAccountant

from opacus_ac.accounting import Event, PureDPAccountant, VariableRatePLDAccountant, VariableRateRDPAccountant
from opacus_ac.accounting.opacus_accountants import CheckedGDPAccountant, CheckedPRVAccountant, CheckedRDPAccountant

FILE = Path(__file__).parents[1] / "accounting" / "golden.json"
COMMAND = "python tests/support/golden_epsilons.py --write"
OWN: dict[str, type[IAccountant]] = {"vrdp": VariableRateRDPAccountant, "vpld": VariableRatePLDAccountant}
OPACUS: dict[str, type[IAccountant]] = {
    "rdp": CheckedRDPAccountant,
    "prv": CheckedPRVAccountant,
    "gdp": CheckedGDPAccountant,
}
DELTAS = (1e-5, 1e-6, 1e-9)
MOST_OF_PRV = 3
"""Opacus's "prv" takes a tenth of a second for each distinct pair of noise and rate, so longer histories go without."""

History = list[tuple[Event, int]]


def histories() -> Iterator[tuple[History, float]]:
    """Yield each history with its delta."""
    deltas = itertools.cycle(DELTAS)
    for history in itertools.chain(_constant(), _other_sampling(), _changing(), _laplace(), _edges()):
        yield history, next(deltas)


def _constant() -> Iterator[History]:
    for noise in (0.5, 0.8, 1.0, 1.5, 2.0, 4.0, 10.0):
        for rate in (0.0005, 0.01, 0.1, 0.5, 1.0):
            for steps in (1, 100, 2000):
                yield [(Event(noise, rate), steps)]


def _other_sampling() -> Iterator[History]:
    for noise, passes in itertools.product((1.0, 2.0, 5.0), (1, 3, 10)):
        yield [(Event(noise, 1.0, "shuffled"), passes)]
    for noise, rate, steps in itertools.product((0.8, 1.5, 3.0), (0.005, 0.05, 0.3), (1, 100, 1000)):
        yield [(Event(noise, rate, "fixed_size"), steps)]
    truncated = ((0.0064, 10_000, 90), (0.05, 1000, 60), (0.2, 500, 100))
    for noise, (rate, records, limit), steps in itertools.product((0.8, 1.5, 3.0), truncated, (1, 200)):
        yield [(Event(noise, rate, "truncated_poisson", records, limit), steps)]


def _changing() -> Iterator[History]:
    """Rates, noise and kinds of sampling that change within a run."""
    for noise in (0.7, 1.0, 2.0):
        for rates, steps in (((0.01, 0.02), 200), ((0.005, 0.01, 0.02), 100), ((0.5, 0.01), 20)):
            yield [(Event(noise, rate), steps) for rate in rates]
        yield [(Event(noise, round(0.01 + 0.001 * number, 6)), 10) for number in range(12)]
        yield [(Event(noise, round(0.004 * 1.03**number, 8)), 5) for number in range(60)]
    for rate in (0.01, 0.1):
        yield [(Event(noise, rate), 100) for noise in (1.0, 1.5)]
        yield [(Event(round(0.8 + 0.05 * number, 4), rate), 20) for number in range(10)]
    for noise in (1.0, 3.0):
        yield [(Event(noise, 0.01), 300), (Event(noise, 0.02, "fixed_size"), 100)]
        yield [(Event(noise, 0.01), 300), (Event(noise, 1.0, "shuffled"), 2)]
        yield [
            (Event(noise, 0.01, "fixed_size"), 50),
            (Event(noise, 0.0064, "truncated_poisson", 10_000, 90), 50),
            (Event(noise, 0.02), 50),
        ]


def _laplace() -> Iterator[History]:
    for noise, rate, steps in itertools.product((1.0, 4.0, 20.0), (0.01, 0.2, 1.0), (1, 500)):
        yield [(Event(noise, rate, mechanism="laplace"), steps)]


def _edges() -> Iterator[History]:
    yield []
    yield [(Event(math.inf, 0.5), 10)]
    yield [(Event(1.0, 0.0), 10)]
    yield [(Event(0.0, 0.01), 1)]
    yield [(Event(50.0, 0.001), 1)]
    yield [(Event(1.0, 1e-6), 100_000)]


def epsilons(history: History, delta: float) -> dict[str, float]:
    """Return epsilon by every accountant that knows the cost of the events."""
    if any(event.mechanism == "laplace" for event, _ in history):
        return {"pure": _spent(PureDPAccountant(), history, delta)}
    found = {name: _spent(kind(), history, delta) for name, kind in OWN.items()}
    if all(event.sampling == "poisson" for event, _ in history):
        runs = [(event.noise_multiplier, event.sample_rate, steps) for event, steps in history]
        for name, kind in OPACUS.items():
            if name != "prv" or len(runs) <= MOST_OF_PRV:
                accountant = kind()
                accountant.history = runs
                found[name] = float(accountant.get_epsilon(delta))
    return found


def _spent(accountant: Any, history: History, delta: float) -> float:
    for event, steps in history:
        accountant.step_event(event, steps)
    return float(accountant.get_epsilon(delta))


def made() -> list[dict[str, Any]]:
    """Return the content of the file, from the accountants as they are."""
    return [
        {
            "history": [{"event": _plain(event), "steps": steps} for event, steps in history],
            "delta": delta,
            "epsilon": {name: _written(epsilon) for name, epsilon in epsilons(history, delta).items()},
        }
        for history, delta in histories()
    ]


def kept() -> list[dict[str, Any]]:
    """Return the content of the file."""
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return rows


def read(row: dict[str, Any]) -> tuple[History, float, dict[str, float]]:
    """Return history, delta and epsilons of a row of the file."""
    history = [
        (Event(**{**part["event"], "noise_multiplier": float(part["event"]["noise_multiplier"])}), part["steps"])
        for part in row["history"]
    ]
    return history, row["delta"], {name: float(epsilon) for name, epsilon in row["epsilon"].items()}


def _plain(event: Event) -> dict[str, Any]:
    """Return the fields of an event that are not the usual ones; JSON has no infinity."""
    usual = {"sampling": "poisson", "dataset_size": None, "max_batch_size": None, "mechanism": "gaussian"}
    values = {name: getattr(event, name) for name in ("noise_multiplier", "sample_rate", *usual)}
    values["noise_multiplier"] = _written(event.noise_multiplier)
    return {name: value for name, value in values.items() if name not in usual or value != usual[name]}


def _written(value: float) -> float | str:
    return "inf" if math.isinf(value) else float(f"{value:.12g}")


def main() -> int:
    """Compare the file with the accountants, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="change the file")
    options = parser.parse_args()
    rows, before = made(), kept() if FILE.exists() else []
    changed = sum(row not in before for row in rows) + max(0, len(before) - len(rows))
    print(f"{len(rows)} histories, {changed} of them new or changed")
    if options.write:
        FILE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    return 0 if options.write or not changed else 1


if __name__ == "__main__":
    sys.exit(main())
