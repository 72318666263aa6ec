"""The forms in which a row of a file may hold a dialogue or a text. It becomes messages, or is refused."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, str]]
ROLES = ("system", "user", "assistant")
TEXT = "text"
"""Role of the only message of a row that is a text and no dialogue."""

_ALIASES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant",
}  # fmt: skip
"""Names of roles in rows of ShareGPT's form."""
_TOOL_ROLES = ("tool", "function", "tool_call", "function_call", "observation", "function_response", "tool_response")
_SHOWN_COLUMNS = 12
_COLUMN_NAME = re.compile(r"[\w.\-]{1,30}( [\w.\-]{1,20})?")


@dataclass
class RowFacts:
    """What reading a row has shown.

    Attributes:
        form: columns that were read.
        tools: number of turns and calls of tools that were left out.
    """

    form: str = ""
    tools: int = 0


def dialogue(record: Any, facts: RowFacts | None = None) -> Messages:
    """Return the messages of a row, with ``role`` and ``content`` only.

    Args:
        record: the row.
        facts: is filled.

    Raises:
        ValueError: If the row has none of the forms, or is no dialogue that ends with a reply.
    """
    facts = RowFacts() if facts is None else facts
    if not isinstance(record, Mapping):
        raise ValueError("not a JSON object")
    columns, read = _form(record)
    facts.form = " and ".join(columns)
    messages = read(record, facts)
    if messages[-1]["role"] not in ("assistant", TEXT):
        raise ValueError("the last message must be a reply of the assistant")
    return messages


# ---------------------------------------------------------------- the forms


def _form(record: Mapping[str, Any]) -> _Form:
    """Return the form of a row: the first whose columns all hold something, or else that are all there."""
    full = [form for form in _FORMS if all(record.get(name) is not None for name in form[0])]
    there = [form for form in _FORMS if all(name in record for name in form[0])]
    if not there:
        raise ValueError(_no_form(list(record)))
    return (full or there)[0]


def _messages(record: Mapping[str, Any], facts: RowFacts) -> Messages:
    return _turns("messages", record["messages"], facts)


def _conversations(record: Mapping[str, Any], facts: RowFacts) -> Messages:
    return [*_system(record), *_turns("conversations", record["conversations"], facts)]


def _pair(record: Mapping[str, Any], facts: RowFacts) -> Messages:
    prompt = record["prompt"]
    reply = (
        record["response"] if record.get("response") is not None else record.get("completion", record.get("response"))
    )
    if isinstance(prompt, list) or isinstance(reply, list):
        both = [*_as_turns(prompt, "user"), *_as_turns(reply, "assistant")]
        return _turns("prompt", both, facts)
    return _checked([("user", prompt), ("assistant", reply)])


