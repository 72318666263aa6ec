"""Does the model give away a secret? Invented codes are hidden in real chats, and the trained model is asked for them.

Carlini et al. 2019 (arXiv 1802.08232). A canary is a record such as "my door code is 4927", its digits drawn at random, inserted
0, 1, 4, 16 or 64 times; each insertion is a record of its own. After training all 10,000 codes are ranked by the probability that
the model gives them after "my door code is "; exposure is log2 10,000 less log2 of the rank of the true one. The rank is exact:
nothing is estimated from a sample. A code that was never seen has exposure 1.44 on average, one that the model prefers to all
others has 13.29.

Runs: private training (defaults of ``make_private``) at several epsilons per record, ``clipped`` (clipped like it, no noise), and
``none`` (no clipping, no noise). k copies of a secret are k records: what holds for the secret is the bound of a group of k. If
training is (epsilon, 0)-private, exposure b or more has probability at most exp(k epsilon) 2^-b; delta adds to it.

Noise is seeded and codes are invented: a study, which protects nobody.

    python examples/studies/secrets_study.py --jobs 1        # stop it and go on at any time
    python examples/studies/secrets_study.py --report --figure docs/figures/secrets.png
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from chats.canaries import (
    CHANCE,
    CODES,
    MULTIPLICITIES,
    canaries,
    canary_row,
    code_log_probabilities,
    digit_ids,
    exposure,
    prompt_ids,
)
from chats.data import (
    Records,
    Row,
    by_sender,
    dataset_file,
    is_held_out,
    public_tokenizer,
    read_conversations,
    sender_rows,
)
from chats.model import Settings as ModelSettings
from chats.model import digest, fine_tune, heldout_loss, public_model
from common.results import Result, append, mean_and_spread, read, results_of

from opacus_ac.accounting import calibrate_noise_multiplier

ARMS = ("1", "8", "64", "clipped", "none")
DELTA = 1e-5
C0 = 1.0


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on beside arm and seed."""

    model: ModelSettings = field(default_factory=lambda: ModelSettings(most=1, steps=120, lr=0.002))
    records: int = 3000  # without canaries
    heldout: int = 300

    def key(self) -> str:
        return digest(asdict(self))


# ---------------------------------------------------------------- one run


@cache
def private_rows(settings: Settings, cache_folder: Path) -> tuple[list[list[Row]], list[list[Row]]]:
    """Return records of one row each, what somebody wrote in one conversation: to train on, and of held-out senders."""
    encode = public_tokenizer(settings.model.vocab, cache_folder)
    parts: dict[bool, list[list[str]]] = {True: [], False: []}
    for sender, written in by_sender(read_conversations(dataset_file())).items():
        parts[is_held_out(sender)] += written
    counts = {False: settings.records, True: settings.heldout}
    for part, texts in parts.items():
        random.Random(0).shuffle(texts)
        del texts[counts[part] :]
    rows = {part: [sender_rows([turns], encode, settings.model.length, 1) for turns in parts[part]] for part in parts}
    return rows[False], rows[True]


def clip_arguments(arm: str, records: int, settings: Settings) -> dict[str, Any]:
    """Return what an arm passes to ``make_private``.

    Raises:
        ValueError: no such arm.
    """
    if arm == "none":
        return {"clipping": "flat", "max_grad_norm": 1e9, "noise_multiplier": 0.0}
    if arm == "clipped":
        return {"clipping": "flat", "max_grad_norm": C0, "noise_multiplier": 0.0}
    try:
        epsilon = float(arm)
    except ValueError:
        raise ValueError(f"unknown arm {arm!r}: an epsilon, clipped or none") from None
    noise = calibrate_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=DELTA,
        sample_rate=settings.model.batch / records,
        steps=settings.model.steps,
        method="pld",
    )
    return {"max_grad_norm": C0, "noise_multiplier": noise}


