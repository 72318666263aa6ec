"""AutoAdam against AdamW tuned by hand: held-out loss from hints over decades, beside the best of AdamW's rates and momenta.

    python examples/studies/auto_study.py --page --jobs 2                # the table of docs/automatic-rate.md: hours
    python examples/studies/auto_study.py --jobs 2                       # stop it and go on at any time
    python examples/studies/auto_study.py --steps 12 --seeds 41 42 43
    python examples/studies/auto_study.py --quick                        # one seed, two rates, one hint: 6 steps
    python examples/studies/auto_study.py --lora 4 --others auto         # adapters; and with the adaptive clipping norm
    python examples/studies/auto_study.py --others prodigy-flat dog-flat # optimizers without a rate, from their packages
    python examples/studies/auto_study.py --report                       # run nothing, print the table

All runs of a seed share data, draws and noise, and spend the same epsilon. The best of AdamW's runs is chosen for each seed by the
held-out loss, which no private run could do for nothing: a sweep costs the epsilon of every run in it. AutoAdam's runs are one each.
With ``--page``, the places are those of :mod:`small_model.places`, with today's accountant, and the last row is the mean over places.
Noise is seeded, and the records are invented: a study, which protects nobody.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common.results import Result, mean_and_error, read, run_missing
from common.tone_dialogues import TONES
from small_model import cell as cells
from small_model import public
from small_model.cell import Cell
from small_model.methods import METHODS
from small_model.places import ADAPTERS, PLACES, Place
from small_model.places import HINTS as DECADES
from small_model.report import grouped, markdown

from opacus_ac.optimizer.momentum import planned_beta1

SEEDS = (31, 32, 33)
PAGE_SEEDS = (131, 132, 133, 134, 135, 136)  # no constant of the rule was chosen on these
RATES = (0.006, 0.009, 0.013, 0.02)
USUAL = 0.9
HINTS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
START = 1e-3  # most by which losses before training differ between runs with the same weights
ACCOUNTANT = "vrdp"  # of AdamW and of AutoAdam alike
PLACE = ("model", "lora", "batch", "tone", "epsilon", "steps")
OTHERS = ("auto", "prodigy-flat", "d-adaptation-flat", "dog-flat")


def momenta(steps: int) -> tuple[float, float]:
    """Return the momenta of AdamW: that of the planned steps, and the usual one."""
    return planned_beta1(steps), USUAL


def by_hand(places: Iterable[dict[str, Any]], rates: Sequence[float], usual: bool = True) -> list[Cell]:
    """AdamW with flat C at every rate and momentum; without ``usual``, at that of the planned steps alone."""
    return [
        Cell("adamw-flat", rate=rate, beta1=b, accountant=ACCOUNTANT, **p)
        for p in places
        for b in momenta(p["steps"])[: 1 + usual]
        for rate in rates
    ]


def automatic(places: Iterable[dict[str, Any]], hints: Sequence[float]) -> list[Cell]:
    """AutoAdam with flat C from every hint, with the momentum of the planned steps."""
    return [
        Cell("auto-flat", rate=hint, beta1=planned_beta1(p["steps"]), accountant=ACCOUNTANT, **p)
        for p, hint in product(places, hints)
    ]


def without_a_rate(places: Iterable[dict[str, Any]], others: Sequence[str]) -> list[Cell]:
    """Other methods that need no learning rate, with the momentum of the planned steps."""
    return [
        Cell(name, rate=METHODS[name].rate, beta1=planned_beta1(p["steps"]), accountant=ACCOUNTANT, **p)
        for p in places
        for name in others
    ]


def percent(losses: Sequence[float], references: Sequence[float]) -> str:
    """Return the mean difference in per cent, with its standard error over seeds."""
    return mean_and_error([100 * (a / b - 1) for a, b in zip(losses, references, strict=True)])


def table(results: Sequence[Result]) -> str:
    """Return the table: a row for each place, in per cent of the best AdamW of each seed."""
    hints = sorted({r["rate"] for r in results if r["method"] == "auto-flat"})
    others = [name for name in OTHERS if any(r["method"] == name for r in results)]
    rows = []
    for place, here in grouped([{"lora": 0, "batch": 200, **r} for r in results], *PLACE).items():
        adamw = [r for r in here if r["method"] == "adamw-flat"]
        best = _lowest(adamw)
        row = [_named(place), str(len(best)), f"{statistics.fmean(best.values()):.3f}" if best else ""]
        row += [_against(_lowest([r for r in adamw if r["beta1"] == b]), best) for b in momenta(place[-1])]
        row += [
            _against(_lowest([r for r in here if (r["method"], r["rate"]) == ("auto-flat", hint)]), best)
            for hint in hints
        ]
        row += [_against(_lowest([r for r in here if r["method"] == name]), best) for name in others]
        rows.append(row)
    head = ["model, tone, epsilon, steps", "seeds", "best AdamW", "AdamW, planned beta1", f"AdamW, beta1 {USUAL:g}"]
    return markdown([*head, *(f"AutoAdam from {hint:g}" for hint in hints), *others], rows)


def _named(place: Sequence[Any]) -> str:
    model, lora, batch, *rest = place
    name = f"{model} with LoRA of rank {lora}" if lora else model
    return ", ".join(map(str, [name if batch == 200 else f"{name}, batches of {batch}", *rest]))


def _lowest(results: Sequence[Result]) -> dict[int, float]:
    """Return the lowest loss of each seed."""
    found: dict[int, float] = {}
    for result in results:
        found[result["seed"]] = min(result["loss"], found.get(result["seed"], result["loss"]))
    return found


def _against(losses: Mapping[int, float], best: Mapping[int, float]) -> str:
    shared = sorted(losses.keys() & best.keys())
    return percent([losses[seed] for seed in shared], [best[seed] for seed in shared]) if shared else ""


def page_table(results: Sequence[Result], seeds: Sequence[int]) -> str:
    """Return the table of :data:`small_model.places.PLACES`, in per cent of the best AdamW of each seed, and its means.

    The last column is in per cent of DP-AdamW as usual, over all hints. A seed counts when all of its runs at a place are there.
    """
    found = {result["key"]: result for result in results}
    rows, means = [], []
    for place in PLACES:
        losses = [_page_losses(place, seed, found) for seed in seeds[: place.seeds]]
        here = [one for one in losses if one is not None]
        if not here:
            continue
        numbers = [[row[column] for row in here] for column in range(len(here[0]))]
        best, usual, *by_hint = numbers
        columns: list[list[float] | None] = [
            by_hint[place.hints.index(number)] if number in place.hints else None for number in range(len(DECADES))
        ]
        against = [
            statistics.fmean([100 * (a / b - 1) for a, b in zip(column, usual, strict=True)]) for column in by_hint
        ]
        row = [place.name(), f"{place.epsilon:g}", str(place.steps), str(len(here)), f"{statistics.fmean(best):.3f}"]
        row += [percent(column, best) if column else "" for column in (usual, *columns)]
        rows.append([*row, f"{statistics.fmean(against):+.1f}"])
        shares = [[100 * (a / b - 1) for a, b in zip(column, best, strict=True)] for column in (usual, *by_hint)]
        means.append((place.epsilon, [*map(statistics.fmean, shares), statistics.fmean(against)]))
    rows += _mean_rows(means)
    hints = [f"from {hint:g} ({hint * ADAPTERS:g})" for hint in DECADES]
    head = ["model", "epsilon", "steps", "seeds", "best AdamW", "AdamW as usual", *hints, "over as usual"]
    return markdown(head, rows) + "\n\n" + _worst(results)


def _mean_rows(means: Sequence[tuple[float, list[float]]]) -> list[list[str]]:
    """Return the mean over all places, and over those with more budget than the least.

    Args:
        means: of each place its epsilon, and the means of the columns: AdamW as usual, every hint, and over as usual.
    """
    rows, least = [], min((epsilon for epsilon, _ in means), default=0.0)
    for name, epsilons in (
        ("", {e for e, _ in means}),
        (f", epsilon above {least:g}", {e for e, _ in means} - {least}),
    ):
        here = [columns for epsilon, columns in means if epsilon in epsilons]
        if here:
            usual, auto, against = (
                f"{statistics.fmean(values):+.1f}"
                for values in ([m[0] for m in here], [v for m in here for v in m[1:-1]], [m[-1] for m in here])
            )
            rows.append(
                [f"mean over {len(here)} places{name}", "", "", "", "", usual, "", "", f"all: {auto}", "", against]
            )
    return rows


def _page_losses(place: Place, seed: int, found: Mapping[str, Result]) -> list[float] | None:
    """Return the losses of the best AdamW, of DP-AdamW as usual and of every hint; None where one is missing."""
    cells = [place.by_hand(seed), [place.as_usual(seed)], *([cell] for cell in place.automatic(seed).values())]
    if not all(cell.key() in found for group in cells for cell in group):
        return None
    return [min(found[cell.key()]["loss"] for cell in group) for group in cells]


def _worst(results: Sequence[Result]) -> str:
    """Say how far the worst run of AutoAdam ended below or above its loss before training."""
    above = max((r["loss"] - r["loss_before"] for r in results if r["method"] == "auto-flat"), default=0.0)
    return f"The worst run of AutoAdam ended {above:+.2f} from its loss before training."


def page(seeds: Sequence[int]) -> list[Cell]:
    """Return the runs of the page, all places of a seed before the next seed."""
    return [
        cell
        for number, seed in enumerate(seeds)
        for place in PLACES
        if number < place.seeds
        for cell in place.cells(seed)
    ]


KEPT = (
    "key", "method", "model", "lora", "batch", "tone", "epsilon", "steps", "rate", "seed", "loss_before", "loss", "noise_multiplier", "seconds"
)  # fmt: skip


def run(cell: Cell) -> Result:
    """Return what is kept of a run: what it was, its losses, and the rate that it found last."""
    result = cells.run(cell)
    found = {"found_rate": result["found_rate"][-1]} if "found_rate" in result else {}
    return {name: result[name] for name in KEPT} | {"beta1": cell.resolved().beta1} | found


def one_start(results: Iterable[Result]) -> None:
    """Refuse runs that began with different weights: public training of the ternary model differs between machines.

    Raises:
        SystemExit: If two runs of one model, tone and seed had different losses before training.
    """
    for (model, tone, seed), here in grouped(list(results), "model", "tone", "seed").items():
        losses = [result["loss_before"] for result in here]
        if max(losses) - min(losses) > START:
            raise SystemExit(
                f"runs of {model}, {tone} tone, seed {seed} had losses from {min(losses):.4f} to {max(losses):.4f} before "
                "training, so their public models differ and they cannot be compared: remove those of one machine from --out"
            )


def wanted(arguments: argparse.Namespace) -> list[Cell]:
    """Return the runs that the arguments ask for, the seeds one after the other."""
    if arguments.page:
        return page(arguments.seeds or PAGE_SEEDS)
    steps, rates, hints, seeds = arguments.steps, arguments.rates, arguments.hints, arguments.seeds or SEEDS
    if arguments.quick:
        steps, rates, hints, seeds = [6], [0.009, 0.02], [1e-3], seeds[:1]
    settings = product(
        seeds, arguments.models, arguments.lora, arguments.batches, arguments.tones, arguments.epsilons, steps
    )
    names = ("seed", *PLACE)
    places = [dict(zip(names, values, strict=True)) for values in settings]
    return [
        cell
        for place in places
        for cell in (
            *by_hand([place], rates, not arguments.planned), *automatic([place], hints), *without_a_rate([place], arguments.others)
        )
    ]  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    made.add_argument("--quick", action="store_true", help="a run of minutes, to see that it works")
    made.add_argument("--page", action="store_true", help="the places of docs/automatic-rate.md, and nothing else")
    made.add_argument(
        "--seeds", type=int, nargs="+", help="one run each; all runs of a seed share data, draws and noise"
    )
    made.add_argument("--models", nargs="+", choices=public.MODELS, default=["llama"])
    made.add_argument("--lora", type=int, nargs="+", default=[0], help="ranks of adapters; 0 for all weights")
    made.add_argument("--batches", type=int, nargs="+", default=[200], help="expected records in a batch")
    made.add_argument("--others", nargs="+", choices=OTHERS, default=[], help="other methods without a learning rate")
    made.add_argument("--tones", nargs="+", choices=TONES, default=["loving"])
    made.add_argument("--epsilons", type=float, nargs="+", default=[4.0])
    made.add_argument("--steps", type=int, nargs="+", default=[30, 12])
    made.add_argument("--rates", type=float, nargs="+", default=RATES, help="of AdamW")
    made.add_argument("--planned", action="store_true", help="AdamW with the momentum of the planned steps alone")
    made.add_argument("--hints", type=float, nargs="+", default=HINTS, help="of AutoAdam")
    made.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    made.add_argument("--out", type=Path, default=Path("runs/auto/results.jsonl"))
    made.add_argument("--report", action="store_true", help="run nothing; print the table of the runs that are there")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table."""
    arguments = parser().parse_args(argv)
    grid = {c.key(): c for c in wanted(arguments)}
    if not arguments.report:
        for model in sorted({c.model for c in grid.values()}):
            public.public_model(model)
        found = [result for result in read(arguments.out) if result["key"] in grid]
        for done, result in run_missing(grid.values(), run, arguments.out, arguments.jobs):
            found.append(result)
            one_start(found)
            print(
                f"{done} {result['model']} {result['method']} {result['steps']} steps, rate {result['rate']:g}, seed "
                f"{result['seed']}: loss {result['loss']:.4f}, {result['seconds']:.0f} s",
                flush=True,
            )
    results = [result for result in read(arguments.out) if result["key"] in grid]
    if not results:
        raise SystemExit(f"no finished run in {arguments.out}: run it first, without --report")
    one_start(results)
    print(page_table(results, arguments.seeds or PAGE_SEEDS) if arguments.page else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
