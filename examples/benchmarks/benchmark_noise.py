"""Throughput of the noise against ``torch.randn`` in float64, one core and all, in one interleaved run.

    python examples/benchmarks/benchmark_noise.py
    python examples/benchmarks/benchmark_noise.py --device cuda

Prints millions of normal values per second (medians of the rounds) and the ratio to ``torch.randn``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from opacus_ac.noise import SecretStream
from opacus_ac.noise.gaussian_cpu import BLOCK, GaussianSampler
from opacus_ac.noise.keys import KeyStream
from opacus_ac.noise.streams import _add_in_device_blocks


def drawing(summed: int) -> Callable[[], object]:
    """One block from the sampler of one thread, nothing added to it."""
    sampler = GaussianSampler(KeyStream(), summed)
    return lambda: sampler.draw(BLOCK, 1.0)


def adding(hardened: bool, size: int) -> Callable[[], object]:
    """Noise added to float32 values, in all threads, as a training step does it."""
    stream, target = SecretStream(hardened), torch.zeros(size)
    return lambda: stream.add_normal([target], 1.0, 0.5)


def rows(size: int) -> dict[str, tuple[int, int, Callable[[], object]]]:
    """Name -> (threads, values per call, call)."""
    cores = os.cpu_count() or 1
    given = torch.empty(BLOCK, dtype=torch.float64)
    return {
        "torch.randn, float64, one core": (1, BLOCK, given.normal_),
        "AES-256-CTR, one core": (1, BLOCK, drawing(1)),
        "AES-256-CTR, sums of four, one core": (1, BLOCK, drawing(4)),
        f"added to float32, {cores} threads": (cores, size, adding(False, size)),
        f"added to float32, sums of four, {cores} threads": (cores, size, adding(True, size)),
    }


def rows_on(device: torch.device, size: int) -> dict[str, tuple[int, int, Callable[[], object]]]:
    """Name -> (threads, values per call, call): noise for values on a GPU, made there and by the processor."""
    cores, stream, hardened = os.cpu_count() or 1, SecretStream(), SecretStream(hardened=True)
    target, wide = torch.zeros(size, device=device), torch.empty(size, dtype=torch.float64, device=device)

    def synchronized(call: Callable[[], object]) -> Callable[[], object]:
        def wait() -> None:
            call()
            torch.cuda.synchronize(device)

        return wait

    calls: dict[str, Callable[[], object]] = {
        "torch.randn, float64, on the GPU": wide.normal_,
        "torch.randn, float32, on the GPU": target.normal_,
        "ChaCha20, added to float32 on the GPU": lambda: stream.add_normal([target], 1.0, 0.5),
        "ChaCha20, sums of four, on the GPU": lambda: hardened.add_normal([target], 1.0, 0.5),
        f"AES-256-CTR, {cores} threads, moved to the GPU": lambda: _add_in_device_blocks(
            target, 1.0, 0.5, stream.normal
        ),
    }
    return {name: (cores, size, synchronized(call)) for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--size", type=int, default=13_000_000, help="values of the rows that add (default: 13 million)"
    )
    parser.add_argument("--device", default="cpu", help="cuda: noise for values on a GPU")
    arguments = parser.parse_args()
    table = (
        rows(arguments.size)
        if arguments.device == "cpu"
        else rows_on(torch.device(arguments.device, 0), arguments.size)
    )
    rates: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(arguments.rounds):
        for name, (threads, values, call) in table.items():
            torch.set_num_threads(threads)
            repeats = max(1, 2_000_000 // values)
            call()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            rates[name].append(repeats * values / (time.perf_counter() - start) / 1e6)
    base = statistics.median(next(iter(rates.values())))  # torch.randn in float64
    print(f"{'':50} million/s   of torch.randn")
    for name, measured in rates.items():
        rate = statistics.median(measured)
        print(f"{name:50} {rate:9.1f} {rate / base:12.2f}   ({min(measured):.0f} to {max(measured):.0f})")


if __name__ == "__main__":
    main()
