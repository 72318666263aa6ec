"""Compare four families of private fine-tuning at one epsilon, on the same data and with the same number of steps.

    python examples/studies/families.py                            # SmolLM2-135M, one seed, 12 steps
    python examples/studies/families.py --model small              # small Qwen2, three seeds, 30 steps: about 15 minutes
    python examples/studies/families.py --report                   # the table of what is finished, in Markdown

``full``: DP-Adam-AC on all weights. ``lora``: on adapters. ``allocation``: adapters with noise allocated by past releases, or,
``paid``, by a statistic of its own in the release. ``zeroth-order``: DP-AggZO on a vector in the residual stream, without a
backward pass. Each run is a process of its own, with an allocator that hands memory back at once. MiB: peak of the process's
memory in training, above what is resident with the model after an evaluation. Seconds are of training with its accounting; on a
machine that does other work, those of the processor count.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import chat_run, small_qwen, steering
from common.chat_data import ChatDataset, PadCollate
from common.results import append, read
from common.tone_dialogues import TONES, train_and_heldout
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from step_benchmark.memory import AT_ONCE, release_memory, reset_peak, resident

from opacus_ac import NoiseAllocation, PrivacyEngine
from opacus_ac.models.default_model import ModelUnavailableError, load_model
from opacus_ac.models.peft import add_lora

FAMILIES = {
    "full": "DP-Adam-AC, all weights",
    "lora": "LoRA (second factors)",
    "allocation": "LoRA, noise allocation by history",
    "paid": "LoRA, noise allocation by paid statistics",
    "zeroth-order": "zeroth-order, DP-AggZO",
}
TONE = "loving"
ALLOCATIONS = {  # for short runs, as in examples/studies/finetune_lora_allocation.py
    "allocation": NoiseAllocation("history", warmup=3, decay=0.8),
    "paid": NoiseAllocation("paid", decay=0.8),
}
LAYERS = 2  # of the small model's three: with adapters, or computed for every direction

SIZES = {
    "smollm2": {"steps": 12, "batch": 32, "max_length": 64, "records": 10_000, "heldout": 24, "physical": 16},
    "small": {"steps": 30, "batch": 128, "max_length": 48, "records": 10_000, "heldout": 250, "physical": 64},
}
RATES = {  # None: the default of the example. Those of the small model: the best of several at seed 100, taken as public
    "smollm2": {"full": None, "lora": None, "allocation": None, "paid": None, "zeroth-order": None},
    "small": {"full": 0.004, "lora": 0.03, "allocation": 0.03, "paid": 0.03, "zeroth-order": 30.0},
}


@dataclass(frozen=True)
class Settings:
    """What a table holds fixed."""

    model: str
    steps: int
    batch: int
    max_length: int
    records: int
    heldout: int
    physical: int
    epsilon: float
    delta: float

    def key(self) -> str:
        """Short text of these settings: results of others are never mixed with theirs."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Task:
    """A model before training, private rows, and public held-out rows by tone."""

    model: Any
    rows: Any
    heldout: dict[str, Any]
    collate: Callable[..., Any]
    train: Callable[[PrivacyEngine], Any]
    """Trains under the budget and returns the private optimizer."""


# ---------------------------------------------------------------- one run


def example_arguments(settings: Settings, family: str, seed: int, rate: float | None, output: Path) -> Any:
    """Return the arguments of the example that trains this family."""
    common = {
        "records": settings.records, "epsilon": settings.epsilon, "delta": settings.delta, "steps": settings.steps,
        "expected-batch-size": settings.batch, "max-length": settings.max_length, "seed": seed, "tone": TONE, "output": output,
    }  # fmt: skip
    words = [word for name, value in common.items() for word in (f"--{name}", str(value))]
    if rate is not None:
        words += ["--lr", repr(rate)]
    if settings.model not in SIZES:
        words += ["--model", settings.model]
    if family == "zeroth-order":
        words += ["--physical-batch-size", str(settings.physical)]
        return steering.arguments(words + (["--layers", str(LAYERS)] if settings.model == "small" else []))
    # All weights: the example's own, smaller physical batch for a large model.
    physical = (
        [] if family == "full" and settings.model != "small" else ["--physical-batch-size", str(settings.physical)]
    )
    layers = ["--lora-layers", str(LAYERS)] if settings.model == "small" else []
    return chat_run.arguments([*words, *physical, *layers, *(["--full"] if family == "full" else [])])


