"""The results in Markdown: a table of all entries, then what each of them measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from step_benchmark.measuring import Figures
from step_benchmark.tables import report as table_of_a_shape
from step_benchmark.variants import NO_NOISE

from device_checks.entries import ENTRIES, EXACTNESS, LENGTH, NOISE, SPEED
from device_checks.results import WAITING, Result
from device_checks.speed import OPACUS, PLAIN, Target, figures_of


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; text in cells may hold anything."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def whole(results: Mapping[str, Result], origin: Mapping[str, str], names: Sequence[str], judge: bool) -> str:
    """Return the page.

    Args:
        results: those there are, by entry.
        origin: machine and versions.
        names: the entries that were asked for.
        judge: whether targets are compared with what was measured, as they are on a GPU.
    """
    waiting = {name: Result(name, WAITING, "there was no time: run the same command again") for name in names}
    shown = {name: results.get(name, waiting[name]) for name in names}
    rows = [[name, ENTRIES[name][0], one.status, f"{one.seconds:.0f}", one.reason] for name, one in shown.items()]
    parts = ["# Device check", "; ".join(f"{name}: {value}" for name, value in origin.items()) + "\n"]
    parts.append(table(("entry", "part", "result", "seconds", "reason"), rows))
    for title, of_part in ((EXACTNESS, _tests), (NOISE, _noise), (LENGTH, _lengths), (SPEED, _speed)):
        found = [one for name, one in shown.items() if ENTRIES[name][0] == title and one.values]
        if found:
            parts += [f"## {title.capitalize()}\n", *of_part(found)]
    if SPEED in {ENTRIES[name][0] for name in names}:
        parts += [
            "## Targets\n",
            table(("entry", "target", "wanted", "measured", "reached"), list(_targets(shown, judge))),
        ]
    return "\n".join(parts)


def _tests(results: Sequence[Result]) -> Iterator[str]:
    words = ("passed", "failed", "error", "skipped")
    yield table(("battery", *words), [[one.entry, *(one.values["counts"][word] for word in words)] for one in results])
    for one in results:
        for name, reason in one.values["bad"].items():
            yield f"* `{name}`: {' '.join(reason.split())}\n"


def _noise(results: Sequence[Result]) -> Iterator[str]:
    for one in results:
        rows = [[name, f"{rate:,.0f}"] for name, rate in one.values["rates"].items()]
        yield table((f"{one.values['size']:,} values", "millions a second"), rows)


def _lengths(results: Sequence[Result]) -> Iterator[str]:
    for one in results:
        lengths = [str(length) for length in one.values["lengths"]]
        mib = one.values["mib"]
        rows = [[name, *(_number(mib[name][length]) for length in lengths)] for name in mib]
        yield "MiB above what is held between steps, one record of so many tokens:\n"
        yield table(("variant", *lengths), rows)


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return "-" if math.isnan(value) else f"{value:,.0f}"


def _speed(results: Sequence[Result]) -> Iterator[str]:
    for one in results:
        shape, figures = figures_of(one.values)
        yield table_of_a_shape(one.entry, shape, figures)
        rows = [[name, str(each.parts), *_waits(each.syncs)] for name, each in figures.items() if each.syncs]
        if rows:
            yield table(("variant", "parts of a step", "waits for the device", "first of them"), rows)


def _waits(syncs: Mapping[str, Any]) -> tuple[str, str]:
    if "skipped" in syncs:
        return "skipped", str(syncs["skipped"])
    return str(syncs["waits"]), str(syncs["refused"] or "none")


def _targets(shown: Mapping[str, Result], judge: bool) -> Iterator[list[str]]:
    """Yield a row for every target of every entry that has some."""
    for name, one in shown.items():
        target = getattr(ENTRIES[name][1], "target", None)
        if target is None:
            continue
        figures = figures_of(one.values)[1] if one.values else {}
        for what, wanted, measured, better in _measured(ENTRIES[name][1].names[0], target, figures):
            known = judge and not math.isnan(measured)
            said = ("yes" if better(measured, wanted) else "no") if known else "-"
            sign = "at most" if better is at_most else "at least"
            yield [name, what, f"{sign} {wanted:g}", "-" if not known else f"{measured:.3g}", said]


def at_most(measured: float, wanted: float) -> bool:
    return measured <= wanted


def at_least(measured: float, wanted: float) -> bool:
    return measured >= wanted


def _measured(main: str, target: Target, figures: Mapping[str, Figures]) -> Iterator[tuple[str, float, float, Any]]:
    """Yield (what, wanted, measured, how to compare) for the variant ``main``; nan where it was not measured."""
    ours, plain = figures.get(main, Figures()), figures.get(PLAIN, Figures())
    yield "time of the ordinary step", target.time, _median(ours.ratios), at_most
    memory = _median(ours.peak_mib) / _median(plain.peak_mib) if _median(plain.peak_mib) else math.nan
    yield "memory of the ordinary step", target.memory, memory, at_most
    noise = _median(ours.noise_shares) if f"{main}{NO_NOISE}" in figures else math.nan
    yield "share of the noise", target.noise, noise, at_most
    for other in OPACUS:
        ahead = _median(figures.get(other, Figures()).ratios) / _median(ours.ratios)
        yield f"times faster than {other}", target.ahead, ahead, at_least


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan
