"""Rows of TRL's data formats as token ids. They stay in memory: TRL's own preparation leaves copies in a file cache.

A row depends on its own record alone. A record that keeps no label after truncation stays, with a loss of zero, so that
the number of records does not depend on their content. (TRL drops it.)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from opacus_ac.integrations.trl.library import (
    extract_prompt,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
)

Row = dict[str, list[int]]
"""Token ids and labels of a record, by name."""

IGNORE = -100
_QUIET = {"verbose": False}  # the tokenizer would print how long a long record is


class RowError(ValueError):
    """Raised for a record that cannot be a token row, with a message that quotes nothing of it."""


class TokenRows(Dataset[dict[str, Any]]):
    """Records as token rows, made once.

    Args:
        records: rows of one of TRL's data formats.
        encode: makes the token row of a record.
        max_length: public limit on the number of tokens, for the model card; None without one.

    Raises:
        ValueError: If a record cannot be encoded. The message has its number, from 0, and nothing of its content.
    """

    def __init__(self, records: Any, encode: Callable[[dict[str, Any]], Row], max_length: int | None) -> None:
        self.max_length = max_length
        self.rows = [_encode(index, records[index], encode) for index in range(len(records))]
        self.reference: torch.Tensor | None = None
        """Log-probabilities of the reference model ``[N, 2]``, for records that are pairs. They are private."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = dict(self.rows[index])
        if self.reference is not None:
            row["ref_chosen_logps"], row["ref_rejected_logps"] = self.reference[index].tolist()
        return row


def _encode(index: int, record: Any, encode: Callable[[dict[str, Any]], Row]) -> Row:
    try:
        return encode(copy.deepcopy(dict(record)))
    except RowError as error:
        raise ValueError(f"record {index}: {error}") from None
    except Exception as error:
        names = ", ".join(sorted(map(str, record))) if isinstance(record, Mapping) else type(record).__name__
        # The message of the tokenizer or the template may quote the record, so only its kind is passed on.
        raise ValueError(
            f"record {index} with {names} is not of the expected format ({type(error).__name__}): see the data formats "
            "of TRL, and the chat template of the tokenizer"
        ) from None


class _Tokens:
    """Tokenises text and dialogues as TRL does."""

    def __init__(self, tokenizer: Any, template: str | None) -> None:
        self.tokenizer, self.template = tokenizer, template

    def __call__(self, value: Any, example: Mapping[str, Any] | None = None, **options: Any) -> Mapping[str, list[int]]:
        if isinstance(value, str):
            return dict(self.tokenizer(text=value, **_QUIET))
        tools = (example or {}).get("tools")
        given = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        given |= (example or {}).get("chat_template_kwargs") or {}
        if self.template is not None:
            given.setdefault("chat_template", self.template)
        return dict(
            self.tokenizer.apply_chat_template(
                value, tokenize=True, return_dict=True, tokenizer_kwargs=dict(_QUIET), **given, **options
            )
        )

    def ended(self, text: str) -> str:
        """Return the text with the end token."""
        end = self.tokenizer.eos_token
        return text if text.endswith(end) else text + end


class LanguageRow:
    """Makes the token row of a text, a dialogue, or a prompt with its completion.

    Args:
        tokenizer: a tokenizer.
        args: ``SFTConfig``.
        completion_only: whether labels are on completions only.
        template: chat template instead of the tokenizer's; None for its own.
        formatting_func: makes the text of a record; None for records with a text.
    """

    def __init__(
        self,
        tokenizer: Any,
        args: Any,
        *,
        completion_only: bool,
        template: str | None,
        formatting_func: Callable[[dict[str, Any]], str] | None,
    ) -> None:
        self.tokens = _Tokens(tokenizer, template)
        self.args, self.completion_only, self.formatting_func = args, completion_only, formatting_func

    def __call__(self, example: dict[str, Any]) -> Row:
        """Return ``input_ids`` and ``labels``."""
        row = example if "input_ids" in example else self._tokenize(self._text(example))
        ids = list(row["input_ids"])
        labels = list(row["labels"]) if row.get("labels") is not None else self._labels(ids, row)
        kept = kept_part(self.args)
        return {"input_ids": ids[kept], "labels": labels[kept]}

    def _labels(self, ids: list[int], row: Mapping[str, Any]) -> list[int]:
        names = ("completion_mask",) * self.completion_only + ("assistant_masks",)
        masks = [row[name] for name in names if row.get(name) is not None]
        # Masks of another length than the ids would shift labels.
        return [i if all(bits) else IGNORE for i, *bits in zip(ids, *masks, strict=True)]

    def _text(self, example: dict[str, Any]) -> dict[str, Any]:
        field = self.args.dataset_text_field
        if self.formatting_func is not None:
            # The record keeps nothing else, because "messages" would win over the text.
            example = {field: self.formatting_func(example)}
        if is_conversational_from_value(example):
            example = dict(maybe_convert_to_chatml(example))
        if not is_conversational(example):
            name = field if field in example else "completion"
            if name in example:
                example[name] = self.tokens.ended(example[name])
        return example

    def _tokenize(self, example: dict[str, Any]) -> dict[str, Any]:
        if "prompt" in example:
            return self._with_prompt(example)
        if is_conversational(example):
            return self._dialogue(example["messages"], example)
        return {"input_ids": self.tokens(example[self.args.dataset_text_field])["input_ids"]}

    def _dialogue(self, messages: Any, example: dict[str, Any]) -> dict[str, Any]:
        only = self.args.assistant_only_loss
        made = self.tokens(messages, example, **({"return_assistant_tokens_mask": True} if only else {}))
        if only and not any(made["assistant_masks"]):
            raise RowError(
                "no token is the assistant's, so assistant_only_loss has nothing to learn from: is there a reply, and "
                "has the chat template {% generation %} marks around it?"
            )
        return {name: made[name] for name in ("input_ids", "assistant_masks") if name in made}

    def _with_prompt(self, example: dict[str, Any]) -> dict[str, Any]:
        whole, prompt = example["prompt"] + example["completion"], example["prompt"]
        if is_conversational(example):
            start = self.tokens(prompt, example, add_generation_prompt=True)["input_ids"]
            row = self._dialogue(whole, example)
        else:
            start = self.tokens(prompt)["input_ids"]
            row = {"input_ids": self.tokens(whole)["input_ids"]}
        length = common_start(start, row["input_ids"])
        return {**row, "completion_mask": [int(place >= length) for place in range(len(row["input_ids"]))]}


class PreferenceRow:
    """Makes the token row of a prompt with a preferred and a rejected reply.

    Args:
        tokenizer: a tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokens = _Tokens(tokenizer, None)

    def __call__(self, example: dict[str, Any]) -> Row:
        """Return ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        if all(name in example for name in names):
            return {name: list(example[name]) for name in names}
        if "prompt" not in example:
            example = {**example, **extract_prompt(example)}
        replies = [example["chosen"], example["rejected"]]
        if is_conversational(example):
            start = list(self.tokens(example["prompt"], example, add_generation_prompt=True)["input_ids"])
            whole = [list(self.tokens(example["prompt"] + reply, example)["input_ids"]) for reply in replies]
        else:
            start = list(self.tokens(example["prompt"])["input_ids"])
            whole = [list(self.tokens(example["prompt"] + self.tokens.ended(r))["input_ids"]) for r in replies]
        length = min(common_start(start, ids) for ids in whole)
        return dict(zip(names, (start[:length], whole[0][length:], whole[1][length:]), strict=True))


def common_start(ids: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two rows have in common at their start.

    >>> common_start([1, 2, 3], [1, 2, 4, 5])
    2
    """
    pairs = zip(ids, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(other)))


def kept_part(args: Any) -> slice:
    """Return the part of a row that truncation keeps."""
    if args.max_length is None:
        return slice(None)
    return slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)
