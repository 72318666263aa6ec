"""Real chats, privately: what the clip rule does when a record is a conversation, and when it is a person.

A small Llama with tied embeddings learns public sentences once and is then fine-tuned, all weights, with DP-AdamW on chats
(:mod:`chats.data` says what a record is). A run is a unit, an epsilon, a clip rule and a seed:

* ``flat-C``: ``clipping="flat"``, the noise of Opacus; ``default-C0``: the defaults of ``make_private`` from that C0;
* ``rate-R``: a flat C below all norms, AdamW at the learning rate R; ``auto-H``: the same with AutoAdam from the hint H;
* ``none``: no noise and no clipping, the same draws: the reference without privacy.

Runs of a unit with one seed share Poisson draws and gradient noise, so that differences between rules come from the rules. Noise is
seeded: a study of published chats, which protects nobody. Losses are those of held-out senders, mean over records of the mean over
rows, at the last weights; the loss at the averaged weights has a column of its own.

    python examples/studies/chats_study.py --jobs 2      # stop it and go on at any time
    python examples/studies/chats_study.py --norms       # norms of records before training, by a loop; not private
    python examples/studies/chats_study.py --units sender --epsilons 8 --rules rate-0.004 rate-0.008 auto-0.001
    python examples/studies/chats_study.py --report
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from chats.data import IGNORE, UNITS, Records, Row, dataset_file, make_records, public_tokenizer, read_conversations
from chats.model import Settings, adamw, fine_tune, heldout_loss, public_model, record_losses
from common.results import AUTO_ADAM, Result, append, mean_and_error, mean_and_spread, read, results_of

from opacus_ac import AutoAdam
from opacus_ac.accounting import calibrate_noise_multiplier

FLAT = (1.0, 10.0)
DEFAULT = (0.01, 1.0, 100.0)
RULES = (*(f"flat-{c:g}" for c in FLAT), *(f"default-{c:g}" for c in DEFAULT))
EPSILONS = (2.0, 8.0)
BELOW = {"clipping": "flat", "max_grad_norm": 1.0}  # no record of the sample has a smaller norm before training
OPTIONS: dict[str, dict[str, Any]] = {"flat": {"clipping": "flat"}, "default": {}, "rate": BELOW, "auto": BELOW}
DELTA = {"conversation": 1e-5, "sender": 1e-4}  # below 1 / N
NO_CLIPPING = 1e9


@dataclass(frozen=True)
class Cell:
    """One run: epsilon None is the reference without privacy."""

    unit: str
    epsilon: float | None
    rule: str
    seed: int


def norms(unit: str, settings: Settings, cache_folder: Path, count: int = 500) -> Result:
    """Return quantiles of the gradient norms of training records before training, one record at a time. Not private."""
    model = public_model(settings, cache_folder)
    train = data(unit, settings, cache_folder)[0]
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count].tolist()
    found = []
    for index in chosen:
        model.zero_grad()
        record_losses(model, [train[index]], settings).sum().backward()
        found.append(
            math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None))
        )
    levels = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
    quantiles = torch.tensor(found).quantile(torch.tensor(levels)).tolist()
    shown = {f"{100 * level:g} %": value for level, value in zip(levels, quantiles, strict=True)}
    return {
        "unit": unit,
        "records": len(found),
        "of": len(train),
        "settings": settings.key(),
        "not_private_norms": shown,
    }


# ---------------------------------------------------------------- one run


@cache
def data(unit: str, settings: Settings, cache_folder: Path) -> tuple[Records, list[list[Row]]]:
    """Return training records, and the held-out ones that losses are taken over: those with a target, at most so many."""
    encode = public_tokenizer(settings.vocab, cache_folder)
    train, held = make_records(unit, read_conversations(dataset_file()), encode, settings.length, settings.most)
    useful = [rows for rows in held.records if any((r["labels"][1:] != IGNORE).any() for r in rows)]
    order = torch.randperm(len(useful), generator=torch.Generator().manual_seed(0)).tolist()
    return train, [useful[i] for i in order[: settings.heldout]]


def clip_arguments(cell: Cell, records: int, settings: Settings) -> dict[str, Any]:
    """Return what a cell passes to ``make_private``.

    Raises:
        ValueError: no such rule.
    """
    if cell.epsilon is None and cell.rule == "none":
        return {"clipping": "flat", "max_grad_norm": NO_CLIPPING, "noise_multiplier": 0.0}
    kind, _, number = cell.rule.partition("-")
    try:
        arguments = dict(OPTIONS[kind])
        arguments.setdefault("max_grad_norm", float(number))
        assert cell.epsilon is not None
    except (AssertionError, KeyError, ValueError):
        raise ValueError(
            f"unknown rule {cell.rule!r} at epsilon {cell.epsilon}: flat-C, default-C0, rate-R, auto-H, or none without epsilon"
        ) from None
    noise = calibrate_noise_multiplier(
        target_epsilon=cell.epsilon,
        target_delta=DELTA[cell.unit],
        sample_rate=settings.batch / records,
        steps=settings.steps,
        method="pld",
    )
    return {**arguments, "noise_multiplier": noise}


def new_optimizer(cell: Cell, model: torch.nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Return the inner optimizer of a cell: AdamW at the rate of the settings, where its rule names neither rate nor hint."""
    kind, _, number = cell.rule.partition("-")
    if kind == "auto":
        return AutoAdam(model.parameters(), lr=float(number), steps=settings.steps)
    return adamw(model, float(number) if kind == "rate" else settings.lr, settings.steps)


