"""What two ranks do with a PrivateTrainer under torchrun; each rank leaves what it saw in a file.

As a script, ``torchrun --nproc_per_node=2 tests/support/trainer_cases.py FOLDER``; its functions also run in one process.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import language_model
from tiny_trainer import Stream, arguments, generator, rows, trainer, weights
from transformers import BatchEncoding

from opacus_ac.budget import PrivacyLedger
from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.integrations import PrivateTrainer
from opacus_ac.integrations.trainer.ranks import refused_processes

PUBLIC = {"a": rows(13, seed=8), "b": rows(11, seed=9), "c": rows(3, seed=10)}
"""13 and 11 leave 4 + 1 and 3 + 0 records for the last batches of 4 of two ranks; 3 are fewer than one batch."""


class PlansTwo(PrivateTrainer):
    """Noise for two steps of the four that are asked for."""

    def _planned_steps(self) -> int:
        return 2


def build(
    folder: Path,
    rank: int,
    world: int,
    *,
    settings=None,
    options=None,
    model=None,
    cls=PrivateTrainer,
    data=None,
    **changes,
):
    """A trainer of four steps of 16 expected records; every rank has another folder, and other weights to begin with."""
    model = language_model(rank=rank) if model is None else model
    settings = {"noise_multiplier": 0.0, "ema_decay": 0.9, "evaluation_is_public": True, **(settings or {})}
    defaults = {
        "max_steps": 4, "learning_rate": 1e-2, "gradient_accumulation_steps": 4 // world, "save_strategy": "steps",
        "save_steps": 2, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    return trainer(
        folder / f"rank{rank}",
        model=model,
        settings=settings,
        options=options,
        cls=cls,
        data=data,
        **{**defaults, **changes},
    )


def seen(made: PrivateTrainer) -> dict[str, Any]:
    assert made.model_wrapped is made.model  # no wrapper of torch or accelerate
    optimizer = made.private_optimizer
    return {
        "weights": weights(made.model),
        "average": torch.cat([a.double().reshape(-1) for a in optimizer.ema.average]),
        "bound": optimizer.max_grad_norm,
        "history": made.engine.accountant.history,
        "steps": made.state.global_step,
        "logs": [
            {k: v for k, v in e.items() if "per_second" not in k and "time" not in k} for e in made.state.log_history
        ],
    }


def plain(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Train without noise on one seeded draw, with evaluations, checkpoints, TensorBoard and a saved model."""
    options = {"noise_generator": generator(), "eval_dataset": PUBLIC}
    changes = {"eval_strategy": "steps", "eval_steps": 2, "report_to": "tensorboard"}
    made = build(folder, rank, world, options=options, **changes)
    before = made.evaluate()
    made.train()
    made.save_model(str(folder / f"rank{rank}" / "final"))
    return {**seen(made), "before": {k: v for k, v in before.items() if k.endswith("loss")}}


def resumed(folder: Path, rank: int, world: int, checkpoint: Path) -> dict[str, Any]:
    options = {"noise_generator": generator(), "eval_dataset": PUBLIC}
    made = build(folder, rank, world, options=options, eval_strategy="steps", eval_steps=2)
    made.train(resume_from_checkpoint=str(checkpoint))
    return seen(made)


def budget(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Secret noise, a ledger, and a budget that is spent after two of four steps; then a resume that cannot step."""
    settings = {"noise_multiplier": None, "target_epsilon": 6.0, "ledger": str(folder / "ledger.jsonl")}
    made = build(folder, rank, world, cls=PlansTwo, settings=settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.train()
    stopped = any("stopped after step 2" in str(w.message) for w in caught)
    again = build(folder, rank, world, cls=PlansTwo, settings=settings)
    error = words(lambda: again.train(resume_from_checkpoint=str(folder / "rank0" / "checkpoint-2")))
    charges = len(PrivacyLedger(folder / "ledger.jsonl").charges)
    result = {**seen(made), "stopped": stopped, "charges": charges, "resumed": weights(again.model), "error": error}
    return {**result, "epsilon": made.get_epsilon()}


def words(work) -> str:
    """Return kind and text of the error that ``work`` ends with."""
    try:
        work()
    except (ValueError, PrivacyBudgetExceeded) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def encodings(rank: int) -> list[BatchEncoding]:
    """Rows as tokenizers give them, shuffled without a common seed."""
    found = [BatchEncoding(row) for row in rows(64)]
    random.Random(rank).shuffle(found)
    return found


def refused(folder: Path, rank: int, world: int, saved: Path) -> dict[str, str]:
    """What two processes cannot do, and what they say about it."""
    from torch.distributed.fsdp import fully_shard

    def resume(path: Path) -> str:
        return words(lambda: build(folder, rank, world, options={"noise_generator": generator()}).train(str(path)))

    def evaluated(data=PUBLIC["a"], **changes) -> str:
        made = build(folder, rank, world, **changes)
        return words(lambda: made.evaluate(data))

    alone = types.SimpleNamespace(world_size=1, save_on_each_node=False)
    sharded = fully_shard(language_model())
    return {
        "each node": words(lambda: build(folder, rank, world, save_on_each_node=True)),
        "sharded": words(lambda: build(folder, rank, world, model=sharded)),
        "other arguments": "\n".join(refused_processes(alone, None)),
        "shuffled": words(lambda: build(folder, rank, world, settings={"sampling": "shuffled"}).train()),
        "own order": words(lambda: build(folder, rank, world, data=encodings(rank)).train()),
        "other checkpoint": resume(saved / f"checkpoint-{2 + 2 * rank}"),
        "no checkpoint on rank 1": resume(saved / f"checkpoint-{2 + rank}"),
        "iterable": evaluated(Stream()),
        "uneven": evaluated(accelerator_config={"even_batches": False}),
        "split": evaluated(accelerator_config={"split_batches": True}),
    }


def bfloat16(folder: Path, rank: int, world: int) -> str:
    """Autocast is accelerate's, and must be there without its wrapper."""
    found = []
    made = build(folder, rank, world, model=language_model(dtype=torch.float32), bf16=True, max_steps=1)
    made.model.lm_head.register_forward_hook(lambda module, inputs, output: found.append(str(output.dtype)))
    made.train()
    return found[-1]


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    arguments(folder / "first")  # starts the process group, as in a script of a user
    rank, world = dist.get_rank(), dist.get_world_size()
    saved = folder / "plain" / "rank0"
    results = {
        "plain": plain(folder / "plain", rank, world),
        "resumed": resumed(folder / "resumed", rank, world, saved / "checkpoint-2"),
        "budget": budget(folder / "budget", rank, world),
        "refused": refused(folder / "refused", rank, world, saved),
        "bfloat16": bfloat16(folder / "bfloat16", rank, world),
    }
    (folder / f"results{rank}").write_bytes(pickle.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of gloo that are still there when Python ends can abort a rank that has done all its work


if __name__ == "__main__":
    main()
