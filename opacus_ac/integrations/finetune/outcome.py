"""What a run of ``opacus-ac finetune`` has changed: loss on public data and replies, before and after."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opacus_ac.integrations.finetune.arguments import DataArguments
from opacus_ac.integrations.trained.replies import PROMPTS, short_replies


@dataclass(frozen=True)
class Look:
    """A model at one moment, seen through public data only.

    Attributes:
        loss: loss on the public held-out data; None without such data.
        replies: replies to the public prompts; empty where the model could write none.
    """

    loss: float | None = None
    replies: list[str] = field(default_factory=list)


def look(trainer: Any, *, logged: bool) -> Look:
    """Return what the model of a ``PrivateTrainer`` does now, with the weights that would be saved.

    Args:
        trainer: the trainer.
        logged: whether the loss goes to the log and the event files, which are open only after the training began.
    """
    loss = None
    if trainer.eval_dataset is not None and logged:
        loss = float(trainer.evaluate()["eval_loss"])
    elif trainer.eval_dataset is not None:
        found = trainer.evaluation_loop(trainer.get_eval_dataloader(), "before", prediction_loss_only=True)
        loss = float(found.metrics["eval_loss"])
    try:
        with trainer.ema_weights():
            replies = short_replies(trainer.model, trainer.processing_class)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        print(f"note: no replies to show: {' '.join(str(error).split())}", file=sys.stderr)
        replies = []
    return Look(loss, replies)


def local_files(data: DataArguments) -> dict[str, str | None]:
    """Return where the private data of a run are, for ``opacus-ac evaluate`` on this machine."""
    return {"train_file": str(Path(str(data.train_file)).resolve()), "group_by": data.group_by}


def compared(before: Look, after: Look, validation_file: str | None) -> str:
    """Return two looks at the model of a run side by side, in words."""
    lines = []
    if before.loss is not None and after.loss is not None:
        lines.append(f"loss on {validation_file}: {before.loss:.3f} before, {after.loss:.3f} after")
    for prompt, first, second in zip(PROMPTS, before.replies, after.replies, strict=False):
        lines += [f"> {prompt}", f"  before  {first}", f"  after   {second}"]
    return "\n".join(lines)


def next_commands(folder: Path, *, adapters: bool, tensorboard: bool) -> str:
    """Return the commands that make use of a finished run."""
    out = shlex.quote(str(folder))
    merged = shlex.quote(f"{folder}-merged")
    rows = [
        (f"opacus-ac chat {out}", "talk to it; /base shows what it said before"),
        (f"opacus-ac report {out}", "what it has spent, in words"),
        *([(f"opacus-ac merge {out} {merged}", "one model, without adapters")] if adapters else []),
        *([(f"tensorboard --logdir {out} --host 127.0.0.1", "its curves")] if tensorboard else []),
    ]
    width = max(len(command) for command, _ in rows)
    return "\n".join(["next:", *(f"  {command:{width}}  {what}" for command, what in rows)])
