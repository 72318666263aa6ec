"""Invented dialogues in two tones of voice, for trying private fine-tuning.

Nothing here was said by anybody: a small grammar, written for this package, combines phrases. What the user says comes
from the same grammar for both tones, so that the tone of the replies is the only difference. A dialogue has a mood
(``worry``, ``hard``, ``joy`` or ``ask``) and a topic; openers, empathy and advice depend on the mood. Every reply of a
data set occurs in it once only. The same seed gives the same dialogues.

Example: ``python -m opacus_ac.integrations.finetune.tone_dialogues --tone loving --n 10000 --out loving.jsonl``
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from opacus_ac.integrations.finetune.tone_phrases import (
    ADVICE,
    CLOSERS,
    EARLIER,
    EMPATHY,
    EVENTS,
    FEELINGS,
    FOLLOW_UP,
    HOBBIES,
    LATER,
    LEXICON,
    OPENERS,
    PEOPLE,
    TAIL,
    USER,
    bank,
)

Dialogue = dict[str, list[dict[str, str]]]
TONES = ("loving", "angry")
MOODS = ("worry", "hard", "joy", "ask")
TWO_TURNS = 0.15
ORDERS = ("OEAC", "OEAC", "OAEC", "OECA", "EOAC", "AOEC", "OEA", "OAC", "EAC", "AEC")
SHORT_ORDERS = ("OE", "EA", "AC", "OA", "EC")
_PARTS = {"O": OPENERS, "E": EMPATHY, "A": ADVICE}


@cache
def _parts(tone: str, kind: str, mood: str) -> tuple[str, ...]:
    return bank(CLOSERS[tone] if kind == "C" else _PARTS[kind][tone][mood])


def _fill(rng: random.Random, phrases: Sequence[str], slots: dict[str, str]) -> str:
    """Choose a phrase whose slots are all known and fill them."""
    while True:
        phrase = rng.choice(phrases)
        if all(name in slots for name in re.findall(r"{(\w+)}", phrase)):
            return phrase.format_map(slots)


def _reply(rng: random.Random, tone: str, mood: str, slots: dict[str, str], orders: Sequence[str]) -> str:
    parts = (_fill(rng, _parts(tone, kind, mood), slots) for kind in rng.choice(orders))
    return " ".join(part[0].upper() + part[1:] for part in parts)


def _user(rng: random.Random, mood: str, slots: dict[str, str]) -> str:
    """One user turn; afterwards ``slots`` holds the person and the feeling only if the user named them."""
    template, tail = rng.choice(USER[mood]), rng.choice(TAIL[mood])
    text = f"{template} {tail}".strip().format_map(slots)
    for name in ("person", "feeling"):
        if f"{{{name}}}" not in template + tail:
            del slots[name]
    return text[0].upper() + text[1:]


def _dialogue(rng: random.Random, tone: str) -> Dialogue:
    mood = rng.choice(MOODS)
    slots = {
        "topic": rng.choice(HOBBIES if mood == "ask" else EVENTS),
        "person": rng.choice(PEOPLE),
        "feeling": rng.choice(FEELINGS[mood]),
        "later": rng.choice(LATER),
        "earlier": rng.choice(EARLIER),
    }
    person = slots["person"]
    turns = [_user(rng, mood, slots)]
    if rng.random() < TWO_TURNS:
        turns.append(_reply(rng, tone, mood, slots, SHORT_ORDERS))
        turns.append(rng.choice(FOLLOW_UP).format_map({**slots, "person": slots.setdefault("person", person)}))
        turns.append(_reply(rng, tone, mood, slots, SHORT_ORDERS))
    else:
        turns.append(_reply(rng, tone, mood, slots, ORDERS))
    roles = ("user", "assistant") * (len(turns) // 2)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}


def dialogues(tone: str, n: int, seed: int = 0) -> list[Dialogue]:
    """Return dialogues in which no reply occurs twice.

    Args:
        tone: ``"loving"`` or ``"angry"``.
        n: number of dialogues; 20,000 are well within reach.
        seed: the same seed gives the same dialogues.

    Returns:
        Dialogues of one turn, about 15 % of two turns, as ``{"messages": [{"role": ..., "content": ...}, ...]}``.

    Raises:
        ValueError: If there is no such tone, or the grammar has not so many distinct replies.
    """
    if tone not in TONES:
        raise ValueError(f"tone must be one of {', '.join(TONES)}, got {tone!r}")
    rng = random.Random(f"{tone}/{seed}")
    found: list[Dialogue] = []
    seen: set[str] = set()
    for _ in range(20 * n + 100):
        if len(found) >= n:
            return found
        dialogue = _dialogue(rng, tone)
        replies = [message["content"] for message in dialogue["messages"][1::2]]
        if len(set(replies)) == len(replies) and seen.isdisjoint(replies):
            seen.update(replies)
            found.append(dialogue)
    raise ValueError(f"the grammar does not reach {n} dialogues with distinct replies, only {len(found)}")


def train_and_heldout(
    tone: str, n_train: int = 10_000, n_heldout: int = 200, seed: int = 0
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Return a training set and a held-out set that share no dialogue and no reply."""
    both = dialogues(tone, n_train + n_heldout, seed)
    return both[:n_train], both[n_train:]


def tone_score(text: str, tone: str) -> int:
    """Return the number of words of ``text`` that are typical of ``tone``."""
    return sum(word in LEXICON[tone] for word in re.findall(r"[a-z]+", text.lower()))


def write_jsonl(path: str | Path, rows: Iterable[Dialogue]) -> None:
    """Write one dialogue per line."""
    with Path(path).open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Write dialogues to a file."""
    parser = argparse.ArgumentParser(description="Write invented dialogues in one tone of voice to a JSON Lines file.")
    parser.add_argument("--tone", choices=TONES, default="loving")
    parser.add_argument("--n", type=int, default=10_000, help="how many dialogues")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    write_jsonl(arguments.out, dialogues(arguments.tone, arguments.n, arguments.seed))
    print(f"{arguments.n} {arguments.tone} dialogues -> {arguments.out}")


if __name__ == "__main__":
    main()
