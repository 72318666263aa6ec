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
    ("noisy_loss", "noisy loss (nats per token)", "#5c940d"),
)


def read(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "releases.jsonl").read_text(encoding="utf-8").splitlines()
    if not lines:
        raise SystemExit(f"{folder}/releases.jsonl has no steps")
    return [json.loads(line) for line in lines]


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
        axes[0].axhline(float(result["arguments"]["epsilon"]), color="grey", linestyle="--", linewidth=1)
        axes[0].set_ylim(bottom=0)
    axes[1].set_yscale("log")
    axes[2].set_ylim(0, 1.02)
    losses = result["heldout_loss"]
    for name, colour in (("loving", "#5c940d"), ("angry", "#868e96")):
        if name in losses["before"]:
            ends = [losses["before"][name], losses["after"][name]]
            axes[3].plot([0, steps[-1]], ends, color=colour, linestyle=":", label=f"held-out, {name}")
    axes[3].legend(fontsize=8)
    figure.savefig(target, dpi=110)
    print(f"wrote {target}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    draw(**{"folder" if k == "run" else k: v for k, v in vars(parser.parse_args()).items()})
