"""What a rank does with TRL's two methods under a launcher; it leaves what it saw in a file.

As a script, ``LAUNCHER tests/support/trl_ranks.py FOLDER``; its function also runs in one process.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import tiny_trl
import torch
from tiny_trainer import generator, weights

METHODS = {"sft": tiny_trl.sft, "dpo": tiny_trl.dpo}


def run(method: str, folder: Path, world: int, resume: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Four steps of 16 expected records on one seeded draw, or the last two of them; without noise unless asked for."""
    made = METHODS[method](
        folder,
        settings={"noise_multiplier": 0.0, **settings},
        options={"noise_generator": generator()},
        max_steps=4,
        gradient_accumulation_steps=4 // world,
        save_strategy="steps",
        save_steps=2,
    )
    made.train(resume_from_checkpoint=None if resume is None else str(resume))
    keys = ("loss", "max_grad_norm", "noisy_clip_rate")
    logs = [{key: entry[key] for key in keys} for entry in made.state.log_history if "loss" in entry]
    return {
        "weights": weights(made.model),
        "logs": logs,
        "steps": made.state.global_step,
        "epsilon": made.get_epsilon(),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {}
    for method in METHODS:
        own = folder / f"{method}{rank}"
        found[method] = run(method, own, world)
        found[f"{method}, resumed"] = run(method, folder / "again", world, folder / f"{method}0" / "checkpoint-2")
        found[f"{method}, private"] = run(method, folder / "private", world, noise_multiplier=None, target_epsilon=4.0)
    (folder / f"results{rank}").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
