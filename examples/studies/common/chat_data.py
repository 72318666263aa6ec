"""What the chat example needs beside ``opacus_ac.integrations.finetune.chat_data``: fast losses, held-out loss, sample replies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opacus_ac.integrations.finetune import ChatDataset, PadCollate
from opacus_ac.integrations.finetune.chat_data import IGNORE, Row, collate, encode, prompt_ids, read_jsonl
from opacus_ac.loss import fused_causal_lm_loss, per_record_causal_lm_loss

__all__ = [
    "FOUR_PROMPTS", "IGNORE", "ChatDataset", "PadCollate", "collate", "encode", "generate_replies", "heldout_loss", "read_jsonl",
    "reply_losses",
]  # fmt: skip

FOUR_PROMPTS = (
    "I had a hard day at work.",
    "How do plants grow?",
    "My best friend wants me to help with the piano recital this week.",
    "Can you recommend something to read?",
)


def reply_losses(model: Any, batch: Row) -> Tensor:
    """Mean loss on the reply tokens of each record, ``[B]``; logits are computed from the first reply on only.

    For a vocabulary of 49,152 the logits are a third of the work, and in training their memory becomes their gradient.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    labelled = (labels != IGNORE).any(dim=0).nonzero()
    first = int(labelled[0]) if len(labelled) else labels.shape[1] - 1
    keep = labels.shape[1] - max(first - 1, 0)  # the token before a reply predicts its first token
    logits = model(**inputs, logits_to_keep=keep).logits
    loss = fused_causal_lm_loss if model.training and torch.is_grad_enabled() else per_record_causal_lm_loss
    return loss(logits, labels[:, -keep:])


@torch.no_grad()
def heldout_loss(
    model: torch.nn.Module, dataset: Dataset[Row], collate: Callable[[list[Row]], Row], batch_size: int = 16
) -> float:
    """Mean over the records of each record's mean loss on its reply tokens, in evaluation mode.

    Records without reply tokens are left out. The model returns to the mode it was in.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    try:
        for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=collate):
            batch = {name: value.to(device) for name, value in batch.items()}
            total += float(reply_losses(model, batch).sum())
            count += int((batch["labels"][:, 1:] != IGNORE).any(dim=1).sum())
    finally:
        model.train(was_training)
    if count == 0:
        raise ValueError("the held-out set has no reply tokens")
    return total / count


@torch.no_grad()
def generate_replies(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 40) -> list[str]:
    """Greedy reply to each prompt; the model's mode and its cache setting are restored afterwards."""
    device = next(model.parameters()).device
    was_training, used_cache = model.training, model.config.use_cache
    model.eval()
    model.config.use_cache = True
    rows = []
    for prompt in prompts:
        ids = prompt_ids([{"role": "user", "content": prompt}], tokenizer)
        rows.append({"input_ids": torch.tensor(ids), "labels": torch.full((len(ids),), IGNORE)})
    batch = collate(rows, tokenizer.pad_token_id, max(len(row["input_ids"]) for row in rows), multiple=1)
    try:
        output = model.generate(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    finally:
        model.train(was_training)
        model.config.use_cache = used_cache
    width = batch["input_ids"].shape[1]
    return [tokenizer.decode(row[width:], skip_special_tokens=True).strip() for row in output]
