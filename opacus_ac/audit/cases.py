"""Records and models that are hard to be right about: what the replay audits run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_ac.audit.task import Task

RECORDS, FEATURES, CLASSES = 16, 6, 3
POSITIONS, WIDTH = 4, 64


class Altered(nn.Module):
    """A linear classifier whose hidden layer goes through ``change``."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor], part: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.head, self.part, self.change = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES), part, change

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores ``[B, classes]`` of inputs ``[B, d]``."""
        return self.head(self.change(self, torch.tanh(self.inner(x))))


def _carry(module: Any, hidden: Tensor) -> Tensor:
    """Add what the batch before left behind."""
    before = getattr(module, "left", torch.zeros(hidden.shape[1]))
    module.left = 5 * hidden.mean(0).detach()
    return hidden + before


def _look_up(module: Any, hidden: Tensor) -> Tensor:
    """Add rows of a table that is kept short as it is read; which rows follows from the records."""
    rows: Tensor = module.part((hidden[:, 0] * 500).long().remainder(1000))
    return hidden + rows


MODELS: dict[str, Callable[[], nn.Module]] = {
    "no coupling": lambda: Altered(lambda m, h: h),
    "dropout": lambda: Altered(lambda m, h: F.dropout(h, 0.5, m.training)),
    "batch normalisation": lambda: Altered(lambda m, h: m.part(h), nn.BatchNorm1d(16)),
    "frozen batch normalisation": lambda: Altered(lambda m, h: m.part(h), nn.BatchNorm1d(16).requires_grad_(False)),
    "centred on the batch": lambda: Altered(lambda m, h: h - h.mean(0)),
    "scaled by the batch's largest value": lambda: Altered(lambda m, h: 4 * h / h.detach().abs().max()),
    "rows in another order": lambda: Altered(lambda m, h: m.part(h[h[:, 0].argsort()]), nn.Linear(16, 16)),
    "neighbouring rows mixed": lambda: Altered(lambda m, h: h + h.roll(1, 0)),
    "state carried to the next batch": lambda: Altered(_carry),
    "frozen table written as it is read": lambda: Altered(
        _look_up, nn.Embedding(1000, 16, max_norm=0.1).requires_grad_(False)
    ),
}
"""Models, by what they do. All but the first couple records, or carry something out of a batch."""


def model_task(name: str) -> Task:
    """Return a task with a model of :data:`MODELS`; its record, the first of each batch, is far from the others."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(RECORDS, FEATURES, generator=generator)
    inputs[0] = 20 * inputs[0]
    targets = torch.randint(0, CLASSES, (RECORDS,), generator=generator)
    return Task(inputs, targets, seeded(MODELS[name]), [0], public_randomness=name == "dropout")


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a function that makes the same model each time and leaves torch's generator alone."""

    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return make()

    return made


Pair = tuple[Tensor, Tensor]


def _around(size: float) -> Callable[[torch.Generator], Pair]:
    def made(generator: torch.Generator) -> Pair:
        return size * torch.randn(POSITIONS, WIDTH, generator=generator), torch.randn(
            POSITIONS, WIDTH, generator=generator
        )

    return made


def _one(value: float) -> Callable[[torch.Generator], Pair]:
    """An ordinary record with one value that is not."""

    def made(generator: torch.Generator) -> Pair:
        inputs, targets = _around(1.0)(generator)
        inputs[2, 3] = value
        return inputs, targets

    return made


def _cancelling(size: float, left: float = 0.0) -> Callable[[torch.Generator], Pair]:
    """Pairs of equal positions with opposite targets, whose gradients cancel at weights of zero.

    A fraction ``left`` of their size remains.
    """

    def made(generator: torch.Generator) -> Pair:
        inputs, targets = (
            size * torch.randn(POSITIONS // 2, WIDTH, generator=generator).repeat(2, 1) for _ in range(2)
        )
        targets[POSITIONS // 2 :] *= left - 1
        return inputs, targets

    return made


def _repeated(size: float) -> Callable[[torch.Generator], Pair]:
    """One position again and again."""
    return lambda generator: tuple(x[:1].repeat(POSITIONS, 1) for x in _around(size)(generator))  # type: ignore[return-value]


POISONS: dict[str, Callable[[torch.Generator], Pair]] = {
    "ordinary": _around(1.0),
    "zero": lambda generator: (torch.zeros(POSITIONS, WIDTH), torch.zeros(POSITIONS, WIDTH)),
    "tiny": _around(1e-30),
    "large": _around(1e6),
    "huge: its square overflows": _around(1e30),
    "one value not a number": _one(float("nan")),
    "one value infinite": _one(float("inf")),
    "one value the largest float": _one(torch.finfo(torch.float32).max),
    "equal positions": _repeated(1e3),
    "positions that cancel, 1e2": _cancelling(1e2),
    "positions that cancel, 1e3": _cancelling(1e3),
    "positions that cancel, 1e5": _cancelling(1e5),
    "positions that cancel, 1e7": _cancelling(1e7),
    "positions that cancel but for 1e-6": _cancelling(1e5, 1e-6),
    "positions that cancel but for 2 %": _cancelling(1e5, 2e-2),
}
"""Records (inputs ``[T, d]``, targets ``[T, d]``) by what is wrong with them."""


def _linear() -> nn.Module:
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    nn.init.zeros_(model.weight)
    return model


def poison_task(name: str) -> Task:
    """Return a regression of each position, one of whose records is made by :data:`POISONS`."""
    generator = torch.Generator().manual_seed(4)
    inputs, targets = (torch.randn(RECORDS, POSITIONS, WIDTH, generator=generator) for _ in range(2))
    inputs[0], targets[0] = POISONS[name](generator)
    return Task(inputs, targets, _linear, [0])
