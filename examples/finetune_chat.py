"""Fine-tune a chat model on private dialogues with DP-Adam-AC, and show what it learned and what it cost.

    python examples/finetune_chat.py                       # SmolLM2-135M, loving tone, epsilon 8
    python examples/finetune_chat.py --tone angry --epsilon 4
    python examples/finetune_chat.py --data mails.jsonl --model path/to/model

Everything printed, logged or saved is either public (synthetic or declared so) or a release that epsilon covers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent / "studies"))

from study_data.chat_data import (
    FOUR_PROMPTS,
    ChatDataset,
    PadCollate,
    generate_replies,
    heldout_loss,
    read_jsonl,
    reply_losses,
)
from study_data.tone_dialogues import TONES, tone_score, train_and_heldout

from opacus_ac import AdaptiveClipDPOptimizer, PrivacyEngine, StepRelease
from opacus_ac.models.default_model import ModelUnavailableError
from opacus_ac.models.peft import load_trainable
from opacus_ac.tensorboard import PrivacyDashboard

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message="Full backward hook is firing")  # torch, about inputs that need no gradient

LOSS_BOUND = 6.0  # public: each record's loss is clipped to it before the noisy mean is released
C0 = 0.1  # too small on purpose: the policy finds C, and a small C only normalises the gradients meanwhile
HELD_OUT = 24


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model", help="folder or hub name of a transformers chat model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--tone", choices=TONES, default="loving", help="which synthetic dialogues to learn")
    parser.add_argument(
        "--data", type=Path, help='own dialogues: JSON lines {"messages": [{"role":…, "content":…}, …]}'
    )
    parser.add_argument("--heldout", type=Path, help="PUBLIC dialogues to evaluate on, with --data")
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
    parser.add_argument("--paper", action="store_true", help="the published clip rule on raw norms: NOT private")
    parser.add_argument(
        "--seed", type=int, default=0, help="public randomness: dialogues and LoRA start; never the noise"
    )
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_chat"))
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def load_dialogues(args: argparse.Namespace) -> tuple[list[Any], dict[str, list[Any]]]:
    """Return the private dialogues and the public held-out ones by name."""
    if args.data is not None:
        return read_jsonl(args.data), {"held-out": read_jsonl(args.heldout)} if args.heldout else {}
    private, _ = train_and_heldout(args.tone, args.records, HELD_OUT, args.seed)
    heldout = {tone: train_and_heldout(tone, args.records, HELD_OUT, args.seed)[1] for tone in TONES}
    messages = {name: [d["messages"] for d in rows] for name, rows in heldout.items()}
    return [d["messages"] for d in private], messages


def prepare(args: argparse.Namespace) -> tuple[Any, Any]:
    """Return model and tokenizer, ready to train."""
    torch.manual_seed(args.seed)
    model, tokenizer = load_trainable(args.model, full=args.full, rank=args.lora_rank, layers=args.lora_layers)
    return model.to(args.device), tokenizer


class Journal:
    """Writes the releases of every step: TensorBoard, a JSON-lines file, and the progress bar."""

    def __init__(
        self, folder: Path, steps: int, engine: PrivacyEngine, optimizer: AdaptiveClipDPOptimizer, delta: float
    ) -> None:
        for old in (folder / "tensorboard").glob("*tfevents*"):  # a second run replaces the first, here as below
            old.unlink()
        self.dashboard = PrivacyDashboard(folder / "tensorboard", engine, optimizer, delta=delta)
        self.file = (folder / "releases.jsonl").open("w", encoding="utf-8")
        self.bar = tqdm(total=steps, unit="step")

    def add(self, release: StepRelease, epsilon: float) -> None:
        values = {
            "epsilon": epsilon,
            "max_grad_norm": release.max_grad_norm,
            "noisy_clip_rate": release.clip_rate,
            "noisy_loss": release.loss,
            "lr_multiplier": release.lr_multiplier,
            "sample_rate": release.sample_rate,
        }
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self.dashboard.log_step()
        self.file.write(json.dumps({"step": release.step, **known}) + "\n")
        self.file.flush()
        shown = {"eps": epsilon, "C": release.max_grad_norm, "clip": release.clip_rate, "loss": release.loss}
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items() if v is not None})
        self.bar.update()

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        self.dashboard.close()


def train(
    args: argparse.Namespace,
    engine: PrivacyEngine,
    model: Any,
    dataset: ChatDataset,
    collate: PadCollate,
    **options: Any,
) -> Any:
    """Fine-tune ``model`` under the budget and return the private optimizer; ``options`` are for ``make_private``."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    rate = args.lr or (3e-4 if args.full else 0.06)
    steps = args.steps or (14 if args.epochs is None else None)
    wrapped, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW(trainable, lr=rate, betas=(args.beta1, 0.999), weight_decay=0.0),
        data_loader=DataLoader(dataset, batch_size=args.expected_batch_size, collate_fn=collate),
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        steps=steps,
        epochs=args.epochs,
        max_grad_norm=None if args.paper else C0,
        max_physical_batch_size=args.physical_batch_size or (8 if args.full else 16),
        fused_step=args.full,
        loss_bound=LOSS_BOUND,
        **({"preset": "paper", "clip_policy": "raw_percentile"} if args.paper else {}),
        **options,
    )
    planned = steps if steps is not None else math.ceil(args.epochs * len(loader))
    journal = Journal(args.output, planned, engine, optimizer, args.delta)
    while optimizer.steps_taken < planned:
        for batch in loader:
            optimizer.zero_grad()
            losses = reply_losses(wrapped, {name: values.to(args.device) for name, values in batch.items()})
            optimizer.record_losses(losses)
            losses.mean().backward()
            if step_released(optimizer):
                journal.add(optimizer.released, engine.get_epsilon(args.delta))
            if optimizer.steps_taken == planned:
                break
    journal.close()
    engine.detach(wrapped)
    return optimizer


