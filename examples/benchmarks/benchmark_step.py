"""How long a private training step takes, and how much memory it needs, beside the ordinary step of the same model.

Each variant (the ordinary step, the modes of this package, Opacus's own) lives in a process of its own that builds the
same model from the same seed. After warm-up steps the processes take turns, in an order shuffled every round, on one
fixed batch; only one works at a time, so that whatever else the machine does falls on all of them alike. The noise is
real (from the system's entropy, as in training), the loader is not: each step is a whole private step (norms, clipping,
noise, update) on the batch in hand. The learning rate is tiny, so that the work does not change while it is measured.

Columns of the tables:

* ms per step (forward, backward, step, zero_grad): median over rounds, and minimum and quartiles; time ratio: median
  over rounds of the variant's time divided by that of ``plain`` in the same round; of minima: ratio of the fastest
  steps, the better one on a machine that others load (its load is printed);
* MB above: peak of the process's memory within a step, above what is resident between steps with the gradients freed
  (model, optimizer state); MB resident: that level, libraries included, where buffers kept between steps would show;
* noise: share of the step that goes when ``noise_multiplier=0``, from the same rounds.

Where oneDNN multiplies faster than torch does in a short trial, mode "bk" uses it, which ordinary training could too;
the variants ``-without-onednn`` do not.

Opacus gets this package's explicit rules for RMSNorm and the like (``register_rules``); without them its functorch path
is slower; its strict checks stay on. Its ghost mode refuses tied weights. Waiting processes block on a pipe; their
OpenMP threads spin for some milliseconds and then sleep. What they used is measured and printed. On a GPU the variants are
threads of one process, which take turns as well: its memory is counted by torch's allocator. Where other programs
keep the cores busy, steps of several threads wait for the slowest at every operator: use --threads 1 there. BitNet's
quantisers run without torch.compile, as everything else does; set TORCHDYNAMO_DISABLE=0 to let them compile.

Examples::

    python examples/benchmarks/benchmark_step.py
    python examples/benchmarks/benchmark_step.py --shapes c --variants bk-fused-step opacus-hooks --rounds 5
    python examples/benchmarks/benchmark_step.py --shapes b --profile bk
    python examples/benchmarks/benchmark_step.py --defaults --rounds 25

``--defaults`` measures what the defaults of ``make_private`` cost (mode "bk", the average of the weights, the noise) at 128,
512 and 2,048 tokens a record, and ends with a table of ratios to the ordinary step: with the defaults, without the average,
with torch's own products, and by Opacus's hooks. The last column is the floor of the norms: their products beside those of the
ordinary step's layers, on top of which come the noise and the average, which do not grow with the batch.

The exit status is 1 when a variant failed; its traceback goes to stderr and the others are still measured.
"""

from __future__ import annotations

import os

# Read when torch._dynamo is first imported.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from step_benchmark.measuring import measure
from step_benchmark.shapes import SHAPES, Shape
from step_benchmark.tables import environment, of_defaults, report
from step_benchmark.variants import VARIANTS, Options, Trial, Variant
from step_benchmark.workers import prepare_process

DEFAULTS_SHAPES = ["t128", "t512", "t2048"]
DEFAULTS_VARIANTS = ["bk-defaults", "bk", "bk-without-onednn", "opacus-hooks"]
QUICK = [name for name in SHAPES if name not in ("c", "gpu", "tiny", *DEFAULTS_SHAPES)]
DEFAULT_VARIANTS = [name for name in VARIANTS if not name.startswith("hooks")]


def profile(shape: Shape, variant: Variant, options: Options) -> str:
    """Return the most expensive operators of one variant, from three steps in this process."""
    prepare_process(options)
    trial = Trial(shape, variant, options)
    trial.warm_up()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        trial.time(3)
    return profiler.key_averages().table(sort_by=f"self_{options.device}_time_total", row_limit=20)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of a private step beside the ordinary one.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=", ".join(VARIANTS))
    parser.add_argument("--defaults", action="store_true", help="what the defaults cost, by tokens of a record")
    parser.add_argument("--rounds", type=positive, default=Options.rounds)
    parser.add_argument("--steps-per-round", type=positive, default=Options.steps_per_round)
    parser.add_argument("--memory-rounds", type=positive, default=Options.memory_rounds)
    parser.add_argument("--warmup", type=int, choices=range(2, 100), default=Options.warmup, metavar="STEPS")
    parser.add_argument("--threads", type=positive, default=Options.threads)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=Options.device)
    parser.add_argument("--autocast", choices=["bf16"], help="forward pass and loss under bfloat16 autocast")
    parser.add_argument("--ema", action="store_true", help="keep the average of the weights, as make_private does")
    parser.add_argument(
        "--at-once", type=int, help="variants alive beside plain at a time, 0 for all (default: all, but 1 for c)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures")
    parser.add_argument("--profile", choices=VARIANTS, metavar="NAME", help="print the top operators of one variant")
    arguments = parser.parse_args(argv)
    arguments.shapes = arguments.shapes or (DEFAULTS_SHAPES if arguments.defaults else QUICK)
    arguments.variants = arguments.variants or (DEFAULTS_VARIANTS if arguments.defaults else DEFAULT_VARIANTS)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 when a variant failed."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(given)
    values = {name: value for name, value in vars(arguments).items() if name in asdict(Options())}
    options = Options(**values | {"autocast": bool(arguments.autocast)})
    facts = environment(options, given)
    print("; ".join(facts.values()) + "\n", flush=True)
    failed, raw, measured = False, {}, {}
    for name in dict.fromkeys(arguments.shapes):
        shape = SHAPES[name]
        if arguments.profile:
            print(f"{name}: {arguments.profile}\n{profile(shape, VARIANTS[arguments.profile], options)}")
            continue
        at_once = shape.at_once if arguments.at_once is None else arguments.at_once
        results = measure(shape, arguments.variants, options, at_once)
        print(report(name, shape, results), flush=True)
        measured[name] = results
        raw[name] = {variant: asdict(figures) for variant, figures in results.items()}
        failed = failed or any(figures.failure for figures in results.values())
        if arguments.json:
            arguments.json.write_text(json.dumps({"environment": facts, "shapes": raw}, indent=1) + "\n")
    if arguments.defaults and measured:
        print(of_defaults(measured), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
