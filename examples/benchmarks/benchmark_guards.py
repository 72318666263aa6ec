"""What the guards of a private step cost: recognising batches, watching the weights, secret masks, records that are alone.

One model takes ordinary private steps on batches of the private loader. The functions that guard the step are timed where they are
called, so that whatever else the machine does falls on them and on the step alike; the first step, which is looked at closely, is
shown by itself. Norms that are bounds are part of the arithmetic: examples/benchmarks/benchmark_step.py has their cost.

Example::

    python examples/benchmarks/benchmark_guards.py --steps 30
"""

from __future__ import annotations

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample.alone.records import RecordsAlone
from opacus_ac.noise.forward_randomness import ForwardRandomness
from opacus_ac.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.model_watch import ModelWatch
from opacus_ac.optimizer.origin import Origin
from opacus_ac.optimizer.private_side import PrivateSide
from opacus_ac.sampling.delivery import Recognition

LENGTH = 128
GUARDS: dict[str, list[tuple[Any, str]]] = {
    "batches are recognised": [(Recognition, "remember"), (Origin, "enter"), (Origin, "leave"), (Origin, "delivery")],
    "weights are watched": [(ModelWatch, "begin"), (ModelWatch, "check"), (ModelWatch, "check_applied")],
    "gradients outside are looked for": [(PrivateSide, "_check_outside")],
    "records are alone": [(RecordsAlone, "check")],
    "masks are secret": [(ForwardRandomness, "_enter"), (ForwardRandomness, "_leave")],
}


class Stopwatch:
    """Adds up the time in some functions; what one of them calls of the others counts once."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(GUARDS, 0.0)
        self._inside = 0
        for name, functions in GUARDS.items():
            for owner, function in functions:
                setattr(owner, function, self._timed(name, getattr(owner, function)))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[name] += time.perf_counter() - start
                self._inside -= 1

        return timed

    def take(self) -> dict[str, float]:
        """Return the time in each group since the last call."""
        taken, self.spent = self.spent, dict.fromkeys(GUARDS, 0.0)
        return taken


def build(batch: int, dropout: float) -> tuple[Any, AdaptiveClipDPOptimizer, Any]:
    """Return the model of 13 million weights of examples/benchmarks/benchmark_step.py, made private."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=3, intermediate_size=1056, vocab_size=8192,
        max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False, attention_dropout=dropout,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).train()
    rows = [torch.randint(8192, (LENGTH,)) for _ in range(8 * batch)]
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]
    made: tuple[Any, AdaptiveClipDPOptimizer, Any] = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-6), data_loader=DataLoader(data, batch_size=batch),
        noise_multiplier=1.0, max_grad_norm=1.0, sampling="fixed_size",
    )  # fmt: skip
    return made


def main() -> None:
    """Run the steps and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, optimizer, loader = build(arguments.batch, arguments.dropout)
    stopwatch, steps = Stopwatch(), []
    while len(steps) < arguments.steps:
        start = time.perf_counter()
        for batch in loader:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            now = time.perf_counter()
            steps.append((now - start, stopwatch.take()))
            start = now
    first, rest = steps[0], steps[2:]
    print(f"first step: {first[0] * 1e3:.0f} ms, of which guards {sum(first[1].values()) * 1e3:.0f} ms")
    median = statistics.median(total for total, _ in rest)
    print(f"later steps: {median * 1e3:.0f} ms (median of {len(rest)})")
    for name in GUARDS:
        share = statistics.median(spent[name] / total for total, spent in rest)
        print(f"  {name}: {share:.3%} of the step, first step {first[1][name] * 1e3:.1f} ms")
    print(f"  together: {statistics.median(sum(spent.values()) / total for total, spent in rest):.3%} of the step")


if __name__ == "__main__":
    main()
