"""Draw the releases of a run of finetune_chat.py: ``python examples/studies/plot_run.py runs/finetune_chat docs/figures/x.png``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = (
    ("epsilon", "epsilon spent", "#3b5bdb"),
    ("max_grad_norm", "clipping norm C", "#0b7285"),
    ("noisy_clip_rate", "noisy clip rate", "#a61e4d"),
    ("loss", "noisy loss (nats per token)", "#5c940d"),
)


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the releases of every step, which the Trainer keeps in its log."""
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    found = [entry for entry in log if "epsilon" in entry]
    if not found:
        raise SystemExit(f"{folder}/trainer_state.json has no steps")
    return found


def draw(folder: Path, target: Path) -> None:
    releases, result = read(folder), json.loads((folder / "result.json").read_text(encoding="utf-8"))
    steps = [r["step"] for r in releases]
    figure, axes = plt.subplots(1, 4, figsize=(13, 2.9), layout="constrained")
    for axis, (name, label, colour) in zip(axes, PANELS, strict=True):
        known = [(s, r[name]) for s, r in zip(steps, releases, strict=True) if name in r]
        axis.plot(*zip(*known, strict=True), color=colour, marker="o", markersize=3)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
    if isinstance(result["privacy"]["epsilon"], float):
        axes[0].axhline(result["target_epsilon"], color="grey", linestyle="--", linewidth=1)
        axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[2].set_ylim(0, 1.02)
    before, after = (result[when]["heldout_loss"] for when in ("before", "after"))
    for (name, start), colour in zip(before.items(), ("#5c940d", "#868e96", "#e67700"), strict=False):
        axes[3].plot([0, steps[-1]], [start, after[name]], color=colour, linestyle=":", label=f"held-out, {name}")
    if before:
        axes[3].legend(fontsize=8)
    figure.savefig(target, dpi=110)
    print(f"wrote {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    draw(**{"folder" if k == "run" else k: v for k, v in vars(parser.parse_args()).items()})