def version(rule: str) -> int:
    """Return the version of AutoAdam that a rule depends on; 0 for none."""
    return AUTO_ADAM if rule.startswith("auto") else 0


def run(cell: Cell, settings: Settings, cache_folder: Path) -> Result:
    """Fine-tune once and return one line of results."""
    torch.set_num_threads(1)
    start = time.process_time()
    train, held = data(cell.unit, settings, cache_folder)
    model = public_model(settings, cache_folder)
    before = heldout_loss(model, held, settings)
    arguments, optimizer = clip_arguments(cell, len(train), settings), new_optimizer(cell, model, settings)
    delta = DELTA[cell.unit]
    course, epsilon, averaged = fine_tune(model, train, settings, arguments, delta, cell.seed, held, optimizer)
    return {
        **asdict(cell),
        "auto_adam": version(cell.rule),
        "settings": settings.key(),
        "records": len(train),
        "sample_rate": settings.batch / len(train),
        "noise_multiplier": arguments["noise_multiplier"],
        "spent": epsilon if cell.epsilon is not None else None,
        "loss_before": before,
        "loss": heldout_loss(model, held, settings),
        "loss_ema": averaged,
        **course,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def finished(out: Path, settings: Settings) -> list[Result]:
    """Return the runs that are there, but for those of an older AutoAdam."""
    return [r for r in read(out, settings) if "rule" in r and r.get("auto_adam", 0) == version(r["rule"])]


def wanted(cells: Sequence[Cell], out: Path, settings: Settings) -> list[Cell]:
    """Return the cells that have not run with these settings."""
    done = {(r["unit"], r["epsilon"], r["rule"], r["seed"]) for r in finished(out, settings)}
    return [c for c in cells if (c.unit, c.epsilon, c.rule, c.seed) not in done]


# ---------------------------------------------------------------- report


def last_known(course: Sequence[float | None]) -> float | None:
    return next((value for value in reversed(course) if value is not None), None)


def table(results: list[Result]) -> list[str]:
    """Return a Markdown table: a line per unit, epsilon and rule, mean and standard deviation over seeds."""
    lines = [
        "| record | epsilon | q | z | rule | runs | held-out loss | averaged weights | last C | last noisy clip rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    order = {name: i for i, name in enumerate(("none", *RULES))}
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault((result["unit"], result["epsilon"], result["rule"]), []).append(result)
    for unit, epsilon, rule in sorted(groups, key=lambda g: (g[0], g[1] or math.inf, order.get(g[2], 99))):
        mine = groups[unit, epsilon, rule]
        rates = [rate for r in mine if (rate := last_known(r["clip_rate"])) is not None]
        spent = "none" if epsilon is None else f"{max(r['spent'] for r in mine):.2f}"
        clipped = "–" if epsilon is None else f"{statistics.fmean(r['C'][-1] for r in mine):.2g}"
        lines.append(
            f"| {unit} | {spent} | {mine[0]['sample_rate']:.3f} | {mine[0]['noise_multiplier']:.2f} | {rule} | {len(mine)} "
            f"| {mean_and_spread([r['loss'] for r in mine])} | {mean_and_spread([r['loss_ema'] for r in mine])} "
            f"| {clipped} | {f'{statistics.fmean(rates):.2f}' if rates else '–'} |"
        )
    return lines


def above_the_best(results: list[Result]) -> list[str]:
    """Return a line per unit, epsilon and hint: AutoAdam's loss in per cent above the best rate of the seed, with its standard error."""
    best: dict[Any, float] = {}
    for r in results:
        if r["rule"].startswith("rate-"):
            place = r["unit"], r["epsilon"], r["seed"]
            best[place] = min(r["loss"], best.get(place, r["loss"]))
    shares: dict[Any, list[float]] = {}
    for r in results:
        place = r["unit"], r["epsilon"], r["seed"]
        if r["rule"].startswith("auto-") and place in best:
            shares.setdefault((r["unit"], r["epsilon"], r["rule"]), []).append(100 * (r["loss"] / best[place] - 1))
    return [
        f"{unit}, epsilon {epsilon:g}, {rule}: {mean_and_error(found)} % above the best rate of the seed, {len(found)} seeds"
        for (unit, epsilon, rule), found in shares.items()
    ]


def report(out: Path, settings: Settings) -> None:
    found = read(out, settings)
    runs = finished(out, settings)
    print(f"settings {settings.key()}: {asdict(settings)}")
    print("\n".join([*table(runs), *above_the_best(runs)]))
    for unit in dict.fromkeys(r["unit"] for r in runs):
        mine = [r for r in runs if r["unit"] == unit]
        before = statistics.fmean(r["loss_before"] for r in mine)
        print(f"{unit}: N = {mine[0]['records']}, delta {DELTA[unit]:g}, held-out loss before fine-tuning {before:.3f}")
    for line in (r for r in found if "not_private_norms" in r):
        shown = ", ".join(f"{level}: {value:.2f}" for level, value in line["not_private_norms"].items())
        print(
            f"{line['unit']}: norms before training of {line['records']} of {line['of']} records, NOT PRIVATE: {shown}"
        )


def all_cells(
    seeds: Sequence[int],
    rules: Sequence[str] = RULES,
    units: Sequence[str] = UNITS,
    epsilons: Sequence[float] = EPSILONS,
) -> list[Cell]:
    """Return the grid, seed after seed, so that what has run is a whole table."""
    cells = []
    for seed in seeds:
        for unit in units:
            cells.append(Cell(unit, None, "none", seed))
            cells += [Cell(unit, epsilon, rule, seed) for epsilon in epsilons for rule in rules]
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished yet, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rules", nargs="+", metavar="RULE", default=RULES, help=f"of {', '.join(RULES)}, or any number"
    )
    parser.add_argument("--units", nargs="+", choices=UNITS, default=UNITS)
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--lr", type=float, default=Settings.lr)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("runs/chats"))
    parser.add_argument("--out", type=Path, default=Path("runs/chats/results.jsonl"))
    parser.add_argument("--norms", action="store_true", help="norms of records before training; not private")
    parser.add_argument("--report", action="store_true", help="print the table of what is finished; run nothing")
    arguments = parser.parse_args(argv)
    settings = Settings(lr=arguments.lr)
    if arguments.report:
        report(arguments.out, settings)
        return 0
    cells = all_cells(arguments.seeds, arguments.rules, arguments.units, arguments.epsilons)
    for cell in cells:
        clip_arguments(cell, 10 * settings.batch, settings)  # a wrong name before the first run
    public_model(settings, arguments.cache)
    if arguments.norms:
        for unit in UNITS:
            append(arguments.out, norms(unit, settings, arguments.cache))
        return 0
    missing, start = wanted(cells, arguments.out, settings), time.perf_counter()
    tasks = [(cell, settings, arguments.cache) for cell in missing]
    for number, result in enumerate(results_of(run, tasks, arguments.jobs), start=1):
        append(arguments.out, result)
        epsilon = "" if result["epsilon"] is None else f" epsilon {result['epsilon']:g}"
        print(
            f"[{number}/{len(missing)}, {time.perf_counter() - start:.0f} s] {result['unit']}{epsilon} {result['rule']} "
            f"seed {result['seed']}: loss {result['loss_before']:.3f} -> {result['loss']:.3f}, {result['cpu_seconds']} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