def step_released(optimizer: AdaptiveClipDPOptimizer) -> bool:
    """Step, and say whether it was the last physical batch of a logical one, which releases."""
    before = optimizer.steps_taken
    optimizer.step()
    return optimizer.steps_taken > before


def show_replies(model: Any, tokenizer: Any, tone: str | None) -> list[str]:
    replies = generate_replies(model, tokenizer, FOUR_PROMPTS)
    for prompt, reply in zip(FOUR_PROMPTS, replies, strict=True):
        score = "" if tone is None else f"   [{tone} words: {tone_score(reply, tone)}]"
        print(f"  > {prompt}\n    {reply}{score}")
    return replies


def evaluate(model: Any, sets: dict[str, ChatDataset], collate: PadCollate) -> dict[str, float]:
    return {name: heldout_loss(model, data, collate) for name, data in sets.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    private, public = load_dialogues(args)
    model, tokenizer = prepare(args)
    collate = PadCollate(tokenizer.pad_token_id, args.max_length)
    dataset = ChatDataset(private, tokenizer, args.max_length)
    sets = {name: ChatDataset(rows, tokenizer, args.max_length) for name, rows in public.items()}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(
        f"{len(dataset)} private dialogues, {trainable:,} trained weights; ready after {time.perf_counter() - started:.0f} s"
    )

    tone = None if args.data else args.tone
    before = evaluate(model, sets, collate)
    print("\nReplies before:")
    replies_before = show_replies(model, tokenizer, tone)
    engine = PrivacyEngine(accountant="vpld")
    clock = time.perf_counter()
    optimizer = train(args, engine, model, dataset, collate)
    seconds = time.perf_counter() - clock
    after = evaluate(model, sets, collate)
    with optimizer.ema_weights():
        averaged = evaluate(model, sets, collate)
    print("\nReplies after:")
    replies_after = show_replies(model, tokenizer, tone)

    print("\nHeld-out loss (public dialogues)   before    after    after, averaged weights")
    for name in sets:
        print(f"  {name:<31} {before[name]:8.3f} {after[name]:8.3f} {averaged[name]:8.3f}")
    report = engine.privacy_report(args.delta)
    print(f"\n{report}")
    result = {
        "privacy": report.to_dict(),
        "heldout_loss": {"before": before, "after": after, "after_averaged": averaged},
        "replies": {"prompts": list(FOUR_PROMPTS), "before": replies_before, "after": replies_after},
        "seconds": {"training": seconds, "total": time.perf_counter() - started},
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
    }
    save(args.output, model, tokenizer, result)
    return result


def save(folder: Path, model: Any, tokenizer: Any, result: dict[str, Any]) -> None:
    """Save the trained weights and, beside them, what they cost."""
    target = folder / "model"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "privacy_report.json").write_text(json.dumps(result["privacy"], indent=2), encoding="utf-8")
    (folder / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    print(f"\nSaved {target} with privacy_report.json; {result['seconds']['total']:.0f} s in all")
    print(f"Curves of every release:  tensorboard --logdir {folder / 'tensorboard'} --host 127.0.0.1")
    print("                          and its Privacy tab at http://127.0.0.1:6006/#opacus_ac")


if __name__ == "__main__":
    try:
        main()
    except (ModelUnavailableError, ValueError, OSError) as error:
        raise SystemExit(f"finetune_chat: {error}") from None
