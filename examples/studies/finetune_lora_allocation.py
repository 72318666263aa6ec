"""Fine-tune a chat model with LoRA under the same privacy budget with equal noise and with allocated noise.

    python examples/studies/finetune_lora_allocation.py                             # SmolLM2-135M, three seeds, epsilon 8
    python examples/studies/finetune_lora_allocation.py --allocations uniform history --seeds 0
    python examples/studies/finetune_lora_allocation.py --both-factors              # train A and B of LoRA

A table of held-out losses, and for each allocation the noise energy that it leaves, by the theory, of what equal noise has.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import chat_run
from common.chat_data import ChatDataset, PadCollate, heldout_loss, reply_losses

from opacus_ac import PrivacyEngine
from opacus_ac.allocation import NoiseAllocation, optimal_weights
from opacus_ac.models.default_model import ModelUnavailableError
from opacus_ac.testing import per_sample_gradients, select_records

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ALLOCATIONS = ("uniform", "dimension", "public", "history", "paid")
PUBLIC = 6  # public dialogues, of another tone than the private ones, from which "public" takes its weights


def arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments of this script and those that are left for ``common.chat_run``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--allocations", nargs="+", choices=ALLOCATIONS, default=list(ALLOCATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="public randomness of each run")
    parser.add_argument("--both-factors", action="store_true", help="train both factors of LoRA, not B alone")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_lora_allocation"))
    return parser.parse_known_args(argv)


def prepare(args: argparse.Namespace, both: bool) -> tuple[Any, Any]:
    """Return the model with fresh adapters in float32, and its tokenizer."""
    if not both:
        return chat_run.prepare(args)
    model, tokenizer = chat_run.prepare(args)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
    return model, tokenizer


def batch_loss(model: Any, batch: Any) -> torch.Tensor:
    return reply_losses(model, batch).mean()


def gradient_norms(model: Any, batch: Any) -> dict[str, float]:
    """Root mean square of the records' gradient norms of a public batch, by parameter."""
    records = len(batch["input_ids"])
    squares: dict[str, float] = {}
    for i in range(records):
        for name, row in per_sample_gradients(model, select_records(batch, torch.tensor([i])), batch_loss).items():
            squares[name] = squares.get(name, 0.0) + float(row.double().square().sum()) / records
    return {name: math.sqrt(value) for name, value in squares.items()}


def noise_share(model: Any, norms: dict[str, float], weights: dict[str, float]) -> float:
    """Noise energy of the weights over that of equal ones, for C in proportion to the rms scaled norm, by the theory."""
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}

    def energy(w: dict[str, float]) -> float:
        bound = sum((w[n] * norms[n]) ** 2 for n in sizes)
        return bound * sum(d / w[n] ** 2 for n, d in sizes.items())

    return energy(weights) / energy(dict.fromkeys(sizes, 1.0))


def choose(name: str, model: Any, norms: dict[str, float]) -> NoiseAllocation | None:
    if name == "uniform":
        return None
    if name == "public":  # as NoiseAllocation.from_public, whose norms are needed here for the table too
        floor = 1e-6 * max(norms.values())
        sizes = [dict(model.named_parameters())[n].numel() for n in norms]
        found = optimal_weights(sizes, [max(g, floor) for g in norms.values()])
        return NoiseAllocation("constant", weights=dict(zip(norms, found, strict=True)))
    return NoiseAllocation(name, warmup=3 if name == "history" else None, decay=0.8)


def run(args: argparse.Namespace, name: str, both: bool) -> dict[str, Any]:
    """Train once and return what may be published of it."""
    private, heldout = chat_run.load_dialogues(args)
    other = next(tone for tone in heldout if tone != args.tone)
    model, tokenizer = prepare(args, both)
    collate = PadCollate(tokenizer.pad_token_id, args.max_length)
    rows = ChatDataset(heldout[other][:PUBLIC], tokenizer, args.max_length)
    public = collate([rows[i] for i in range(len(rows))])
    evaluation = ChatDataset(heldout[args.tone], tokenizer, args.max_length)
    norms, before = gradient_norms(model, public), heldout_loss(model, evaluation, collate)
    allocation = choose(name, model, norms)
    engine, clock = PrivacyEngine(accountant="vpld"), time.perf_counter()
    dataset = ChatDataset(private, tokenizer, args.max_length)
    optimizer = chat_run.train(args, engine, model, dataset, collate, noise_allocation=allocation)
    seconds, after = time.perf_counter() - clock, heldout_loss(model, evaluation, collate)
    with optimizer.ema_weights():
        averaged = heldout_loss(model, evaluation, collate)
    weights = dict.fromkeys(norms, 1.0) if allocation is None else optimizer.allocation.by_group
    return {
        "allocation": name,
        "seed": args.seed,
        "epsilon": engine.get_epsilon(args.delta),
        "before": before,
        "after": after,
        "averaged": averaged,
        "noise_share": noise_share(model, norms, weights),
        "weights": [min(weights.values()), max(weights.values())],
        "seconds": seconds,
    }


def table(results: list[dict[str, Any]]) -> str:
    """One line per allocation: mean and range over the seeds."""
    lines = [
        "allocation   seeds  epsilon   held-out loss before   after (min to max)        averaged   noise energy   w"
    ]
    for name in dict.fromkeys(r["allocation"] for r in results):
        rows = [r for r in results if r["allocation"] == name]
        after = [r["after"] for r in rows]
        mean = {key: statistics.mean(r[key] for r in rows) for key in ("before", "averaged", "noise_share", "epsilon")}
        low, high = min(r["weights"][0] for r in rows), max(r["weights"][1] for r in rows)
        lines.append(
            f"{name:<12} {len(rows):>5} {mean['epsilon']:>8.2f} {mean['before']:>22.3f}   {statistics.mean(after):.3f} "
            f"({min(after):.3f} to {max(after):.3f}) {mean['averaged']:>14.3f} {mean['noise_share']:>12.0%}   {low:.2f} to {high:.2f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    own, rest = arguments(argv)
    own.output.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in own.seeds:
        for name in own.allocations:
            args = chat_run.arguments([*rest, "--seed", str(seed), "--output", str(own.output / f"{name}-{seed}")])
            if args.full:
                raise ValueError("this comparison trains LoRA: leave out --full")
            args.output.mkdir(parents=True, exist_ok=True)
            results.append(run(args, name, own.both_factors))
            (own.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
            print(json.dumps(results[-1]), flush=True)
    print("\n" + table(results))
    return results


if __name__ == "__main__":
    try:
        main()
    except (ModelUnavailableError, ValueError, OSError) as error:
        raise SystemExit(f"finetune_lora_allocation: {error}") from None