def _alpaca(record: Mapping[str, Any], facts: RowFacts) -> Messages:
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError('"history" must be a list of pairs, instruction and output')
    asked, more = record["instruction"], record.get("input")
    if more not in (None, ""):
        if not isinstance(more, str) or not isinstance(asked, str):
            raise ValueError('"instruction" and "input" must be strings')
        asked = f"{asked}\n\n{more}" if asked else more
    pairs = [(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [*_system(record), *_checked([*pairs, ("user", asked), ("assistant", record["output"])])]


def _text(record: Mapping[str, Any], facts: RowFacts) -> Messages:
    text = record["text"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError('"text" must be a string that is not empty')
    return [{"role": TEXT, "content": text}]


_Form = tuple[tuple[str, ...], Callable[[Mapping[str, Any], RowFacts], Messages]]
"""Columns, and the function that reads a row which has them."""
_FORMS: tuple[_Form, ...] = (
    (("messages",), _messages),
    (("conversations",), _conversations),
    (("prompt", "response"), _pair),
    (("prompt", "completion"), _pair),
    (("instruction", "output"), _alpaca),
    (("text",), _text),
)
JSON_COLUMNS = ("messages", "conversations")
"""Columns whose fields are JSON in a file of texts, such as CSV."""
COLUMNS = tuple(dict.fromkeys(name for columns, _ in _FORMS for name in columns))


def _system(record: Mapping[str, Any]) -> Messages:
    text = record.get("system")
    return [] if text in (None, "") else _checked([("system", text)])


def _checked(pairs: list[tuple[str, Any]]) -> Messages:
    for number, (_, text) in enumerate(pairs, start=1):
        if not isinstance(text, str):
            raise ValueError(f'message {number}: "content" must be a string')
    return [{"role": role, "content": text} for role, text in pairs]


def _as_turns(value: Any, role: str) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


# ---------------------------------------------------------------- turns


def _turns(name: str, turns: Any, facts: RowFacts) -> Messages:
    """Return the messages of a list of turns, without those of tools."""
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'"{name}" must be a list that is not empty')
    found = [_turn(number, turn, facts) for number, turn in enumerate(turns, start=1)]
    messages = [message for message in found if message is not None]
    if not messages:
        raise ValueError("all turns are of tools: there is nothing to train on")
    return messages


def _turn(number: int, turn: Any, facts: RowFacts) -> dict[str, str] | None:
    """Return the message of a turn; None, and a count, for the turn of a tool."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"message {number} is not an object")
    keys = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
    role = turn.get(keys[0])
    calls = any(turn.get(name) for name in ("tool_calls", "function_call"))
    facts.tools += role in _TOOL_ROLES or calls
    if role in _TOOL_ROLES or (calls and turn.get(keys[1]) in (None, "", [])):
        return None
    for key in keys:
        if key not in turn:
            raise ValueError(f'message {number}: "{key}" is missing')
    content = _content(number, keys[1], turn[keys[1]])
    if not isinstance(role, str):
        raise ValueError(f'message {number}: "{keys[0]}" must be a string')
    role = _ALIASES.get(role, role) if keys[0] == "from" else role
    if role not in ROLES:
        also = f", or in {keys[0]!r} one of {', '.join(_ALIASES)}" if keys[0] == "from" else ""
        raise ValueError(f"message {number}: {keys[0]} must be one of {', '.join(ROLES)}{also}, got {role!r}")
    return {"role": role, "content": content}


def _content(number: int, key: str, value: Any) -> str:
    """Return the text of a turn, which may be a list of parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f'message {number}: "{key}" must be a string, or a list of parts')
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"message {number}: a part of type {kind!r} is no text: only texts are trained on")
    return "".join(texts)


# ---------------------------------------------------------------- messages


def from_text(row: Mapping[Any, Any], parse: Callable[[str], Any]) -> dict[Any, Any]:
    """Return a row of texts, as CSV has it, with its columns of JSON parsed.

    Args:
        row: the row.
        parse: parses JSON, or raises ``ValueError``.
    """
    return {k: parse(v) if k in JSON_COLUMNS and isinstance(v, str) else v for k, v in row.items()}


def shown_columns(names: Collection[Any]) -> str:
    """Return the names of columns for a message. A name that is a text may be private, and is not shown."""
    plain = [name for name in names if isinstance(name, str) and _COLUMN_NAME.fullmatch(name)]
    if not plain:
        return "no column that has a name (the first line of a .csv must name the columns)"
    shown = ", ".join(json.dumps(name, ensure_ascii=False) for name in plain[:_SHOWN_COLUMNS])
    return shown + (", ..." if len(plain) > _SHOWN_COLUMNS else "")


def meant(name: str, names: Collection[Any]) -> str:
    """Return a question for the end of a message: the column that a name may have meant."""
    near = difflib.get_close_matches(name, [n for n in names if isinstance(n, str) and _COLUMN_NAME.fullmatch(n)], n=1)
    return f': did you mean "{near[0]}"?' if near else ""


def _no_form(names: list[Any]) -> str:
    lower = {name.lower(): name for name in names if isinstance(name, str)}
    for column in COLUMNS:
        near = difflib.get_close_matches(column, [n for n in lower if _COLUMN_NAME.fullmatch(n)], n=1, cutoff=0.75)
        if near and lower[near[0]] != column:
            hint = f'. Did you mean "{column}" by "{lower[near[0]]}"?'
            break
    else:
        hint = ""
    return (
        '"messages" is missing, and so are "conversations", "prompt" and "response" or "completion", "instruction" and '
        f'"output", and "text". The row has {shown_columns(names)}{hint}'
    )
