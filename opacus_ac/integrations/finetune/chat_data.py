"""Dialogues as training records: labels on replies only, truncation to a public length, padding.

One record is one dialogue and becomes one row. Rows are never packed together: a packed row would put several people
under one clipping bound, and one more record would move all rows after it. ``max_length`` and the padding multiple are
public constants, chosen without looking at the records. A row that has no label after truncation stays in the dataset
with a loss of zero, so that the number of records does not depend on their content.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from opacus_ac.integrations.finetune.chat_files import private_cache_dir, read_dialogues, read_jsonl
from opacus_ac.integrations.finetune.chat_forms import ROLES, TEXT, Messages

__all__ = [
    "IGNORE", "ROLES", "TEXT", "ChatDataset", "Messages", "PadCollate", "Row", "collate", "encode", "inserted_length",
    "private_cache_dir", "prompt_ids", "read_dialogues", "read_jsonl",
]  # fmt: skip

Row = dict[str, Tensor]
"""Token ids of a record or a batch, by name: ``[T]`` or ``[B, T]`` each."""

IGNORE = -100
"""Label of a position that does not count in the loss."""

_INSERTED_SYSTEM = re.compile(r"<\|im_start\|>system\n.*?<\|im_end\|>\n", re.DOTALL)


def encode(messages: Messages, tokenizer: Any, max_length: int) -> Row:
    """Tokenise one dialogue with the chat template, with labels on the replies only.

    The default system prompt that some templates insert is left out. Tokens after the last reply are cut off, and then
    the row is cut at ``max_length``. A text (one message of role ``text``) is tokenised as it is, and ends with the end
    token; every token but the first is a label.

    Args:
        messages: the dialogue.
        tokenizer: a tokenizer with a chat template.
        max_length: public limit on the number of tokens.

    Returns:
        ``input_ids`` and ``labels``, ``[T]`` each.

    Raises:
        ValueError: If there is no chat template, or it refuses the dialogue or does not tell replies from prompts.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be positive, got {max_length}")
    if messages[0]["role"] == TEXT:
        return _encode_text(messages[0]["content"], tokenizer, max_length)
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use an instruction-tuned model")
    by_mask = "generation %}" in tokenizer.chat_template or "generation -%}" in tokenizer.chat_template
    try:
        ids, is_reply = _by_mask(messages, tokenizer) if by_mask else _by_prefix(messages, tokenizer)
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise ValueError(f"the chat template refuses this dialogue: {error}") from error
    skip = inserted_length(messages, ids, tokenizer)
    end = max((i + 1 for i, flag in enumerate(is_reply) if flag), default=len(ids))
    end = min(end, skip + max_length)
    input_ids = torch.tensor(ids[skip:end], dtype=torch.long)
    mask = torch.tensor(is_reply[skip:end], dtype=torch.bool)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(~mask, IGNORE)}


def _encode_text(text: str, tokenizer: Any, max_length: int) -> Row:
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    input_ids = torch.tensor(ids[:max_length], dtype=torch.long)
    labels = input_ids.clone()
    labels[:1] = IGNORE  # nothing stands before it that could predict it
    return {"input_ids": input_ids, "labels": labels}


def _ids(messages: Messages, tokenizer: Any, prompt: bool = False) -> list[int]:
    return list(
        tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=prompt)[
            "input_ids"
        ]
    )


def prompt_ids(messages: Messages, tokenizer: Any) -> list[int]:
    """Return the token ids of a dialogue that waits for a reply, without an inserted default system prompt."""
    ids = _ids(messages, tokenizer, prompt=True)
    return ids[inserted_length(messages, ids, tokenizer) :]


def _by_mask(messages: Messages, tokenizer: Any) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]


def _by_prefix(messages: Messages, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Find each reply as the tokens that the template adds to the dialogue before it, up to the end token."""
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
        if tokenizer.eos_token_id in until[len(prompt) :]:  # leave out tokens after the end token
            end -= until[::-1].index(tokenizer.eos_token_id)
        is_reply[len(prompt) : end] = [True] * (end - len(prompt))
    return ids, is_reply


@lru_cache(maxsize=8)
def _inserted_ids(tokenizer: Any, template: str) -> tuple[int, ...]:
    """Return the tokens of the default system prompt that ``template`` inserts. Only ChatML is recognised."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": "."}], chat_template=template, tokenize=False)
    match = _INSERTED_SYSTEM.match(text)
    return tuple(tokenizer(match.group(), add_special_tokens=False)["input_ids"]) if match else ()


def inserted_length(messages: Messages, ids: Sequence[int], tokenizer: Any) -> int:
    """Return how many of the tokens ``ids`` are a default system prompt that the template put before ``messages``."""
    if messages[0]["role"] == "system":
        return 0
    inserted = _inserted_ids(tokenizer, tokenizer.chat_template)
    return len(inserted) if tuple(ids[: len(inserted)]) == inserted else 0


def _encode(index: int, record: Any, tokenizer: Any, max_length: int) -> Row:
    try:
        return encode(record["messages"] if isinstance(record, dict) else record, tokenizer, max_length)
    except ValueError as error:
        raise ValueError(f"record {index}: {error}") from None


class ChatDataset(Dataset[Row]):
    """A dataset of dialogues, which are tokenised once.

    Args:
        records: dialogues as ``read_jsonl`` returns them, or objects with ``messages``.
        tokenizer: a tokenizer with a chat template.
        max_length: public limit on the number of tokens of a row.

    Raises:
        ValueError: If none of the first 100 rows has a label, or if a row cannot be encoded. The message has the number
            of the row, from 0.
    """

    def __init__(self, records: Sequence[Any], tokenizer: Any, max_length: int) -> None:
        self.max_length = max_length
        self.rows = [_encode(index, record, tokenizer, max_length) for index, record in enumerate(records)]
        first = self.rows[:100]
        if first and not any((row["labels"] != IGNORE).any() for row in first):
            raise ValueError(
                f"no reply fits into max_length={max_length} tokens in any of the first {len(first)} rows: choose a "
                "larger max_length"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def collate(rows: Sequence[Row], pad_id: int, max_length: int, multiple: int = 8) -> Row:
    """Pad rows on the left to the length of the longest row, rounded up to ``multiple`` and at most ``max_length``.

    With padding on the left the replies are at the end, so that logits are needed only there (``reply_losses``).
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
        batch["labels"][index, start : start + 1] = IGNORE  # or padding would predict it, if another row is longer
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


@dataclass(frozen=True)
class PadCollate:
    """:func:`collate` with fixed arguments, for a ``DataLoader``. It can be pickled."""

    pad_id: int
    max_length: int
    multiple: int = 8

    def __call__(self, rows: Sequence[Row]) -> Row:
        """Pad ``rows`` to one batch."""
        return collate(rows, self.pad_id, self.max_length, self.multiple)
