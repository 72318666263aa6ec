"""Real mail and rated sentences: a BERT of 22.7 million weights becomes a classifier, privately and not.

    python examples/studies/encoder_study.py --jobs 2     # stop it and go on at any time
    python examples/studies/encoder_study.py --quick      # one task, two runs of 4 steps
    python examples/studies/encoder_study.py --report     # run nothing, print the table

A run is a task, an epsilon, a choice of weights (LoRA adapters or all of them) and a seed. Tasks: whether a message is spam, with a
message or a sender as the record (:mod:`encoder.mail`), and whether a snippet praises a film. What is scored is public text of
senders, or snippets, that no record has. The learning rate is found by ``AutoAdam``, so that no run is a sweep. C is found by the
default policy, so that three of ten records are clipped.
The reference without privacy has the same draws, and AdamW: without noise, ``AutoAdam`` takes the randomness of batches for the
slope of the loss. Noise is seeded: a study of published text, which protects nobody.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from common.results import AUTO_ADAM, Result, mean_and_spread, read, run_missing
from common.sentiment_data import encoder_folder
from encoder.tasks import IGNORE, TASKS, Row, as_batch, collate, task_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_ac import AutoAdam, PrivacyEngine
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.loss import per_user_loss

DELTA = 1e-5  # below 1 / N for every task
EPSILONS = (1.0, 8.0)  # and none, the reference
WEIGHTS = ("lora", "all")
RANK = 8
CLIP_RATE = 0.3  # where most records are clipped, all pull alike, and the larger class wins by its number
HINT = 1e-3  # of AutoAdam
RATES = {"lora": 3e-3, "all": 1e-4}  # of the reference without privacy: usual ones, not tuned
VERSION = 1  # of what a row means


@dataclass(frozen=True)
class Cell:
    """One run; epsilon None is the reference without privacy."""

    task: str
    weights: str
    epsilon: float | None
    seed: int
    steps: int = 30
    batch: int = 128  # expected records
    physical: int = 32
    clip_rate: float = CLIP_RATE  # share of records that are clipped

    def key(self) -> str:
        """Short name of all that the result depends on."""
        values = [VERSION, asdict(self), *([] if self.epsilon is None else [AUTO_ADAM])]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class Classifier(nn.Module):
    """The encoder, and a linear layer on the mean over the tokens, for which this encoder was made."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))


def new_model(weights: str, seed: int) -> Classifier:
    """Return the classifier with a new head, and new adapters if those are what is trained."""
    encoder: Any = transformers.BertModel.from_pretrained(encoder_folder(), add_pooling_layer=False)
    torch.manual_seed(seed)
    if weights == "lora":
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"])
        encoder = get_peft_model(encoder, settings)
    return Classifier(encoder, encoder.config.hidden_size).train()


# ---------------------------------------------------------------- measures


@torch.no_grad()
def scores(model: nn.Module, rows: Sequence[Row]) -> Result:
    """Return loss, accuracy, mean accuracy of the classes, and area under the ROC curve."""
    model.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    ordered = [rows[i] for i in order]
    batches = [as_batch(ordered[i : i + 64]) for i in range(0, len(rows), 64)]
    logits = torch.cat([model(b["input_ids"], b["attention_mask"]) for b in batches])
    labels = torch.tensor([label for _, label in ordered])
    model.train()
    right, margin = logits.argmax(1) == labels, logits[:, 1] - logits[:, 0]
    return {
        "loss": nn.functional.cross_entropy(logits, labels).item(),
        "accuracy": right.double().mean().item(),
        "balanced": statistics.fmean(right[labels == c].double().mean().item() for c in (0, 1)),
        "auc": area(margin[labels == 1], margin[labels == 0]),
    }


def area(higher: Tensor, lower: Tensor) -> float:
    """Return the share of pairs whose first value is the larger one; ties count half.

    >>> area(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]))
    0.875
    """
    differences = higher[:, None] - lower[None]
    return ((differences > 0).double() + 0.5 * (differences == 0).double()).mean().item()


# ---------------------------------------------------------------- one run


