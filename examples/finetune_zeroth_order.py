"""Fine-tune a chat model on private dialogues with forward passes only (DP-AggZO), and show what it learned and what it cost.

    python examples/finetune_zeroth_order.py               # SmolLM2-135M, loving tone, epsilon 8
    python examples/finetune_zeroth_order.py --tone angry --epsilon 4

Trained is a vector that is added to the residual stream after a layer: a tone of voice needs few weights, and a step along K
random directions sees the more of the gradient the fewer weights there are. What the layers before compute does not change, and
is computed once per batch. Everything printed or saved is public (synthetic dialogues) or a release that epsilon covers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent / "studies"))

from common.chat_data import IGNORE, ChatDataset, PadCollate, Row
from common.tone_dialogues import TONES
from finetune_chat import Journal, evaluate, load_dialogues, show_replies

from opacus_ac import PrivacyEngine
from opacus_ac.loss import per_record_causal_lm_loss
from opacus_ac.models.default_model import ModelUnavailableError, load_model
from opacus_ac.zeroth_order import preset

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LOSS_BOUND = 6.0  # public: each record's loss is clipped to it before the noisy mean is released


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
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
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_zeroth_order"))
    args = parser.parse_args(argv)
    args.data = args.heldout = None  # of finetune_chat
    return args


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
        clipping="zo",
        zeroth_order=settings,
        max_grad_norm=0.1,
        max_physical_batch_size=args.physical_batch_size,
        loss_bound=LOSS_BOUND,
    )
    journal = Journal(args.output, args.steps, engine, optimizer, args.delta)
    while optimizer.steps_taken < args.steps:
        for batch in loader:
            closure = steering.closure(batch)
            before = optimizer.steps_taken
            optimizer.step(closure)
            if optimizer.steps_taken > before:
                journal.add(optimizer.released, engine.get_epsilon(args.delta))
            if optimizer.steps_taken == args.steps:
                break
    journal.close()
    return optimizer


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    private, public = load_dialogues(args)
    dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
    model, tokenizer = load_model(args.model, dtype=dtype)
    model.eval()
    steering = Steering(model, args.layers, args.vectors)
    collate = PadCollate(tokenizer.pad_token_id, args.max_length)
    dataset = ChatDataset(private, tokenizer, args.max_length)
    sets = {name: ChatDataset(rows, tokenizer, args.max_length) for name, rows in public.items()}
    print(f"{len(dataset)} private dialogues, {sum(v.numel() for v in steering.vectors):,} trained weights")

    before = evaluate(model, sets, collate)
    print("\nReplies before:")
    show_replies(model, tokenizer, args.tone)
    engine = PrivacyEngine(accountant="vpld")
    clock = time.perf_counter()
    optimizer = train(args, engine, steering, dataset, collate)
    seconds = time.perf_counter() - clock
    after = evaluate(model, sets, collate)
    with optimizer.ema_weights():
        averaged = evaluate(model, sets, collate)
    print("\nReplies after:")
    show_replies(model, tokenizer, args.tone)

    print("\nHeld-out loss (public dialogues)   before    after    after, averaged weights")
    for name in sets:
        print(f"  {name:<31} {before[name]:8.3f} {after[name]:8.3f} {averaged[name]:8.3f}")
    report = engine.privacy_report(args.delta)
    print(f"\n{report}\n\n{seconds:.0f} s of training, {time.perf_counter() - started:.0f} s in all")
    result = {
        "privacy": report.to_dict(),
        "heldout_loss": {"before": before, "after": after, "after_averaged": averaged},
        "seconds": seconds,
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    torch.save([v.detach() for v in steering.vectors], args.output / "vectors.pt")
    return result


if __name__ == "__main__":
    try:
        main()
    except (ModelUnavailableError, ValueError, OSError) as error:
        raise SystemExit(f"finetune_zeroth_order: {error}") from None
