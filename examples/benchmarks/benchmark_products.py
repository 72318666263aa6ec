"""Float32 products by torch (MKL on x86) and by oneDNN, side by side, and which of them mode "bk" takes.

    python examples/benchmarks/benchmark_products.py --threads 2

``sum`` is the weighted sum of a layer, ``left^T right`` over all positions of a batch; ``Gram`` the inner products of
the positions of each record, of which torch computes three quarters where that is faster. The two libraries take turns;
billions of operations a second, medians over rounds. ``taken`` is what the trial of
``opacus_ac/grad_sample/one_backward/trial.py`` chose. The last line says how long the trials took.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from opacus_ac.grad_sample.one_backward import matmul as products
from opacus_ac.grad_sample.one_backward.gram import Gram

#: B, T, I, J of the benchmark's shapes: attention, MLP and head of a; MLP and head of b; MLP of c; a larger batch.
SUMS = [
    (8, 128, 384, 384),
    (8, 128, 1056, 384),
    (8, 128, 8192, 384),
    (8, 64, 1408, 512),
    (8, 64, 49152, 512),
    (2, 64, 4864, 896),
    (64, 128, 1056, 384),
]
GRAMS = [(8, 128, 384), (8, 128, 1056), (8, 128, 8192), (8, 64, 512), (8, 64, 49152), (2, 64, 4864), (4, 512, 1536)]


def speeds(calls: Sequence[Callable[[], object]], operations: float, rounds: int) -> list[float]:
    """Return the billions of operations a second of each call, which take turns."""
    seconds: list[list[float]] = [[] for _ in calls]
    for round_ in range(rounds + 2):
        for call, found in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if round_ >= 2:
                found.append(time.perf_counter() - start)
    return [operations / statistics.median(found) / 1e9 for found in seconds]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 where torch has no products of oneDNN's."""
    parser = argparse.ArgumentParser(description="Float32 products by torch and by oneDNN.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only the smallest shapes")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if not products.onednn_is_right():
        print("this build of torch has no products of oneDNN's", file=sys.stderr)
        return 1
    print("| product | torch | oneDNN | ratio | taken |\n|---|---|---|---|---|")
    trials = 0.0

    def row(name: str, calls: Sequence[Callable[[], object]], operations: float, choose: Callable[[], bool]) -> None:
        nonlocal trials
        start = time.perf_counter()
        taken = "oneDNN" if choose() else "torch"
        trials += time.perf_counter() - start
        torchs, onednns = speeds(calls, operations, options.rounds)
        print(f"| {name} | {torchs:.0f} | {onednns:.0f} | {onednns / torchs:.2f} | {taken} |", flush=True)

    few = 1 if options.quick else None
    for batch, positions, rows, columns in SUMS[:few]:
        left, right = torch.randn(batch, positions, rows), torch.randn(batch, positions, columns)
        out = torch.empty(rows, columns)
        calls = [
            partial(torch.mm, left.flatten(0, 1).t(), right.flatten(0, 1), out=out),
            partial(products._add_outer_by_onednn, left, right, out, first=True),
        ]
        choose = partial(products.sum_is_faster, left, right)
        row(f"sum {batch} x {positions}, {rows} x {columns}", calls, 2.0 * left.numel() * columns, choose)
    for batch, positions, width in GRAMS[:few]:
        x = torch.randn(batch, positions, width)
        calls = [partial(Gram._halves, x), partial(products._inner_by_onednn, x, x)]
        choose = partial(products.inner_is_faster, x, x)
        row(f"Gram {batch} x {positions}, {width}", calls, 2.0 * x.numel() * positions, choose)
    print(f"\nthe trials took {1000 * trials:.0f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
