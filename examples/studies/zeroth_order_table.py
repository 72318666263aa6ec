"""Compare private ways to tune a sentence classifier at one epsilon: zeroth-order methods and first-order LoRA.

    python examples/studies/zeroth_order_table.py                  # epsilon 4, 3 seeds, a row per method
    python examples/studies/zeroth_order_table.py --tune           # learning rates, on other snippets that are taken as public

A frozen encoder (all-MiniLM-L6-v2) turns film review snippets into vectors; trained are a LoRA adapter behind it and the two
label vectors, which start as the encoder's vectors of two sentences ("zero-shot"). A record is a snippet; N, batch size, steps
and learning rates are public. A new method is a function and a row in ``METHODS``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from common.sentiment_data import encoded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import NoiseAllocation, PrivacyEngine
from opacus_ac.zeroth_order import Pruning, Stages, ZerothOrderSettings, preset

SCALE = 10.0  # of the cosines, as logits
RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # times the usual one


class Classifier(nn.Module):
    """Cosine similarity of an adapted sentence vector with two label vectors."""

    def __init__(self, labels: Tensor, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(labels.shape[1], rank, bias=False)
        self.up = nn.Linear(rank, labels.shape[1], bias=False)
        self.head = nn.Linear(labels.shape[1], len(labels))
        self.down.requires_grad_(False)  # the update is then linear in what is trained (FFA-LoRA, arXiv 2403.12313)
        with torch.no_grad():
            self.up.weight.zero_()
            self.head.weight.copy_(SCALE * labels)
            self.head.bias.zero_()

    def forward(self, vectors: Tensor) -> Tensor:
        return self.head(vectors + self.up(self.down(vectors)))


@dataclass(frozen=True)
class Task:
    """Vectors ``[N, 384]`` and classes ``[N]`` for training and testing, and the label vectors ``[2, 384]``."""

    train: TensorDataset
    test: tuple[Tensor, Tensor]
    labels: Tensor


def load(args: argparse.Namespace, public: bool) -> Task:
    """Return the task on the first half of the snippets, or the same task on the second half, taken as public."""
    size = args.records + args.test
    vectors, classes, labels = encoded("movies", 2 * size)
    if public:
        vectors, classes = vectors[size:], classes[size:]
    test = slice(args.records, size)
    train = TensorDataset(vectors[: args.records], classes[: args.records])
    return Task(train, (vectors[test], classes[test]), labels)


def accuracy(model: nn.Module, task: Task) -> float:
    with torch.no_grad():
        vectors, classes = task.test
        return (model(vectors).argmax(1) == classes).float().mean().item()


def private(model: nn.Module, inner: torch.optim.Optimizer, task: Task, args: argparse.Namespace, **kwargs: Any) -> Any:
    """Return what ``make_private_with_epsilon`` returns for this task."""
    engine = PrivacyEngine(accountant="vrdp")
    made = engine.make_private_with_epsilon(
        module=model,
        optimizer=inner,
        data_loader=DataLoader(task.train, batch_size=args.batch_size),
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        steps=args.steps,
        max_grad_norm=1.0,
        **kwargs,
    )
    return engine, *made


def steps(loader: Any, count: int) -> Any:
    """Give ``count`` batches, pass after pass."""
    taken = 0
    while True:
        for batch in loader:
            if taken == count:
                return
            yield batch
            taken += 1


def zeroth_order(
    model: nn.Module, task: Task, args: argparse.Namespace, rate: float, settings: ZerothOrderSettings
) -> None:
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    _, _, optimizer, loader = private(model.eval(), inner, task, args, zeroth_order=settings)
    for vectors, classes in steps(loader, args.steps):
        optimizer.step(lambda: cross_entropy(model(vectors), classes, reduction="none"))  # noqa: B023


def first_order(model: nn.Module, task: Task, args: argparse.Namespace, rate: float, **kwargs: Any) -> None:
    inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    engine, _, optimizer, loader = private(model.train(), inner, task, args, **kwargs)
    for vectors, classes in steps(loader, args.steps):
        optimizer.zero_grad()
        cross_entropy(model(vectors), classes).backward()
        optimizer.step()
    engine.detach(model)


def zopo(args: argparse.Namespace) -> ZerothOrderSettings:
    """DP-ZOPO with its three stages fitted into the steps: T0 + 2 T0 + 4 T0."""
    pruning = Pruning(ratio=0.1, score="synflow", public_input=torch.ones(1, 384))
    return preset("dp-zopo", stages=Stages(first=max(1, args.steps // 7)), pruning=pruning)


def longer(model: nn.Module, task: Task, args: argparse.Namespace, rate: float) -> tuple[Any, ...]:
    """Return the arguments of a run of ten times the steps, which the same epsilon pays for with more noise."""
    return model, task, argparse.Namespace(**{**vars(args), "steps": 10 * args.steps}), rate


Train = Callable[[nn.Module, Task, argparse.Namespace, float], None]

METHODS: dict[str, tuple[Train, float]] = {
    "zero-shot": (lambda model, task, args, rate: None, 0.0),
    "DPZero": (lambda *given: zeroth_order(*given, preset("dpzero")), 0.1),
    "DPZero, 10x the steps": (lambda *given: zeroth_order(*longer(*given), preset("dpzero")), 0.03),
    "DP-ZOPO": (lambda model, task, args, rate: zeroth_order(model, task, args, rate, zopo(args)), 1.0),
    "DP-AggZO, K = 64": (lambda *given: zeroth_order(*given, preset("aggzo")), 3.0),
    "DP-LoRA (DP-Adam-AC)": (first_order, 0.003),
    "DP-LoRA + allocation": (lambda *given: first_order(*given, noise_allocation=NoiseAllocation(warmup=20)), 0.003),
}
"""What trains the model, and its learning rate, found by ``--tune``."""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--records", type=int, default=3000)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3, help="start of the adapter; noise and batches differ anyway")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tune", action="store_true", help="try learning rates on other snippets, taken as public")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def one_run(name: str, task: Task, args: argparse.Namespace, seed: int, rate: float | None = None) -> float:
    torch.manual_seed(seed)
    model = Classifier(task.labels, args.rank)
    train, usual = METHODS[name]
    train(model, task, args, usual if rate is None else rate)
    return accuracy(model, task)


def tune(args: argparse.Namespace) -> dict[str, dict[float, float]]:
    """Return the accuracy of every learning rate on public snippets, mean over the seeds."""
    task = load(args, public=True)
    found = {}
    for name in args.methods:
        if METHODS[name][1]:
            factor = METHODS[name][1]
            found[name] = {
                factor * r: mean(one_run(name, task, args, seed, factor * r) for seed in range(args.seeds))
                for r in RATES
            }
            print(name, {f"{rate:.3g}": f"{value:.3f}" for rate, value in found[name].items()}, flush=True)
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    if args.tune:
        return {"tuning": tune(args)}
    task = load(args, public=False)
    print(
        f"N = {args.records}, expected batch {args.batch_size}, {args.steps} steps, ({args.epsilon:g}, {args.delta:g})-DP"
    )
    rows: dict[str, Any] = {}
    for name in args.methods:
        started = time.perf_counter()
        found = [one_run(name, task, args, seed) for seed in range(args.seeds)]
        spread = stdev(found) if len(found) > 1 else 0.0
        seconds = (time.perf_counter() - started) / len(found)
        rows[name] = {"accuracy": found, "mean": mean(found), "std": spread, "seconds": seconds}
        print(f"{name:<24} {100 * mean(found):5.1f} % +- {100 * spread:.1f}   {seconds:6.1f} s a run", flush=True)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
