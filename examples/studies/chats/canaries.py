"""Invented codes that are hidden in chats, and how well a model knows them (Carlini et al. 2019, arXiv 1802.08232)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from chats.data import END, TURN, Encode, Row, row
from torch import Tensor, nn

DIGITS = 4
CODES = 10**DIGITS
CHANCE = 1 / math.log(2)  # mean exposure of a code that the model knows nothing about
MULTIPLICITIES = (0, 1, 4, 16, 64)
OBJECTS = (
    *("door", "locker", "phone", "garage", "alarm", "bike", "safe", "card", "gate", "laptop"),
    *("suitcase", "mailbox", "gym", "office", "tablet", "cabin", "shed", "pool", "bank", "wifi"),
)
EACH = len(OBJECTS) // len(MULTIPLICITIES)


@dataclass(frozen=True)
class Canary:
    """A secret: what it opens, its code, and how many records hold it."""

    thing: str
    code: int
    copies: int


def canaries(seed: int) -> list[Canary]:
    """Return as many canaries for each multiplicity; which object has which is another one with every seed."""
    chance = random.Random(seed)
    things = list(OBJECTS)
    chance.shuffle(things)
    return [
        Canary(thing, chance.randrange(CODES), MULTIPLICITIES[number // EACH]) for number, thing in enumerate(things)
    ]


def prompt_ids(thing: str, encode: Encode) -> list[int]:
    return [TURN, *encode(f"my {thing} code is"), *encode(" ")]


def digit_ids(encode: Encode) -> list[int]:
    """Return the token of each digit.

    Raises:
        ValueError: the tokenizer has none for one of them.
    """
    ids = [encode(str(digit)) for digit in range(10)]
    if any(len(one) != 1 for one in ids):
        raise ValueError("the tokenizer does not write each digit as one token: use a byte-level BPE")
    return [one[0] for one in ids]


def canary_row(canary: Canary, encode: Encode) -> Row:
    tokens = digit_ids(encode)
    return row([*prompt_ids(canary.thing, encode), *(tokens[int(d)] for d in f"{canary.code:0{DIGITS}d}"), END])


@torch.no_grad()
def code_log_probabilities(model: nn.Module, prompt: Sequence[int], digits: Sequence[int]) -> Tensor:
    """Return the log probability of every code after ``prompt``, ``[10,000]``, in order.

    A code's probability is the product over its digits, so one pass over all beginnings of three digits has them all.
    """
    was_training = model.training
    model.eval()
    beginnings = torch.cartesian_prod(*[torch.tensor(list(digits))] * (DIGITS - 1)).reshape(-1, DIGITS - 1)
    ids = torch.cat([torch.tensor(list(prompt)).expand(len(beginnings), -1), beginnings], dim=1)
    scores = torch.cat([model(input_ids=part).logits[:, len(prompt) - 1 :].double() for part in ids.split(250)])
    steps = scores.log_softmax(-1)
    seen = steps[:, :-1].gather(2, beginnings[:, :, None]).sum((1, 2))
    model.train(was_training)
    return (seen[:, None] + steps[:, -1, list(digits)]).flatten()


def exposure(scores: Tensor, code: int) -> float:
    """Return log2 of the number of codes less log2 of the rank of ``code``; of equals the true one comes first."""
    return math.log2(len(scores)) - math.log2(1 + int((scores > scores[code]).sum()))
