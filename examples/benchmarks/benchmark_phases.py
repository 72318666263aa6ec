"""Where a private step spends what it takes above the ordinary one: both steps, phase by phase, in turn.

    python examples/benchmarks/benchmark_phases.py --shapes a-tied a-untied bitnet
    python examples/benchmarks/benchmark_phases.py --shapes b c --variant bk-fused-step --rounds 3

Phases of the ordinary step: forward, backward, update. Of the private one: the backward pass without weight gradients and without
what the hooks do in it; the norms (in the hooks and after the pass); the weighted sums, which stand for the weight gradients;
noise; update; the rest of the step. Medians over rounds, in milliseconds; the last column is in per cent of the ordinary step. Noise and norms
are what no private step of this kind can leave out, so that the ordinary step plus these two is a floor for it.
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # read when torch._dynamo is first imported

import argparse
import functools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from step_benchmark.shapes import SHAPES
from step_benchmark.tables import cpu_model
from step_benchmark.variants import PLAIN, VARIANTS, Options, Trial
from step_benchmark.workers import prepare_process

from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.noise import SecretStream

Times = dict[str, float]
NORMS, SUMS, NOISE, UPDATE = "norms", "weighted sums", "noise", "update"
WATCHED = [  # (class, method, phase): disjoint but for what the caller's phase loses to them
    (ParameterBook, "add", NORMS),
    (BookKeepingSource, "finish_batch", NORMS),
    (BookKeepingSource, "_add", SUMS),
    (SecretStream, "add_normal", NOISE),
    (torch.optim.AdamW, "step", UPDATE),
]


class Clock:
    """Adds up the time of nested phases, each without those inside of it."""

    def __init__(self) -> None:
        self.times: Times = defaultdict(float)
        self._inside: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self.times[name] += passed - self._inside.pop()
            if self._inside:
                self._inside[-1] += passed

    def watch(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return call(*args, **kwargs)

        return timed


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Time the parts of a step inside of the library."""
    kept = [(owner, name, owner.__dict__[name]) for owner, name, _ in WATCHED]
    for owner, name, phase in WATCHED:
        raw = owner.__dict__[name]
        timed = clock.watch(raw.__func__ if isinstance(raw, staticmethod) else raw, phase)
        setattr(owner, name, staticmethod(timed) if isinstance(raw, staticmethod) else timed)
    try:
        yield
    finally:
        for owner, name, raw in kept:
            setattr(owner, name, raw)


def step_by_phases(trial: Trial) -> Times:
    """Take one step; return the seconds of each phase, and "step", their sum."""
    clock = Clock()
    with watched(clock):
        with clock.phase("forward"):
            value = trial.loss()
        with clock.phase("backward"):
            value.backward()
        with clock.phase("rest of the step"):
            trial.optimizer.step()
            trial.optimizer.zero_grad(set_to_none=True)
    return {**clock.times, "step": sum(clock.times.values())}


def table(plain: list[Times], private: list[Times]) -> str:
    """Return the medians, both steps side by side."""
    names = ["forward", "backward", NORMS, SUMS, NOISE, UPDATE, "rest of the step", "step"]
    medians = [{n: 1000 * statistics.median(t.get(n, 0.0) for t in times) for n in names} for times in (plain, private)]
    whole = medians[0]["step"]
    rows = ["| phase | ordinary, ms | private, ms | difference, % of the ordinary step |", "|---|---|---|---|"]
    for name in names:
        ordinary, own = (f"{m[name]:.0f}" if m[name] else "" for m in medians)
        rows.append(f"| {name} | {ordinary} | {own} | {100 * (medians[1][name] - medians[0][name]) / whole:+.0f} |")
    floor = (whole + medians[1][NORMS] + medians[1][NOISE]) / whole
    ratio = statistics.median(b["step"] / a["step"] for a, b in zip(plain, private, strict=True))
    return "\n".join(rows) + f"\n\nratio {ratio:.2f}; ordinary step + norms + noise: {floor:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["a-tied", "a-untied", "bitnet"])
    parser.add_argument("--variant", choices=[n for n in VARIANTS if n.startswith("bk")], default="bk")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    options = Options(threads=arguments.threads)
    prepare_process(options)
    print(
        f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}, {options.threads} threads\n"
    )
    for name in arguments.shapes:
        trials = [Trial(SHAPES[name], VARIANTS[v], options) for v in (PLAIN, arguments.variant)]
        for trial in trials:
            trial.warm_up()
        times: list[list[Times]] = [[], []]
        for _ in range(arguments.rounds):
            for trial, taken in zip(trials, times, strict=True):
                taken.append(step_by_phases(trial))
        print(f"### {name}, {arguments.variant}: {SHAPES[name]}\n\n{table(*times)}\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
