"""Does the default clip policy need a good C0? It is compared with the best fixed clipping norm at the same epsilon.

A small Qwen2-shaped model learns the angry tone without privacy (a public stand-in, made once and kept in ``--cache``)
and is then fine-tuned, all weights, with DP-AdamW on loving dialogues. Every configuration has the same noise
multiplier, sample rate and number of steps, so the accounted mechanism is the same; the clip rule is all that differs:

* ``flat-C``: ``clipping="flat"``, the noise of Opacus;
* ``default-C0``: the defaults of ``make_private`` from that C0;
* ``paper``: ``preset="paper"`` (target clip rate 0.2, not normalised, C0 = 3), for contrast.

Loss: mean over held-out records of the record's mean over its reply tokens, at the current weights; the loss at the
averaged weights is a column of its own. Runs with the same seed share private data, Poisson draws and gradient noise
(common random numbers), so that differences between rows come from the clip rule and not from chance; the statistics have
noise of their own. A seeded noise protects nobody: the data is synthetic, and this is a study.

Example: ``python examples/studies/clip_study.py --seeds 0 1 2 --jobs 2``, then the same with ``--report``. The exit status is 1
when a default run ends more than 3 % above the best flat C (or when runs are missing).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common.results import Result, append, read, results_of
from common.small_qwen import Row, Settings, encode_all, forever, heldout_loss, new_model, pretrain, public_tokenizer
from common.tone_dialogues import train_and_heldout
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.errors import NotPrivateWarning

FLAT = (0.3, 3.0, 10.0, 30.0)
DEFAULT = (0.01, 1.0, 100.0)
NAMES = (*(f"flat-{c:g}" for c in FLAT), *(f"default-{c:g}" for c in DEFAULT), "paper")
TOLERANCE = 0.03
DELTA = 1e-5


# ---------------------------------------------------------------- one run


def clip_arguments(name: str) -> dict[str, Any]:
    """Arguments of ``make_private`` for a configuration such as ``flat-3``, ``default-0.01`` or ``paper``.

    Raises:
        ValueError: no such configuration.
    """
    kind, _, number = name.partition("-")
    try:
        if name == "paper":
            return {"preset": "paper"}
        return {"flat": {"clipping": "flat"}, "default": {}}[kind] | {"max_grad_norm": float(number)}
    except (KeyError, ValueError):
        raise ValueError(f"unknown configuration {name!r}: flat-C, default-C0 or paper") from None


def run(name: str, seed: int, settings: Settings, cache: Path) -> Result:
    """Fine-tune once and return one row of results: losses, epsilon, and the released course of C."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", category=NotPrivateWarning)
    start = time.perf_counter()
    tokenizer = public_tokenizer(settings, cache)
    train, heldout = train_and_heldout("loving", settings.records, settings.heldout, seed)
    rows, held_rows = encode_all(train, tokenizer, settings), encode_all(heldout, tokenizer, settings)
    model = new_model(settings)
    model.load_state_dict(torch.load(pretrain(settings, cache), weights_only=True))
    before = heldout_loss(model, held_rows)
    arguments = clip_arguments(name) | {"noise_generator": torch.Generator().manual_seed(seed)}
    course, epsilon, ema = fine_tune(model, rows, settings, arguments, held_rows)
    return {
        "name": name,
        "seed": seed,
        "settings": settings.key(),
        "steps": settings.steps,
        "epsilon": epsilon,
        "loss_before": before,
        "loss": heldout_loss(model, held_rows),
        "loss_ema": ema,
        **course,
        "seconds": round(time.perf_counter() - start, 1),
    }


def fine_tune(
    model: torch.nn.Module, rows: list[Row], settings: Settings, arguments: dict[str, Any], heldout: list[Row]
) -> tuple[dict[str, list[float | None]], float, float]:
    """Train ``model`` privately in place.

    Returns:
        What was released per step (C, noisy clip rate, learning-rate multiplier), epsilon at ``DELTA``, and the
        held-out loss at the averaged weights.
    """
    engine = PrivacyEngine(accountant="vrdp")
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0),
        data_loader=DataLoader(rows, batch_size=settings.batch, shuffle=True),
        noise_multiplier=settings.noise_multiplier,
        grad_sample_mode="hooks",
        max_physical_batch_size=settings.physical,
        **arguments,
    )
    course: dict[str, list[float | None]] = {"C": [], "clip_rate": [], "lr_multiplier": []}
    batches = forever(loader)
    while optimizer.steps_taken < settings.steps:
        taken = optimizer.steps_taken
        optimizer.zero_grad()
        private(**next(batches)).loss.backward()
        optimizer.step()
        if optimizer.steps_taken > taken and optimizer.released is not None:
            released = optimizer.released
            course["C"].append(released.max_grad_norm)
            course["clip_rate"].append(released.clip_rate)
            course["lr_multiplier"].append(released.lr_multiplier)
    with optimizer.ema_weights():
        ema = heldout_loss(model, heldout)
    engine.detach(private)
    return course, engine.get_epsilon(DELTA), ema


