"""Fine-tune a chat model on private dialogues with DP-Adam-AC, and show what it learned and what it cost.

    python examples/studies/common/tone_dialogues.py --tone loving --n 10000 --out loving.jsonl    # invented dialogues
    python examples/finetune_chat.py loving.jsonl                                                  # SmolLM2-135M, LoRA
    python examples/finetune_chat.py mails.jsonl --heldout public.jsonl --model path/to/model --epsilon 4

``opacus-ac finetune`` has all options, a ledger and checkpoints. What is printed, logged or saved is public or covered by epsilon.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from opacus_ac.integrations import PrivacyArguments, PrivateTrainer
from opacus_ac.integrations.finetune import ChatDataset, PadCollate
from opacus_ac.integrations.finetune.chat_data import read_dialogues
from opacus_ac.integrations.trained.replies import PROMPTS, short_replies
from opacus_ac.models.default_model import ModelUnavailableError
from opacus_ac.models.peft import load_trainable

PHYSICAL = 8  # records that reach the model at a time


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("data", type=Path, help="PRIVATE dialogues: JSON lines with messages, see docs/command-line.md")
    parser.add_argument("--heldout", type=Path, nargs="+", default=[], help="PUBLIC dialogues to evaluate on")
    parser.add_argument("--model", help="folder or hub name of a chat model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--accumulation", type=int, default=5, help=f"times {PHYSICAL}: the expected batch size")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per dialogue; longer ones are cut")
    parser.add_argument("--paper", action="store_true", help="the published clip rule on raw norms: NOT private")
    parser.add_argument("--seed", type=int, default=0, help="of the start of LoRA; never of the noise")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_chat"))
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> PrivateTrainer:
    """Return a trainer of the model on the private dialogues."""
    torch.manual_seed(args.seed)
    model, tokenizer = load_trainable(args.model, full=args.full, rank=8, layers=10)
    rule = {"preset": "paper", "clip_policy": "raw_percentile"} if args.paper else {"per_sample_max_grad_norm": 0.1}
    finds = not (args.full or args.paper)  # the learning rate: fused_step and the published rule have a fixed one
    privacy = PrivacyArguments(
        target_epsilon=args.epsilon, target_delta=args.delta, accountant="vpld", loss_bound=6.0, fused_step=args.full,
        evaluation_is_public=True, auto_learning_rate=finds, **rule,
    )  # fmt: skip
    training = TrainingArguments(
        output_dir=str(args.output), max_steps=args.steps, learning_rate=3e-4 if args.full else 0.03, seed=args.seed,
        per_device_train_batch_size=PHYSICAL, gradient_accumulation_steps=args.accumulation,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=["tensorboard"],
    )  # fmt: skip
    heldout = {file.stem: ChatDataset(read_dialogues(file), tokenizer, args.max_length) for file in args.heldout}
    return PrivateTrainer(
        model, training, privacy=privacy, processing_class=tokenizer,
        train_dataset=ChatDataset(read_dialogues(args.data), tokenizer, args.max_length), eval_dataset=heldout or None,
        data_collator=PadCollate(tokenizer.pad_token_id, args.max_length),
    )  # fmt: skip


def look(trainer: PrivateTrainer, when: str) -> dict[str, Any]:
    """Print replies, and return them with the loss on each public set."""
    replies = short_replies(trainer.model, trainer.processing_class)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        print(f"  {when}  > {prompt}\n          {reply}")
    losses = trainer.evaluate() if trainer.eval_dataset else {}
    return {"replies": replies, "heldout_loss": {k[5:-5]: v for k, v in losses.items() if k.endswith("_loss")}}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    trainer = build(args)
    before = look(trainer, "before")
    trainer.train()
    after = look(trainer, "after ")
    trainer.save_model()  # with privacy_report.json
    trainer.save_state()  # with the releases of every step
    privacy = trainer.privacy_report()
    result = {"target_epsilon": args.epsilon, "privacy": privacy.to_dict(), "before": before, "after": after}
    (args.output / "result.json").write_text(json.dumps(result))
    for name, loss in before["heldout_loss"].items():
        print(f"\nloss on public dialogues, {name}: {loss:.3f} before, {after['heldout_loss'][name]:.3f} after")
    print(f"\n{privacy}\n\nSaved {args.output}. Talk to it: opacus-ac chat {args.output}")
    print(f"Every release: tensorboard --logdir {args.output} --host 127.0.0.1")
    return result


if __name__ == "__main__":
    try:
        main()
    except (ModelUnavailableError, ValueError, OSError) as error:
        raise SystemExit(f"finetune_chat: {error}") from None
