"""A vector in the residual stream of a chat model, trained with forward passes only (DP-AggZO).

A tone of voice needs few weights, and a step along K random directions sees the more of the gradient the fewer weights there are.
What the layers before the vector compute does not change, and is computed once per batch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common.chat_data import IGNORE, ChatDataset, PadCollate, Row
from common.tone_dialogues import TONES
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from opacus_ac import PrivacyEngine
from opacus_ac.loss import per_record_causal_lm_loss
from opacus_ac.zeroth_order import preset

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LOSS_BOUND = 6.0  # public: each record's loss is clipped to it before the noisy mean is released


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a chat model with forward passes only.", allow_abbrev=False)
    parser.add_argument(
        "--model", help="folder or hub name of a Llama-like chat model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--tone", choices=TONES, default="loving", help="which synthetic dialogues to learn")
    parser.add_argument("--records", type=int, default=10_000, help="number of synthetic dialogues")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--directions", type=int, default=8, help="K: a step takes 2K forward passes")
    parser.add_argument("--expected-batch-size", type=int, default=16)
    parser.add_argument("--physical-batch-size", type=int, default=16, help="memory only")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per dialogue; longer ones are cut")
    parser.add_argument(
        "--layers", type=int, default=6, help="number of last layers that are computed for every direction"
    )
    parser.add_argument("--vectors", type=int, default=1, help="number of these layers that get a trained vector")
    parser.add_argument("--lr", type=float, default=150.0)
    parser.add_argument("--smoothing", type=float, default=1.0, help="lambda, in units of the residual stream")
    parser.add_argument(
        "--seed", type=int, default=0, help="public randomness: dialogues and directions; never the noise"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/steering_study"))
    return parser.parse_args(argv)


class Steering:
    """Trained vectors added to the outputs of layers, and a forward pass that starts at the first of them.

    Args:
        model: Llama-like model; its own weights are frozen.
        layers: number of last layers that a forward pass needs.
        vectors: number of these layers, from the first on, with a vector.
    """

    def __init__(self, model: Any, layers: int, vectors: int) -> None:
        self.model = model
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.last: list[Any] = list(model.model.layers)[-layers:]
        self.steered = self.last[:vectors]
        for layer in self.steered:
            layer.register_parameter("steering", nn.Parameter(torch.zeros(model.config.hidden_size)))
            layer.register_forward_hook(_add_vector)
        self._entered: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.last[0].register_forward_pre_hook(self._enter, with_kwargs=True)

    @property
    def vectors(self) -> list[nn.Parameter]:
        return [layer.steering for layer in self.steered]

    def _enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._entered = args, kwargs

    def closure(self, batch: Row) -> Callable[[], Tensor]:
        """Return a function that computes the records' losses ``[B]`` from where the weights begin to matter."""
        labels = batch["labels"]
        first = int((labels != IGNORE).any(dim=0).int().argmax())
        keep = labels.shape[1] - max(first - 1, 0)  # the token before a reply predicts its first token
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            self.model(**inputs, logits_to_keep=1, use_cache=False)
        assert self._entered is not None
        args, kwargs = self._entered

        def losses() -> Tensor:
            hidden, given = args, kwargs
            for layer in self.last:
                output = layer(*hidden, **given)
                hidden = (output[0] if isinstance(output, tuple) else output,)
                given = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            logits = self.model.lm_head(self.model.model.norm(hidden[0][:, -keep:]))
            return per_record_causal_lm_loss(logits, labels[:, -keep:])

        return losses


def _add_vector(layer: Any, _args: object, output: Any) -> Any:
    states = output[0] if isinstance(output, tuple) else output
    moved = states + layer.steering.to(states.dtype)
    return (moved, *output[1:]) if isinstance(output, tuple) else moved


def train(
    args: argparse.Namespace, engine: PrivacyEngine, steering: Steering, dataset: ChatDataset, collate: PadCollate
) -> Any:
    """Tune the vectors under the budget and return the private optimizer."""
    settings = preset(
        "aggzo",
        num_directions=args.directions,
        smoothing=args.smoothing,
        direction_seed=args.seed,
        ema_decay=0.9,
    )
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=steering.model,
        optimizer=torch.optim.SGD(steering.vectors, lr=args.lr),
        data_loader=DataLoader(dataset, batch_size=args.expected_batch_size, collate_fn=collate),
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        steps=args.steps,
        zeroth_order=settings,
        max_grad_norm=0.1,
        max_physical_batch_size=args.physical_batch_size,
        loss_bound=LOSS_BOUND,
    )
    with tqdm(total=args.steps, unit="step") as bar:
        while optimizer.steps_taken < args.steps:
            for batch in loader:
                optimizer.step(steering.closure(batch))
                bar.update(optimizer.steps_taken - bar.n)
                if optimizer.steps_taken == args.steps:
                    break
    return optimizer
