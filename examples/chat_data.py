"""Chat records for private fine-tuning: reading, reply-only labels, padding, held-out loss and sample replies.

One record is one dialogue and becomes one row: rows are never packed together, because a packed row would put several
people under one clipping bound. ``max_length`` and the padding multiple are public constants, chosen without looking
at the records. A row that keeps no label after truncation stays in the data set with a loss of zero, so that the
number of records does not depend on their content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opacus_ac.loss import fused_causal_lm_loss, per_record_causal_lm_loss

Messages = list[dict[str, str]]
Row = dict[str, Tensor]
ROLES = ("system", "user", "assistant")
IGNORE = -100
FOUR_PROMPTS = (
    "I had a hard day at work.",
    "How do plants grow?",
    "My best friend wants me to help with the piano recital this week.",
    "Can you recommend something to read?",
)
_INSERTED_SYSTEM = re.compile(r"<\|im_start\|>system\n.*?<\|im_end\|>\n", re.DOTALL)


def read_jsonl(path: str | Path) -> list[Messages]:
    """Read dialogues, one JSON object with ``messages`` per line; blank lines are skipped.

    Args:
        path: A UTF-8 file.

    Returns:
        The list of messages of each dialogue, with ``role`` and ``content`` only.

    Raises:
        ValueError: A line is not a dialogue that ends with a reply; the message starts with ``file:line``.
    """
    path = Path(path)
    records: list[Messages] = []
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    records.append(_parse(line))
                except ValueError as error:
                    raise ValueError(f"{path}:{number}: {error}") from None
    if not records:
        raise ValueError(f"{path}: no dialogues in this file")
    return records


def _parse(line: str) -> Messages:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if "messages" not in record:
        raise ValueError('"messages" is missing')
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" must be a list that is not empty')
    for index, message in enumerate(messages, start=1):
        _check_message(index, message)
    if messages[-1]["role"] != "assistant":
        raise ValueError("the last message must be a reply of the assistant")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _check_message(index: int, message: Any) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"message {index} is not an object")
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f'message {index}: "{key}" is missing')
        if not isinstance(message[key], str):
            raise ValueError(f'message {index}: "{key}" must be a string')
    if message["role"] not in ROLES:
        raise ValueError(f"message {index}: role must be one of {', '.join(ROLES)}, got {message['role']!r}")


def encode(messages: Messages, tokenizer: Any, max_length: int) -> Row:
    """Tokenise one dialogue with the chat template; only the replies carry labels.

    The default system prompt that some templates put before a dialogue is left out. What follows the last reply is
    cut, then the row is cut at ``max_length``.

    Args:
        messages: The dialogue.
        tokenizer: A tokenizer with a chat template.
        max_length: Public limit on the number of tokens.

    Returns:
        ``input_ids`` and ``labels``, two vectors of the same length.

    Raises:
        ValueError: The template does not allow to tell replies from prompts.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be positive, got {max_length}")
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use an instruction-tuned model")
    by_mask = "generation %}" in tokenizer.chat_template or "generation -%}" in tokenizer.chat_template
    ids, is_reply = _by_mask(messages, tokenizer) if by_mask else _by_prefix(messages, tokenizer)
    skip = _inserted_length(messages, ids, tokenizer)
    end = max((i + 1 for i, flag in enumerate(is_reply) if flag), default=len(ids))
    end = min(end, skip + max_length)
    input_ids = torch.tensor(ids[skip:end], dtype=torch.long)
    mask = torch.tensor(is_reply[skip:end], dtype=torch.bool)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(~mask, IGNORE)}


def _ids(messages: Messages, tokenizer: Any, prompt: bool = False) -> list[int]:
    return list(
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=prompt)[
            "input_ids"
        ]
    )


def _by_mask(messages: Messages, tokenizer: Any) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def _by_prefix(messages: Messages, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Find each reply as what the template adds to the dialogue before it, up to the end token."""
    ids = _ids(messages, tokenizer)
    is_reply = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        prompt = _ids(messages[:index], tokenizer, prompt=True)
        until = _ids(messages[: index + 1], tokenizer)
        if until[: len(prompt)] != prompt or ids[: len(until)] != until:
            raise ValueError("the chat template rewrites earlier turns, so replies cannot be told from prompts")
        end = len(until)
        if tokenizer.eos_token_id in until[len(prompt) :]:  # leave out what the template puts after the end token
            end -= until[::-1].index(tokenizer.eos_token_id)
        is_reply[len(prompt) : end] = [True] * (end - len(prompt))
    return ids, is_reply


@lru_cache(maxsize=8)
def _inserted_ids(tokenizer: Any, template: str) -> tuple[int, ...]:
    """Tokens of the default system prompt that ``template`` inserts; only ChatML is recognised."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "."}], chat_template=template, tokenize=False)
    match = _INSERTED_SYSTEM.match(text)
    return tuple(tokenizer(match.group(), add_special_tokens=False)["input_ids"]) if match else ()


def _inserted_length(messages: Messages, ids: Sequence[int], tokenizer: Any) -> int:
    if messages[0]["role"] == "system":
        return 0
    inserted = _inserted_ids(tokenizer, tokenizer.chat_template)
    return len(inserted) if tuple(ids[: len(inserted)]) == inserted else 0


class ChatDataset(Dataset[Row]):
    """Dialogues, encoded once.

    Args:
        records: Dialogues as ``read_jsonl`` returns them, or objects with ``messages``.
        tokenizer: A tokenizer with a chat template.
        max_length: Public limit on the number of tokens of a row.

    Raises:
        ValueError: None of the first 100 rows has a label.
    """

    def __init__(self, records: Sequence[Any], tokenizer: Any, max_length: int) -> None:
        self.max_length = max_length
        self.rows = [
            encode(record["messages"] if isinstance(record, dict) else record, tokenizer, max_length)
            for record in records
        ]
        first = self.rows[:100]
        if first and not any((row["labels"] != IGNORE).any() for row in first):
            raise ValueError(f"no reply fits into max_length={max_length} tokens in any of the first {len(first)} rows")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def collate(rows: Sequence[Row], pad_id: int, max_length: int, multiple: int = 8) -> Row:
    """Pad rows on the left to the longest of the batch, rounded up to ``multiple`` and at most ``max_length``.

    On the left, so that the replies stand at the end and only there logits are needed (``reply_losses``).
    """
    longest = max(len(row["input_ids"]) for row in rows)
    width = max(longest, min(-(-longest // multiple) * multiple, max_length))
    batch = {
        "input_ids": torch.full((len(rows), width), pad_id, dtype=torch.long),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORE, dtype=torch.long),
    }
    for index, row in enumerate(rows):
        start = width - len(row["input_ids"])
        batch["input_ids"][index, start:] = row["input_ids"]
        batch["attention_mask"][index, start:] = 1
        batch["labels"][index, start:] = row["labels"]
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


@dataclass(frozen=True)
class PadCollate:
    """``collate`` with fixed arguments, for a ``DataLoader``; it can be pickled."""

    pad_id: int
    max_length: int
    multiple: int = 8

    def __call__(self, rows: Sequence[Row]) -> Row:
        """Pad ``rows`` to one batch."""
        return collate(rows, self.pad_id, self.max_length, self.multiple)


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
        messages = [{"role": "user", "content": prompt}]
        ids = _ids(messages, tokenizer, prompt=True)
        ids = ids[_inserted_length(messages, ids, tokenizer) :]
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