def small_model(cache: Path) -> Any:
    """Return the small model that was trained on the public tone, and its settings, which fix the tokenizer."""
    settings = small_qwen.Settings()
    model = small_qwen.new_model(settings)
    model.load_state_dict(torch.load(small_qwen.pretrain(settings, cache), weights_only=True))
    return model


def small_rows(args: Any, heldout: int, cache: Path) -> tuple[Any, dict[str, Any]]:
    """Return private rows and held-out rows by tone, as the small model reads them."""
    settings = small_qwen.Settings()
    tokenizer = small_qwen.public_tokenizer(settings, cache)
    read = functools.partial(small_qwen.encode_all, tokenizer=tokenizer, settings=settings)
    parts = {tone: train_and_heldout(tone, args.records, heldout, args.seed) for tone in TONES}
    return read(parts[args.tone][0]), {tone: read(rows) for tone, (_, rows) in parts.items()}


def prepare(settings: Settings, family: str, seed: int, rate: float | None, output: Path) -> Task:
    """Return model and data of a run, by the functions of the examples."""
    args = example_arguments(settings, family, seed, rate, output)
    torch.manual_seed(seed)
    zeroth, small = family == "zeroth-order", settings.model == "small"
    if small:
        model = small_model(output.parent)
        if family in ("lora", *ALLOCATIONS):
            model = add_lora(model, args.lora_rank, args.lora_layers)
        rows, heldout = small_rows(args, settings.heldout, output.parent)
        collate: Callable[..., Any] = default_collate
    else:
        chat_run.HELD_OUT = settings.heldout
        private, public = chat_run.load_dialogues(args)
        narrow = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
        model, tokenizer = load_model(args.model, dtype=narrow) if zeroth else chat_run.prepare(args)
        collate = PadCollate(tokenizer.pad_token_id, args.max_length)
        rows = ChatDataset(private, tokenizer, args.max_length)
        heldout = {tone: ChatDataset(rows, tokenizer, args.max_length) for tone, rows in public.items()}
    if zeroth:
        vectors = steering.Steering(model.eval(), args.layers, args.vectors)
        return Task(model, rows, heldout, collate, lambda e: steering.train(args, e, vectors, rows, collate))
    options = {"noise_allocation": ALLOCATIONS[family]} if family in ALLOCATIONS else {}
    return Task(model, rows, heldout, collate, lambda e: chat_run.train(args, e, model, rows, collate, **options))


def run(settings: Settings, family: str, seed: int, rate: float | None, output: Path) -> dict[str, Any]:
    """Train once and return what may be published of it: public settings, public evaluation, and what it took."""
    output.mkdir(parents=True, exist_ok=True)
    task = prepare(settings, family, seed, rate, output)
    before = chat_run.evaluate(task.model, task.heldout, task.collate)
    release_memory()
    level = resident("VmRSS")
    if not reset_peak():
        print("this system does not tell the peak memory of a process (no /proc)", file=sys.stderr)
    engine = PrivacyEngine(accountant="vpld")
    wall, processor = time.perf_counter(), time.process_time()
    optimizer = task.train(engine)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    above = resident("VmHWM") - level
    after = chat_run.evaluate(task.model, task.heldout, task.collate)
    with optimizer.ema_weights():
        averaged = chat_run.evaluate(task.model, task.heldout, task.collate)
    return {
        "family": family,
        "seed": seed,
        "rate": rate,
        "settings": settings.key(),
        "epsilon": engine.get_epsilon(settings.delta),
        "weights": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        "before": before,
        "after": after,
        "averaged": averaged,
        "processor_seconds": processor,
        "seconds": wall,
        "model_mib": level,
        "mib_above": above,
    }


