"""A real chat model, privately: SmolLM2-135M with LoRA, AutoAdam beside AdamW at rates tried by hand, three epsilons, flat C.

    python examples/studies/chat_model_study.py --jobs 2      # stop it and go on at any time
    python examples/studies/chat_model_study.py --quick       # two runs of 4 steps
    python examples/studies/chat_model_study.py --report      # run nothing, print the table
    python examples/studies/chat_model_study.py --device cuda --model Qwen/Qwen2.5-0.5B-Instruct    # on a GPU

A run is a method, an epsilon, a learning rate, a momentum and a seed. ``auto`` is AutoAdam from the hint that ``opacus-ac finetune``
has; ``adamw`` is AdamW, both with the defaults of ``make_private``; ``adamw-flat`` is AdamW with a fixed C below all
norms. Momentum and clipping are compared at the middle one of the rates. Every run gives the loss of its last weights and of its
averaged weights. Other options are those of ``common/chat_run.py``; ``--full`` trains all weights, and needs ``--rates`` of its own.

Runs of a seed share records, draws and noise. Noise is seeded, and the records are invented: a study, which protects nobody.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from common import chat_run
from common.chat_data import ChatDataset, PadCollate, heldout_loss
from common.results import AUTO_ADAM, Result, mean_and_spread, read, run_missing
from common.tone_dialogues import TONES, train_and_heldout
from small_model.report import grouped, markdown
from torch.optim import Optimizer

from opacus_ac import AutoAdam, PrivacyEngine
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.optimizer.momentum import planned_beta1

EPSILONS = (1.0, 3.0, 8.0)
RATES = (0.015, 0.03, 0.06, 0.12, 0.24)
HINT, HINT_ALL = 0.03, 0.001  # of AutoAdam, for adapters and for all weights: those of ``opacus-ac finetune``
USUAL = 0.9  # AdamW's momentum
HELD_OUT = 48
METHODS: dict[str, dict[str, Any]] = {"auto": {"lr_control": False}, "adamw": {}, "adamw-flat": {"clipping": "flat"}}
VERSION = 1  # of what a row means


@dataclass(frozen=True)
class Cell:
    """One run; ``options`` are those of ``common/chat_run.py``."""

    method: str
    epsilon: float
    rate: float
    beta1: float
    seed: int
    tone: str
    steps: int
    batch: int
    options: tuple[str, ...] = ()

    def key(self) -> str:
        """Short name of all that the result depends on."""
        values = [VERSION, asdict(self), *([AUTO_ADAM] if self.method == "auto" else [])]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def arguments(self) -> argparse.Namespace:
        """Return the settings of the run."""
        own = ["--tone", self.tone, "--epsilon", str(self.epsilon), "--seed", str(self.seed), "--lr", str(self.rate)]
        size = ["--steps", str(self.steps), "--expected-batch-size", str(self.batch), "--beta1", str(self.beta1)]
        return chat_run.arguments([*self.options, *own, *size])


def run(cell: Cell) -> Result:
    """Train once and return what came out."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    args, start = cell.arguments(), time.process_time()
    model, tokenizer = chat_run.prepare(args)
    collate = PadCollate(tokenizer.pad_token_id, args.max_length)
    dataset, public = dialogues(tokenizer, cell.tone, args.records, cell.seed, args.max_length)
    before = heldout_loss(model, public, collate)
    engine, inner = PrivacyEngine(), new_optimizer(model, cell)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPrivateWarning)
        options = METHODS[cell.method] | {"noise_generator": torch.Generator().manual_seed(cell.seed)}
        optimizer = chat_run.train(args, engine, model, dataset, collate, optimizer=inner, **options)
    with optimizer.ema_weights():
        averaged = heldout_loss(model, public, collate)
    return {
        "key": cell.key(),
        **asdict(cell),
        "spent": engine.get_epsilon(args.delta),
        "noise_multiplier": optimizer.noise_multiplier,
        "found_rate": inner.learning_rates[0] if isinstance(inner, AutoAdam) else None,
        "loss_before": before,
        "loss": heldout_loss(model, public, collate),
        "averaged": averaged,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


_ENCODED: dict[Any, tuple[ChatDataset, ChatDataset]] = {}  # of the latest tone and seed, whose runs follow one another


def dialogues(tokenizer: Any, tone: str, records: int, seed: int, length: int) -> tuple[ChatDataset, ChatDataset]:
    """Return the private dialogues and the public ones."""
    key = (tokenizer.name_or_path, tone, records, seed, length)
    if key not in _ENCODED:
        _ENCODED.clear()
        parts = train_and_heldout(tone, records, HELD_OUT, seed)
        train, held = (ChatDataset([d["messages"] for d in rows], tokenizer, length) for rows in parts)
        _ENCODED[key] = train, held
    return _ENCODED[key]


def new_optimizer(model: torch.nn.Module, cell: Cell) -> Optimizer:
    """Return the inner optimizer of a run."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if cell.method == "auto":
        return AutoAdam(trained, lr=cell.rate, steps=cell.steps)
    return torch.optim.AdamW(trained, lr=cell.rate, betas=(cell.beta1, 0.999), weight_decay=0.0)


# ---------------------------------------------------------------- which runs, and the report


def wanted(own: argparse.Namespace, options: Sequence[str]) -> list[Cell]:
    """Return the cells that the arguments ask for, the comparison of rates at the largest epsilon for all seeds first."""
    steps, rates, epsilons, seeds = own.steps, own.rates, sorted(own.epsilons, reverse=True), own.seeds
    middle, hint = rates[len(rates) // 2], HINT_ALL if "--full" in options else HINT
    if own.quick:
        steps, rates, epsilons, seeds = 4, [middle], epsilons[:1], seeds[:1]
    beta1, compared, others = planned_beta1(steps), [], []
    for seed, tone in product(seeds, own.tones):
        place = {"seed": seed, "tone": tone, "steps": steps, "batch": own.batch, "options": tuple(options)}
        compared.append(Cell("auto", epsilons[0], hint, beta1, **place))
        compared += [Cell("adamw", epsilons[0], rate, beta1, **place) for rate in rates]
        others += [Cell("auto", epsilon, hint, beta1, **place) for epsilon in epsilons[1:]]
        others.append(Cell("adamw", epsilons[0], middle, USUAL, **place))
        others.append(Cell("adamw-flat", epsilons[0], middle, beta1, **place))
    return compared if own.quick else compared + others


def table(results: Sequence[Result]) -> str:
    """Return a row per tone, epsilon, method, momentum and rate, with means and standard deviations over seeds."""
    best: dict[Any, float] = {}
    for r in results:
        if r["method"] == "adamw":
            place = r["tone"], r["epsilon"], r["seed"]
            best[place] = min(r["loss"], best.get(place, r["loss"]))
    rows = []
    names = ("tone", "epsilon", "method", "beta1", "rate")
    for (tone, epsilon, method, beta1, rate), mine in sorted(grouped(list(results), *names).items()):
        losses = [mean_and_spread([r[name] for r in mine]) for name in ("loss_before", "loss", "averaged")]
        known = [r for r in mine if (tone, epsilon, r["seed"]) in best]
        above = [100 * (r["loss"] / best[tone, epsilon, r["seed"]] - 1) for r in known]
        found = [r["found_rate"] for r in mine if r["found_rate"] is not None]
        ends = dict.fromkeys(f"{end:.3f}" for end in (min(found), max(found))) if found else ()
        rates = f"{' to '.join(ends)} (from {rate:g})" if found else f"{rate:g}"
        ahead = mean_and_spread(above, 1) if above else ""
        rows.append([tone, f"{epsilon:g}", method, f"{beta1:g}", rates, str(len(mine)), *losses, ahead])
    heads = ["tone", "epsilon", "method", "beta1", "learning rate", "runs", "before", "after", "averaged weights"]
    return markdown([*heads, "above the best AdamW of the seed, %"], rows)


def parser() -> argparse.ArgumentParser:
    """Return the options that are the study's own."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    options.add_argument("--quick", action="store_true", help="two runs of 4 steps, to see that it works")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--tones", choices=TONES, nargs="+", default=["loving"])
    options.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    options.add_argument("--rates", type=float, nargs="+", default=RATES, help="of AdamW, at the largest epsilon")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--batch", type=int, default=24, help="expected records in a batch")
    options.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    options.add_argument("--out", type=Path, default=Path("runs/study/chat_model.jsonl"))
    options.add_argument(
        "--report", action="store_true", help="run nothing; print the table of the runs that are there"
    )
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table."""
    own, options = parser().parse_known_args(argv)
    chat_run.arguments(options)  # a wrong one is an error before the first run
    grid = {cell.key(): cell for cell in wanted(own, options)}
    if not own.report:
        for done, result in run_missing(grid.values(), run, own.out, own.jobs):
            print(
                f"{done} {result['method']} epsilon {result['epsilon']:g}, rate {result['rate']:g}, beta1 {result['beta1']:g}, seed "
                f"{result['seed']}: loss {result['loss_before']:.3f} -> {result['loss']:.3f}, {result['cpu_seconds']} s",
                flush=True,
            )
    results = [result for result in read(own.out) if result["key"] in grid]
    if not results:
        raise SystemExit(f"no finished run in {own.out}: run it first, without --report")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