def run(cell: Cell) -> Result:
    """Train once and return one line of results."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # of the pooling layer, which is not needed
    start = time.process_time()
    task = task_of(cell.task)
    model = new_model(cell.weights, cell.seed)
    before = scores(model, task.public)
    course = fine_tune(model, cell)
    labels = [label for _, label in task.public]
    return {
        "key": cell.key(),
        **asdict(cell),
        "records": len(task.private),
        "public": len(labels),
        "larger_class": max(statistics.fmean(labels), 1 - statistics.fmean(labels)),
        "before": before,
        **scores(model, task.public),
        **course,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def fine_tune(model: nn.Module, cell: Cell) -> Result:
    """Train ``model`` in place and return what was released."""
    task = task_of(cell.task)
    most = getattr(task.private, "max_rows_per_user", None)
    settings: dict[str, Any] = {
        "module": model,
        "optimizer": new_optimizer(model, cell),
        "data_loader": DataLoader(task.private, batch_size=cell.batch, shuffle=True, collate_fn=collate),
        "max_physical_batch_size": cell.physical,
        "max_rows_per_user": most,
        "noise_generator": torch.Generator().manual_seed(cell.seed),
        "ema_decay": None,
        "lr_control": False,
        "target_clip_rate": cell.clip_rate,
    }
    engine = PrivacyEngine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPrivateWarning)
        if cell.epsilon is None:
            private, optimizer, loader = engine.make_private(
                **settings | {"noise_multiplier": 0.0, "max_grad_norm": 1e9, "clipping": "flat"}
            )
        else:
            private, optimizer, loader = engine.make_private_with_epsilon(
                target_epsilon=cell.epsilon, target_delta=DELTA, steps=cell.steps, **settings
            )
        bounds = take_steps(private, optimizer, loader, cell.steps)
    found = {
        "C": bounds,
        "found_rate": settings["optimizer"].learning_rates[0] if cell.epsilon is not None else None,
        "noise_multiplier": optimizer.noise_multiplier,
        "spent": engine.get_epsilon(DELTA) if cell.epsilon is not None else None,
    }
    engine.detach(private)
    return found


def take_steps(model: nn.Module, optimizer: Any, loader: Any, steps: int) -> list[float]:
    """Take so many steps and return C of each."""
    bounds: list[float] = []
    batches = _forever(loader)
    while optimizer.steps_taken < steps:
        taken, batch = optimizer.steps_taken, next(batches)
        optimizer.zero_grad()
        rows = len(batch["labels"])
        record_losses(model, batch, rows if loader.users is None else loader.users.count(rows)).mean().backward()
        optimizer.step()
        if optimizer.steps_taken > taken:
            bounds.append(optimizer.max_grad_norm)
    return bounds


def new_optimizer(model: nn.Module, cell: Cell) -> torch.optim.Optimizer:
    """Return the inner optimizer: one that finds its rate from noisy releases, or AdamW where there is no noise."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if cell.epsilon is None:
        return torch.optim.AdamW(trained, lr=RATES[cell.weights], weight_decay=0.0)
    return AutoAdam(trained, lr=HINT, steps=cell.steps)


def record_losses(model: nn.Module, batch: dict[str, Tensor], users: int) -> Tensor:
    """Return the loss of each record ``[U]``: the mean over its rows."""
    logits = model(batch["input_ids"], batch["attention_mask"])
    losses = nn.functional.cross_entropy(logits, batch["labels"], ignore_index=IGNORE, reduction="none")
    return per_user_loss(losses, batch["labels"] != IGNORE, users)


def _forever(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


# ---------------------------------------------------------------- report


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table: a line per task, weights and epsilon, mean and standard deviation over seeds."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault((result["task"], result["weights"], result["epsilon"]), []).append(result)
    order = {name: number for number, name in enumerate(TASKS)}
    lines = [
        "| task and record | N | weights | epsilon | runs | accuracy, % | mean of both classes, % | AUC | larger class, % |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, weights, epsilon in sorted(groups, key=lambda g: (order[g[0]], g[1], g[2] or math.inf)):
        mine = groups[task, weights, epsilon]
        percents = [mean_and_spread([100 * r[name] for r in mine], 1) for name in ("accuracy", "balanced")]
        lines.append(
            f"| {task} | {mine[0]['records']:,} | {weights} | {'none' if epsilon is None else f'{epsilon:g}'} | {len(mine)} "
            f"| {percents[0]} | {percents[1]} | {mean_and_spread([r['auc'] for r in mine])} "
            f"| {100 * mine[0]['larger_class']:.1f} |"
        )
    return "\n".join(lines)


def wanted(arguments: argparse.Namespace) -> list[Cell]:
    """Return the cells that the arguments ask for, seed after seed, so that what has run is a whole table."""
    if arguments.quick:
        return [Cell("sentences", "lora", epsilon, 0, steps=4) for epsilon in (8.0, None)]
    grid = product(arguments.seeds, arguments.tasks, arguments.weights, (*arguments.epsilons, None))
    own = {"steps": arguments.steps, "clip_rate": arguments.clip_rate}
    return [Cell(task, weights, epsilon, seed, **own) for seed, task, weights, epsilon in grid]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a run of minutes, to see that it works")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=["lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS, help="beside the run without privacy")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--clip_rate", type=float, default=CLIP_RATE, help="share of records that are clipped")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=Path("runs/encoder/results.jsonl"))
    parser.add_argument("--report", action="store_true", help="run nothing; print the table of the runs that are there")
    arguments = parser.parse_args(argv)
    grid = {cell.key(): cell for cell in wanted(arguments)}
    if not arguments.report:
        for done, result in run_missing(grid.values(), run, arguments.out, arguments.jobs):
            print(
                f"{done} {result['task']}, {result['weights']}, epsilon {result['epsilon']}, seed "
                f"{result['seed']}: loss {result['before']['loss']:.3f} -> {result['loss']:.3f}, balanced "
                f"{result['balanced']:.3f}, {result['cpu_seconds']} s",
                flush=True,
            )
    results = [result for result in read(arguments.out) if result["key"] in grid]
    if not results:
        raise SystemExit(f"no finished run in {arguments.out}: run it first, without --report")
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
