"""A chat model that is fine-tuned on dialogues of one tone: the run that several studies vary."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from common.chat_data import ChatDataset, PadCollate, heldout_loss, reply_losses
from common.tone_dialogues import TONES, train_and_heldout
from torch.utils.data import DataLoader
from tqdm import tqdm

from opacus_ac import AutoAdam, PrivacyEngine
from opacus_ac.models.peft import load_trainable

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message="Full backward hook is firing")  # torch, about inputs that need no gradient

LOSS_BOUND = 6.0  # public: each record's loss is clipped to it before the noisy mean is released
C0 = 0.1  # too small on purpose: the policy finds C, and a small C only normalises the gradients meanwhile
HELD_OUT = 24


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a chat model on synthetic dialogues.", allow_abbrev=False)
    parser.add_argument(
        "--model", help="folder or hub name of a transformers chat model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--tone", choices=TONES, default="loving", help="which synthetic dialogues to learn")
    parser.add_argument("--records", type=int, default=10_000, help="number of synthetic dialogues")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=None, help="number of private steps (default 14)")
    length.add_argument("--epochs", type=float, help="instead of steps: passes over the data")
    parser.add_argument("--expected-batch-size", type=int, default=40)
    parser.add_argument("--physical-batch-size", type=int, help="memory only; default 16 for LoRA, 8 for --full")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per dialogue; longer ones are cut")
    parser.add_argument("--lr", type=float, help="default 0.06 for LoRA, 0.0003 for --full")
    parser.add_argument("--beta1", type=float, default=0.9, help="momentum of AdamW")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument(
        "--lora-layers",
        type=int,
        default=10,
        help="number of last layers with adapters; the others need no backward pass",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="public randomness: dialogues and LoRA start; never the noise"
    )
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=Path("runs/chat_run"))
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def load_dialogues(args: argparse.Namespace) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the private dialogues, and the public held-out ones by tone."""
    parts = {tone: train_and_heldout(tone, args.records, HELD_OUT, args.seed) for tone in TONES}
    heldout = {tone: [d["messages"] for d in rows] for tone, (_, rows) in parts.items()}
    return [d["messages"] for d in parts[args.tone][0]], heldout


def prepare(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return model and tokenizer, ready to train."""
    torch.manual_seed(args.seed)
    model, tokenizer = load_trainable(args.model, full=args.full, rank=args.lora_rank, layers=args.lora_layers)
    return model.to(args.device), tokenizer


def train(
    args: argparse.Namespace,
    engine: PrivacyEngine,
    model: Any,
    dataset: ChatDataset,
    collate: PadCollate,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Any:
    """Fine-tune ``model`` under the budget and return the private optimizer; ``options`` are for ``make_private``.

    Without ``optimizer`` the inner one is AdamW, as the arguments say. All weights take a fused step, which saves memory,
    except with AutoAdam.
    """
    rate = args.lr or (3e-4 if args.full else 0.06)
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = args.steps or (14 if args.epochs is None else None)
    wrapped, private, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer or torch.optim.AdamW(trained, lr=rate, betas=(args.beta1, 0.999), weight_decay=0.0),
        data_loader=DataLoader(dataset, batch_size=args.expected_batch_size, collate_fn=collate),
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        steps=steps,
        epochs=args.epochs,
        max_grad_norm=C0,
        max_physical_batch_size=args.physical_batch_size or (8 if args.full else 16),
        fused_step=args.full and not isinstance(optimizer, AutoAdam),  # AutoAdam needs all gradients at one time
        loss_bound=LOSS_BOUND,
        **options,
    )
    planned = steps if steps is not None else math.ceil(args.epochs * len(loader))
    with tqdm(total=planned, unit="step") as bar:
        while private.steps_taken < planned:
            for batch in loader:
                private.zero_grad()
                losses = reply_losses(wrapped, {name: values.to(args.device) for name, values in batch.items()})
                private.record_losses(losses)
                losses.mean().backward()
                private.step()
                bar.update(private.steps_taken - bar.n)
                if private.steps_taken == planned:
                    break
    engine.detach(wrapped)
    return private


def evaluate(model: Any, sets: dict[str, Any], collate: Any) -> dict[str, float]:
    """Return the loss on each public set."""
    return {name: heldout_loss(model, data, collate) for name, data in sets.items()}
