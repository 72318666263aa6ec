"""Measure the memory of a zeroth-order step beside a forward pass and an AdamW step, each in a process of its own.

    python examples/benchmarks/benchmark_zeroth_order.py              # Qwen2-shaped model of 51 million weights, batch 8 x 128
    python examples/benchmarks/benchmark_zeroth_order.py --device cuda

MiB: peak of the process's memory within a step, above what is resident with the model alone, after a forward pass. Optimizer
states and weight averages are part of it. ``x forward``: over that of a forward pass which computes the loss of every record.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from step_benchmark.memory import AT_ONCE, MIB, release_memory, reset_peak, resident
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.zeroth_order import Pruning, preset, record_losses

ZERO = "zeroth-order, "
VARIANTS = (
    "forward",
    f"{ZERO}gaussian",
    f"{ZERO}rademacher",
    f"{ZERO}sphere",
    f"{ZERO}1 % of the weights",
    "backward, SGD",
    "backward, AdamW",
    "DP-Adam-AC (bk)",
)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--directions", type=int, default=2, help="K: time grows with it, memory does not")
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant; medians are shown")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=11 * args.hidden // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Qwen2ForCausalLM(config).to(args.device).eval()


def a_step(args: argparse.Namespace, model: Any, variant: str) -> Callable[[], object]:
    """Return a function that takes one step on a batch of constant size."""
    tokens = torch.randint(0, args.vocab, (args.batch, args.tokens), device=args.device)
    batch = {"input_ids": tokens, "labels": tokens}
    if variant == "forward":
        return lambda: record_losses(model, batch)
    if variant.startswith(ZERO):
        return private(args, model, variant, batch)
    model.train()
    if variant.startswith("DP"):
        return private(args, model, variant, batch)
    inner = (torch.optim.AdamW if variant.endswith("AdamW") else torch.optim.SGD)(model.parameters(), lr=1e-6)

    def ordinary() -> None:
        inner.zero_grad()
        model(**batch).loss.backward()
        inner.step()

    return ordinary


def private(args: argparse.Namespace, model: Any, variant: str, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    """Return a step of a private optimizer."""
    zeroth = variant.startswith(ZERO)
    kind = variant.removeprefix(ZERO)
    pruning = Pruning(ratio=0.01, score="magnitude", strategy="static") if "%" in kind else None
    settings = preset(
        "aggzo",
        num_directions=args.directions,
        direction="gaussian" if pruning else kind if zeroth else "gaussian",
        pruning=pruning,
    )
    rows = TensorDataset(batch["input_ids"].cpu())
    inner = (torch.optim.SGD if zeroth else torch.optim.AdamW)(model.parameters(), lr=1e-6)
    _, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=inner,
        data_loader=DataLoader(rows, batch_size=args.batch),
        noise_multiplier=1.0,
        poisson_sampling=False,
        **({"zeroth_order": settings} if zeroth else {"ema_decay": None}),
    )
    if zeroth:
        return lambda: optimizer.step(lambda: record_losses(model, batch))

    def ordinary() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return ordinary


def peak(args: argparse.Namespace, step: Callable[[], object], level: float) -> float:
    """Return the largest memory within a step above ``level``, in MiB."""
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / MIB - level
    release_memory()
    if not reset_peak():
        raise SystemExit("this system does not tell the peak memory of a process (no /proc)")
    step()
    return resident("VmHWM") - level


def child(args: argparse.Namespace) -> None:
    """Measure one variant and print it."""
    torch.set_num_threads(1)
    model = build(args)
    tokens = torch.zeros((args.batch, args.tokens), dtype=torch.long, device=args.device)
    record_losses(model, {"input_ids": tokens, "labels": tokens})
    release_memory()
    level = resident("VmRSS") if args.device == "cpu" else torch.cuda.memory_allocated() / MIB
    step = a_step(args, model, args.variant)
    step()  # choices and states that later steps keep
    above = max(peak(args, step, level) for _ in range(2))
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    weights = sum(p.numel() for p in model.parameters())
    print(json.dumps({"above": above, "level": level, "seconds": seconds, "weights": weights}))


def measure(argv: list[str], variant: str) -> dict[str, float]:
    command = [sys.executable, __file__, *argv, "--variant", variant]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **AT_ONCE})
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    argv = sys.argv[1:] if argv is None else argv
    args = arguments(argv)
    if args.variant:
        child(args)
        return {}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):  # interleaved, so that a busy machine hits all of them
        for name in VARIANTS:
            runs[name].append(measure(argv, name))
    table = {name: {key: median(r[key] for r in rows) for key in rows[0]} for name, rows in runs.items()}
    base = table["forward"]
    print(
        f"{base['weights'] / 1e6:.1f} million weights, {base['level']:.0f} MiB with the model; batch {args.batch} x {args.tokens}, "
        f"K = {args.directions}, median of {args.rounds} processes"
    )
    print(f"{'':<34}{'MiB above':>10}{'x forward':>11}{'x AdamW':>9}{'x time':>8}")
    for name, row in table.items():
        against = row["above"] / table["backward, AdamW"]["above"]
        ratios = f"{row['above'] / base['above']:>11.2f}{against:>9.3f}{row['seconds'] / base['seconds']:>8.1f}"
        print(f"{name:<34}{row['above']:>10.0f}{ratios}")
    return table


if __name__ == "__main__":
    main()