def run_all(wanted: list[tuple[str, int]], settings: Settings, cache: Path, out: Path, jobs: int) -> None:
    """Run what is wanted and append each result to ``out`` as soon as it is there."""
    pretrain(settings, cache)
    tasks = [(name, seed, settings, cache) for name, seed in wanted]
    for number, result in enumerate(results_of(run, tasks, jobs), start=1):
        append(out, result)
        line = f"[{number}/{len(tasks)}] {result['name']} seed {result['seed']}: loss {result['loss']:.4f}"
        print(f"{line}, {result['seconds']:.0f} s", flush=True)


# ---------------------------------------------------------------- report


def summarise(results: list[Result]) -> list[Result]:
    """Return one row per configuration: mean and spread over seeds, and the ratio to the best flat C."""
    table = []
    for name in dict.fromkeys(result["name"] for result in results):
        mine = [result for result in results if result["name"] == name]
        losses = [result["loss"] for result in mine]
        table.append(
            {
                "name": name,
                "runs": len(mine),
                "before": statistics.fmean(result["loss_before"] for result in mine),
                "loss": statistics.fmean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 else math.nan,
                "ema": statistics.fmean(result["loss_ema"] for result in mine),
                "last_C": statistics.fmean(result["C"][-1] for result in mine),
                "epsilon": statistics.fmean(result["epsilon"] for result in mine),
            }
        )
    best = min((row["loss"] for row in table if row["name"].startswith("flat-")), default=math.nan)
    for row in table:
        row["ratio"] = row["loss"] / best
    order = {name: i for i, name in enumerate(NAMES)}
    return sorted(table, key=lambda row: (order.get(row["name"], len(order)), row["name"]))


def verdict(table: list[Result], seeds: int) -> tuple[bool, str]:
    """Say whether every default run ends within the tolerance of the best flat C, over enough seeds."""
    needed = [f"flat-{c:g}" for c in FLAT] + [f"default-{c:g}" for c in DEFAULT]
    runs = {row["name"]: row["runs"] for row in table}
    missing = [name for name in needed if runs.get(name, 0) < seeds]
    worst = max((row["ratio"] for row in table if row["name"].startswith("default-")), default=math.nan)
    text = f"worst default / best flat = {worst:.4f} (criterion: at most {1 + TOLERANCE:.2f})"
    if missing:
        return False, f"{text}; INCOMPLETE, fewer than {seeds} seeds: {', '.join(missing)}"
    met = worst <= 1 + TOLERANCE
    return met, f"{text}: {'met' if met else 'NOT MET'}"


def report(out: Path, settings: Settings, seeds: int) -> int:
    """Print the table and return the exit status."""
    table = summarise(read(out, settings))
    print(f"settings {settings.key()}: {asdict(settings)}")
    print("| configuration | runs | held-out loss | std over seeds | ratio to best flat | EMA loss | last C |")
    print("|---|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row['name']} | {row['runs']} | {row['loss']:.4f} | {row['spread']:.4f} | {row['ratio']:.4f} "
            f"| {row['ema']:.4f} | {row['last_C']:.3g} |"
        )
    if table:
        epsilons = {round(row["epsilon"], 6) for row in table}
        print(f"loss before: {table[0]['before']:.4f}; epsilon at delta {DELTA:g}: {sorted(epsilons)}")
    relative = [row["spread"] / row["loss"] * math.sqrt(2 / row["runs"]) for row in table if row["runs"] > 1]
    if relative:
        print(
            f"standard error of a ratio between two rows: below {100 * statistics.median(relative):.1f} %, as rows share their noise"
        )
    met, text = verdict(table, seeds)
    print(text)
    return 0 if met else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the configurations that are not finished yet, or report."""
    parser = argparse.ArgumentParser(description="Compare the default clip policy with the best flat C.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NAMES, help=f"of {', '.join(NAMES)}, or any C")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--cache", type=Path, default=Path("runs/clip_study"))
    parser.add_argument("--out", type=Path, default=Path("runs/clip_study/results.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the table of what is finished; run nothing")
    arguments = parser.parse_args(argv)
    settings = Settings(steps=arguments.steps)
    if arguments.report:
        return report(arguments.out, settings, len(set(arguments.seeds)))
    for name in arguments.only:
        clip_arguments(name)
    done = {(result["name"], result["seed"]) for result in read(arguments.out, settings)}
    wanted = [(name, seed) for seed in arguments.seeds for name in arguments.only if (name, seed) not in done]
    if wanted:
        run_all(wanted, settings, arguments.cache, arguments.out, arguments.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
