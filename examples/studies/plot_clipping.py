"""Draw the figures of docs/adaptive-clipping.md: ``python examples/studies/plot_clipping.py docs/figures``.

All numbers come from the library: private steps on records whose gradients are given by hand. Noise, batches and norms are seeded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

from opacus_ac.clipping import PercentilePolicy
from opacus_ac.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.release import StepStatistics
from opacus_ac.release.statistics import DEFAULT_WEIGHT

STEPS, BATCH, NOISE = 60, 192, 0.8
FALL, TYPICAL, SPREAD = 0.97, 10.0, 0.4  # norms: lognormal, median 10 at the start, 3 % less at every step
DIMENSION = 200
STARTS = (0.01, 1.0, 100.0)
COLOURS = ("#3b5bdb", "#0b7285", "#c2255c")
CARD, INK = "#f8f9fa", "#343a40"  # a light card, so that the figures read alike on light and dark pages


def true_percentile(step: int, rate: float) -> float:
    """The norm that a share ``rate`` of the simulated records exceeds at a step (from 0)."""
    quantile = float(torch.special.ndtri(torch.tensor(1 - rate, dtype=torch.float64)))
    return float(TYPICAL * FALL**step * np.exp(SPREAD * quantile))


def simulate(start: float, *, normalize: bool = True, adam: bool = False, seed: int = 0) -> dict[str, list[float]]:
    """Take private steps on gradients of falling norms and one common direction.

    Returns:
        C of every step, the noisy clip rate, and how far the weights moved along the direction, in learning rates.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.zeros(DIMENSION, dtype=torch.float64))
    inner: torch.optim.Optimizer = torch.optim.SGD([parameter], lr=0.0)
    if adam:
        inner = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.999))
    optimizer = AdaptiveClipDPOptimizer(
        inner, noise_multiplier=NOISE, max_grad_norm=start, expected_batch_size=BATCH, lr_control=False, ema_decay=None,
        normalize=normalize, clip_policy=PercentilePolicy(start), generator=torch.Generator().manual_seed(seed + 1),
    )  # fmt: skip
    direction = torch.full((DIMENSION,), DIMENSION**-0.5, dtype=torch.float64)
    course: dict[str, list[float]] = {"C": [], "clip rate": [], "moved": []}
    for step in range(STEPS):
        records = int(torch.poisson(torch.tensor(float(BATCH)), generator=generator))
        logs = SPREAD * torch.randn(records, 1, generator=generator, dtype=torch.float64)
        parameter.grad_sample = TYPICAL * FALL**step * logs.exp() * direction  # type: ignore[attr-defined]
        before = float(parameter.detach() @ direction)
        optimizer.step()
        optimizer.zero_grad()
        released = optimizer.released
        assert released is not None
        assert released.clip_rate is not None
        course["C"].append(released.max_grad_norm)
        course["clip rate"].append(released.clip_rate)
        course["moved"].append(before - float(parameter.detach() @ direction))
    return course


def encoding(weight: float) -> tuple[np.ndarray, np.ndarray]:
    """Upper edges of the bins over C, and the weight ``w`` with which a record reports its bin."""
    statistics = StepStatistics(histogram_weight=weight)
    statistics.begin(1.0, np.vectorize(lambda ratio: min(1.0, ratio)))
    assert statistics._window is not None
    return statistics._window.edges, statistics._weights[:-1]


def draw_following(axes: list[Axes]) -> None:
    steps = np.arange(1, STEPS + 1)
    truth = [true_percentile(step, 0.9) for step in range(STEPS)]
    axes[0].plot(steps, truth, color=INK, linestyle="--", linewidth=1.2, label="10th percentile of the norms")
    for start, colour in zip(STARTS, COLOURS, strict=True):
        course = simulate(start)
        axes[0].plot(
            steps, course["C"], color=colour, marker="o", markersize=2.5, linewidth=1, label=f"C, C0 = {start:g}"
        )
        axes[1].plot(steps, course["clip rate"], color=colour, marker="o", markersize=2.5, linewidth=1)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("norm")
    axes[0].legend(fontsize=8, frameon=False, labelcolor=INK)
    axes[1].axhline(0.9, color=INK, linestyle="--", linewidth=1.2)
    axes[1].set_ylim(-0.03, 1.03)
    axes[1].set_ylabel("noisy clip rate")
    for axis in axes:
        axis.set_xlabel("step")


def draw_encoding(axes: list[Axes]) -> None:
    for weight, label, colour in ((DEFAULT_WEIGHT, "a² = 0.0412", COLOURS[0]), (0.0, "a² = 0", COLOURS[2])):
        edges, weights = encoding(weight)
        axes[0].step(edges, weights, where="pre", color=colour, label=label)
        seen = weights > 1e-6
        noise = np.where(seen, NOISE * np.sqrt(1 + weight**2) / np.where(seen, weights, 1.0), np.nan)
        axes[1].step(edges, noise, where="pre", color=colour, label=label)
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlabel("norm of the gradient, in units of C")
        axis.axvline(1.0, color=INK, linestyle=":", linewidth=1)
    axes[0].set_ylabel("weight w of a count")
    axes[1].set_ylabel("std of the noise on a count (records)")
    axes[1].set_ylim(0, 4.5)
    axes[0].legend(fontsize=8, frameon=False, labelcolor=INK)


def draw_normalizing(axes: list[Axes]) -> None:
    steps = np.arange(1, STEPS + 1)
    for normalize, label, colour in ((True, "scaled by C0 / C", COLOURS[0]), (False, "not scaled", COLOURS[2])):
        course = simulate(4.0, normalize=normalize, adam=True)
        if normalize:  # C is the same in both
            axes[0].plot(steps, course["C"], color=COLOURS[1], linewidth=1.2)
        axes[1].plot(steps, np.array(course["moved"]) / DIMENSION**0.5, color=colour, linewidth=1.2, label=label)
    axes[0].set_ylabel("C")
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel("step along the signal, in learning rates")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=8, frameon=False, labelcolor=INK)
    for axis in axes:
        axis.set_xlabel("step")


FIGURES: dict[str, Callable[[list[Axes]], None]] = {
    "clipping-follows": draw_following,
    "clipping-encoding": draw_encoding,
    "clipping-normalized": draw_normalizing,
}


def draw(folder: Path) -> None:
    """Write every figure as SVG, the same bytes each time for one version of matplotlib."""
    style = {"svg.hashsalt": "opacus_ac", "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}
    style |= {"xtick.color": INK, "ytick.color": INK, "axes.facecolor": CARD, "figure.facecolor": CARD, "font.size": 9}
    for name, paint in FIGURES.items():
        with plt.rc_context(style):
            figure, axes = plt.subplots(1, 2, figsize=(9, 3.1), layout="constrained")
            paint(list(axes))
            for axis in axes:
                axis.grid(alpha=0.25)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
        print(f"wrote {folder / name}.svg")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    draw(parser.parse_args().folder)