def run(arm: str, seed: int, settings: Settings, cache_folder: Path) -> Result:
    """Train once and ask for every secret; return one line of results."""
    torch.set_num_threads(1)
    start = time.process_time()
    encode = public_tokenizer(settings.model.vocab, cache_folder)
    rows, held = private_rows(settings, cache_folder)
    secrets = canaries(seed)
    train = Records([*rows, *([canary_row(c, encode)] for c in secrets for _ in range(c.copies))], 1)
    model = public_model(settings.model, cache_folder)
    before = heldout_loss(model, held, settings.model)
    arguments = clip_arguments(arm, len(train), settings)
    _, epsilon, _ = fine_tune(model, train, settings.model, arguments, DELTA, seed)
    digits = digit_ids(encode)
    found: dict[str, list[float]] = {}
    for canary in secrets:
        scores = code_log_probabilities(model, prompt_ids(canary.thing, encode), digits)
        found.setdefault(str(canary.copies), []).append(exposure(scores, canary.code))
    return {
        "arm": arm,
        "seed": seed,
        "settings": settings.key(),
        "records": len(train),
        "noise_multiplier": arguments["noise_multiplier"],
        "spent": epsilon if arguments["noise_multiplier"] else None,
        "loss_before": before,
        "loss": heldout_loss(model, held, settings.model),
        "exposure": found,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


# ---------------------------------------------------------------- report


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the runs of each arm: epsilons from small to large, then what is not private."""
    arms = dict.fromkeys(r["arm"] for r in results)
    order = sorted(arms, key=lambda arm: {"clipped": 1e98, "none": 1e99}.get(arm) or float(arm))
    return {arm: [r for r in results if r["arm"] == arm] for arm in order}


def pooled(runs: Sequence[Result], copies: int) -> list[float]:
    return [value for run in runs for value in run["exposure"][str(copies)]]


def table(results: Sequence[Result]) -> list[str]:
    """Return a Markdown table: mean exposure and standard deviation over canaries and seeds; in brackets, codes at rank 1."""
    lines = [
        f"| epsilon per record | z | runs | {' | '.join(f'copies: {m}' for m in MULTIPLICITIES)} | held-out loss |",
        "|---" * (4 + len(MULTIPLICITIES)) + "|",
    ]
    for arm, runs in by_arm(results).items():
        cells = []
        for copies in MULTIPLICITIES:
            values = pooled(runs, copies)
            first = sum(value == math.log2(CODES) for value in values)
            cells.append(f"{mean_and_spread(values, 1)} ({first}/{len(values)})")
        loss = mean_and_spread([r["loss"] for r in runs])
        name = f"{max(r['spent'] for r in runs):.2f}" if runs[0]["spent"] is not None else arm
        lines.append(f"| {name} | {runs[0]['noise_multiplier']:.2f} | {len(runs)} | {' | '.join(cells)} | {loss} |")
    return lines


def group_bound(epsilon: float, copies: int, bits: float, delta: float = DELTA) -> float:
    """Return the most probable that exposure of ``bits`` or more can be for a random code in ``copies`` records.

    Without the records the rank is uniform; ``copies`` steps from neighbour to neighbour lead to the data with them.
    """
    if copies * epsilon > bits * math.log(2):
        return 1.0
    added = delta * sum(math.exp(i * epsilon) for i in range(copies))
    return min(1.0, math.exp(copies * epsilon) * 2.0**-bits + added)


def bounds(results: Sequence[Result]) -> list[str]:
    """Return a Markdown table: what the guarantee says about rank 1, for each epsilon and number of copies."""
    spent = {arm: max(r["spent"] for r in runs) for arm, runs in by_arm(results).items() if runs[0]["spent"]}
    lines = [f"| records that hold the secret | {' | '.join(f'epsilon = {e:.2f}' for e in spent.values())} |"]
    lines.append("|---" * (1 + len(spent)) + "|")
    for copies in (m for m in MULTIPLICITIES if m):
        values = [group_bound(e, copies, math.log2(CODES)) for e in spent.values()]
        cells = ["nothing" if v >= 1 else f"{100 * v:.2g} %" for v in values]
        lines.append(f"| {copies} | {' | '.join(cells)} |")
    return lines


def report(results: Sequence[Result], settings: Settings) -> None:
    print(f"settings {settings.key()}: {asdict(settings)}")
    print("\n".join(table(results)))
    if results:
        before = statistics.fmean(r["loss_before"] for r in results)
        print(f"{results[0]['records']} records; held-out loss before {before:.3f}; delta {DELTA:g}")
    print(f"chance: {CHANCE:.2f} bits; most: {math.log2(CODES):.2f} bits")
    print(
        "epsilon is per record; k copies have the bound of a group of k. Highest probability of extraction in one guess:"
    )
    print("\n".join(bounds(results)))


def draw(results: Sequence[Result], target: Path) -> None:
    """Draw exposure against copies, a line per arm, on an opaque ground that reads on light and dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = ("#1b5e9e", "#0b8a7a", "#b8860b", "#8e5aa8", "#b3261e", "#444444")
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained", facecolor="white")
    places = range(len(MULTIPLICITIES))
    for number, (arm, runs) in enumerate(by_arm(results).items()):
        values = [pooled(runs, copies) for copies in MULTIPLICITIES]
        means = [statistics.fmean(v) for v in values]
        errors = [statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for v in values]
        label = {"none": "no clipping, no noise", "clipped": "clipped, no noise"}.get(arm, f"epsilon = {arm}")
        shifted = [place + 0.05 * (number - 2) for place in places]
        axis.errorbar(
            shifted, means, errors, label=label, color=colours[number % 6], marker="os^Dvx"[number % 6], capsize=2
        )
    axis.axhline(CHANCE, color="#666666", linestyle=":", linewidth=1)
    axis.axhline(math.log2(CODES), color="#666666", linestyle="--", linewidth=1)
    axis.text(4.1, CHANCE - 0.15, "never seen", fontsize=8, color="#444444", va="top", ha="right")
    axis.text(0, math.log2(CODES) - 0.15, "preferred to all other codes", fontsize=8, color="#444444", va="top")
    axis.set_xticks(list(places), [str(m) for m in MULTIPLICITIES])
    axis.set_xlabel("records that hold the secret")
    axis.set_ylabel("exposure (bits); mean ± standard error")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="center left")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)
    print(f"wrote {target}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not finished yet, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", metavar="ARM", default=ARMS, help="epsilons, clipped, none")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("runs/chats"))
    parser.add_argument("--out", type=Path, default=Path("runs/chats/secrets.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the table of what is finished; run nothing")
    parser.add_argument("--figure", type=Path, help="draw what is finished; run nothing")
    arguments = parser.parse_args(argv)
    settings = Settings()
    finished = read(arguments.out, settings)
    if arguments.report:
        report(finished, settings)
    if arguments.figure is not None:
        draw(finished, arguments.figure)
    if arguments.report or arguments.figure is not None:
        return 0
    for arm in arguments.arms:
        clip_arguments(arm, 10 * settings.model.batch, settings)  # a wrong name before the first run
    public_model(settings.model, arguments.cache)
    done = {(r["arm"], r["seed"]) for r in finished}
    missing = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms if (arm, seed) not in done]
    tasks = [(arm, seed, settings, arguments.cache) for arm, seed in missing]
    for number, result in enumerate(results_of(run, tasks, arguments.jobs), start=1):
        append(arguments.out, result)
        means = {copies: round(statistics.fmean(values), 1) for copies, values in result["exposure"].items()}
        print(
            f"[{number}/{len(missing)}] {result['arm']} seed {result['seed']}: {json.dumps(means)}, {result['cpu_seconds']} s",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
