"""Replies of a run's model to a dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from opacus_ac.integrations.finetune.chat_data import prompt_ids
from opacus_ac.integrations.trained.folder import RunError

PROMPTS = ("I had a hard day at work.", "How do plants grow?", "Can you recommend something to read?")
"""Public prompts for a look at a model before and after training. They are about nobody's data."""
SHORT = 40
"""Tokens of a reply to one of :data:`PROMPTS`."""


@dataclass(frozen=True)
class ReplyOptions:
    """How a reply is written.

    Attributes:
        max_new_tokens: longest reply, in tokens.
        temperature: 0 for the most likely token each time; larger numbers draw less likely ones.

    Raises:
        RunError: If a number is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise RunError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < 100:
            raise RunError(f"--temperature must be at least 0 and below 100, got {self.temperature:g}")


def chat_ids(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[int]:
    """Return the token ids of a dialogue that waits for a reply, as in training.

    Raises:
        RunError: If the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise RunError(
            "the tokenizer has no chat template, so it is no chat model: continue texts with generate --plain"
        )
    return prompt_ids(list(messages), tokenizer)


@torch.no_grad()
def write_reply(model: Any, tokenizer: Any, ids: Sequence[int], options: ReplyOptions, streamer: Any = None) -> str:
    """Return what a model writes after a prompt.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        ids: token ids of the prompt.
        options: length and temperature.
        streamer: gets the tokens as they come (``transformers.TextStreamer``); None for none.

    Raises:
        RunError: If the prompt leaves no room for a reply.
    """
    room = int(getattr(model.config, "max_position_embeddings", None) or 1 << 30) - len(ids)
    if not ids or room < 1:
        raise RunError(
            f"a prompt of {len(ids)} tokens leaves no room for a reply: it must have 1 to {room + len(ids) - 1}"
        )
    prompt = torch.tensor([list(ids)], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    written = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=min(options.max_new_tokens, room),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        streamer=streamer,
        **sampling,
    )
    return str(tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True)).strip()


def short_replies(model: Any, tokenizer: Any) -> list[str]:
    """Return the replies of a model to :data:`PROMPTS`, one line each. The model keeps its mode."""
    mode = model.training
    model.eval()
    options = ReplyOptions(max_new_tokens=SHORT)
    try:
        asked = ([{"role": "user", "content": prompt}] for prompt in PROMPTS)
        return [" ".join(write_reply(model, tokenizer, chat_ids(m, tokenizer), options).split()) for m in asked]
    finally:
        model.train(mode)