# ---------------------------------------------------------------- all of them


def measure(argv: list[str], family: str, seed: int) -> dict[str, Any]:
    """Run one family in a process of its own."""
    command = [sys.executable, __file__, *argv, "--child", family, str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **AT_ONCE}, check=False)
    if done.returncode != 0:
        raise SystemExit(f"families: {family} with seed {seed} failed, see above; finished runs are kept")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, a row per family: mean over the seeds, and the range of what differs by chance."""
    lines = [
        "| family | trained weights | seeds | epsilon | loss before | after | averaged weights | other tone, before | after | "
        "CPU s | wall s | MiB above the model |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    other = next(tone for tone in TONES if tone != TONE)
    for family, label in FAMILIES.items():
        rows = [r for r in results if r["family"] == family]
        if not rows:
            continue

        def mean(*path: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.fmean(functools.reduce(lambda value, name: value[name], path, row) for row in rows)

        losses = [r["after"][TONE] for r in rows]
        spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(rows) > 1 else ""
        lines.append(
            f"| {label} | {rows[0]['weights']:,} | {len(rows)} | {mean('epsilon'):.3f} | {mean('before', TONE):.3f} "
            f"| {mean('after', TONE):.3f}{spread} | {mean('averaged', TONE):.3f} | {mean('before', other):.3f} "
            f"| {mean('after', other):.3f} | {mean('processor_seconds'):.0f} | {mean('seconds'):.0f} | {mean('mib_above'):.0f} |"
        )
    return "\n".join(lines)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="smollm2", help="smollm2, small, or the folder of a Llama-like chat model")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seeds", nargs="+", type=int, help="public randomness of each run; never the noise")
    parser.add_argument(
        "--lr", type=float, help="instead of each family's own: to choose one on a seed taken as public"
    )
    for name in SIZES["small"]:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help=argparse.SUPPRESS if name == "physical" else None
        )
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/families"))
    parser.add_argument("--report", action="store_true", help="print the table of what is finished; run nothing")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def settings_of(args: argparse.Namespace) -> Settings:
    sizes = SIZES.get(args.model, SIZES["smollm2"])
    given = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    if args.model == "small" and "max_length" in given:
        raise ValueError("--max-length is part of the small model: leave it out")
    return Settings(args.model, **{**sizes, **given}, epsilon=args.epsilon, delta=args.delta)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    settings, rates = settings_of(args), RATES.get(args.model, RATES["smollm2"])
    if args.child:
        torch.set_num_threads(args.threads)
        family, seed = args.child[0], int(args.child[1])
        rate = rates[family] if args.lr is None else args.lr
        name = f"{Path(args.model).name}-{family}-{seed}"
        print(json.dumps(run(settings, family, seed, rate, args.output / name)))
        return []
    out = args.output / "results.jsonl"
    seeds = args.seeds or ([0, 1, 2] if args.model == "small" else [0])
    wanted = {
        (family, seed, rates[family] if args.lr is None else args.lr) for seed in seeds for family in args.families
    }

    def finished() -> list[dict[str, Any]]:
        return [r for r in read(out, settings) if (r["family"], r["seed"], r["rate"]) in wanted]

    if not args.report:
        args.output.mkdir(parents=True, exist_ok=True)
        if args.model == "small":
            small_qwen.pretrain(small_qwen.Settings(), args.output)  # once, before anything is measured
        done = {(r["family"], r["seed"], r["rate"]) for r in finished()}
        order = list(FAMILIES)
        for family, seed, rate in sorted(wanted - done, key=lambda w: (w[1], order.index(w[0]))):
            result = measure(argv, family, seed)
            append(out, result)
            line = f"{family} seed {seed}, learning rate {rate}: loss {result['after'][TONE]:.4f}"
            print(f"{line}, {result['processor_seconds']:.0f} CPU s", file=sys.stderr, flush=True)
    results = finished()
    print(table(results))
    return results


if __name__ == "__main__":
    try:
        main()
    except (ModelUnavailableError, ValueError, OSError) as error:
        raise SystemExit(f"families: {error}") from None
