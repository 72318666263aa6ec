"""What was measured, in Markdown, and what the figures depend on."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

import opacus
import torch
import transformers

import opacus_ac
from step_benchmark.measuring import Figures
from step_benchmark.shapes import SHAPES, Shape, products_of_norms
from step_benchmark.variants import PLAIN, Options


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def cell(value: float, pattern: str = ".0f") -> str:
    return "-" if math.isnan(value) else format(value, pattern)


def row(name: str, figures: Figures, plain: Figures) -> str:
    """One line of the table."""
    if figures.note or figures.failure:
        reason = figures.note or f"FAILED: {figures.failure.splitlines()[-1]}"
        return f"| {name} | - | - | - | - | - | - | - | {reason} |"
    ms = [1000 * seconds for seconds in figures.seconds]
    quartiles = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else [median(ms)] * 3
    digits = ".0f" if median(ms) >= 100 else ".1f"
    spread = " / ".join(format(value, digits) for value in (min(ms, default=math.nan), quartiles[0], quartiles[2]))
    peak = median(figures.peak_mib)
    noise = median(figures.noise_shares)
    columns = [
        name,
        cell(median(ms), digits),
        spread,
        cell(median(figures.ratios), ".2f"),
        cell(min(ms, default=math.nan) / 1000 / min(plain.seconds, default=math.nan), ".2f"),
        cell(peak),
        cell(peak / median(plain.peak_mib) if median(plain.peak_mib) > 0 else math.nan, ".2f"),
        cell(median(figures.resident_mib)),
        cell(noise, ".0%"),
    ]
    return f"| {' | '.join(columns)} |"


def report(name: str, shape: Shape, results: dict[str, Figures]) -> str:
    """Return the table of one shape."""
    plain = results[PLAIN]
    trained = f"{plain.trained / 1e6:.1f}M of {plain.parameters / 1e6:.1f}M parameters trained"
    header = [
        "variant",
        "ms per step",
        "min / quartiles",
        "time ratio",
        "of minima",
        "MB above",
        "memory ratio",
        "MB resident",
    ]
    idle = max(figures.idle_share for figures in results.values())
    lines = [
        f"### {name}: {shape}; {trained}",
        "",
        f"| {' | '.join([*header, 'noise'])} |",
        "|---" * (len(header) + 1) + "|",
        *(row(variant, figures, plain) for variant, figures in results.items()),
        "",
        f"{len(plain.seconds)} rounds of {PLAIN}; a waiting process used at most {idle:.1%} of a core; {load()}.",
    ]
    return "\n".join(lines) + "\n"


def of_defaults(results: dict[str, dict[str, Figures]]) -> str:
    """Return what the defaults cost, one line for each shape: ratios to the ordinary step of the same round."""
    names = [name for name in next(iter(results.values())) if name != PLAIN]
    header = ["tokens", "ordinary step, ms", *names, "norms' products"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for shape, figures in results.items():
        size = SHAPES[shape]
        cells = [f"{size.batch} x {size.length}", cell(1000 * median(figures[PLAIN].seconds))]
        cells += [with_quartiles(figures[name].ratios) for name in names]
        lines.append(f"| {' | '.join([*cells, format(products_of_norms(size), '.0%')])} |")
    return "\n".join(lines) + "\n\nMedians, and quartiles in brackets.\n"


def with_quartiles(values: Sequence[float]) -> str:
    if len(values) < 2:
        return cell(median(values), ".2f")
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median(values):.2f} ({low:.2f} to {high:.2f})"


def load() -> str:
    """How many threads wanted a core lately, those measured here included."""
    try:
        return f"load average {os.getloadavg()[1]:.1f}"
    except (OSError, AttributeError):
        return "load unknown"


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(options: Options, arguments: Sequence[str]) -> dict[str, str]:
    """What the figures depend on beside the code."""
    versions = [f"{m.__name__} {m.__version__}" for m in (opacus_ac, opacus, torch, transformers)]
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_model()
    return {
        "versions": ", ".join(versions),
        "device": f"{device} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)",
        "threads": f"threads: {options.threads}",
        "dtype": "float32, bfloat16 autocast" if options.autocast else "float32",
        "command": shlex.join(["python", "examples/benchmarks/benchmark_step.py", *arguments]),
    }
