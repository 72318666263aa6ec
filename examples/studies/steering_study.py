"""Fine-tune a chat model on private dialogues with forward passes only, and show what it learned and what it cost.

    python examples/studies/steering_study.py               # SmolLM2-135M, loving tone, epsilon 8
    python examples/studies/steering_study.py --tone angry --epsilon 4

Trained is a vector that is added to the residual stream after a layer (:mod:`common.steering`). Everything printed or saved is
public (synthetic dialogues) or a release that epsilon covers.
"""

from __future__ import annotations

import json
import time
from typing import Any

import torch
from common.chat_data import FOUR_PROMPTS, ChatDataset, PadCollate, generate_replies
from common.chat_run import evaluate, load_dialogues
from common.steering import Steering, arguments, train
from common.tone_dialogues import tone_score

from opacus_ac import PrivacyEngine
from opacus_ac.models.default_model import ModelUnavailableError, load_model


def show_replies(model: Any, tokenizer: Any, tone: str) -> None:
    for prompt, reply in zip(FOUR_PROMPTS, generate_replies(model, tokenizer, FOUR_PROMPTS), strict=True):
        print(f"  > {prompt}\n    {reply}   [{tone} words: {tone_score(reply, tone)}]")


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
        raise SystemExit(f"steering_study: {error}") from None
