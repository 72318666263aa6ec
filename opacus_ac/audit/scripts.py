"""What people do with a private loader, step by step, and which of its releases come from one fresh draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import DataLoader

Batch = tuple[Tensor, ...]


class Loop(Protocol):
    """A private run in the hands of a script."""

    loader: DataLoader[Batch]

    @property
    def steps(self) -> int:
        """Number of releases so far."""

    def step(self, batch: Batch, *, fresh: bool = True) -> None:
        """Forward, backward, step; ``fresh``: the batch is a draw of its own, which no step has used."""

    def backward(self, batch: Batch, *, fresh: bool = True) -> None:
        """Forward and backward only."""


@dataclass(frozen=True)
class Script:
    """A way to use the loader.

    Attributes:
        name: what is done, in words.
        play: does it.
        ordinary: it is the documented way; to refuse it is an error.
        forward_only: it makes sense for a method without a backward pass.
        splits: it makes sense where logical batches come in several physical ones.
    """

    name: str
    play: Callable[[Loop], None]
    ordinary: bool = False
    forward_only: bool = True
    splits: bool = False

    def fits(self, settings: Mapping[str, Any]) -> bool:
        """Whether it makes sense with these settings of ``make_private``."""
        if settings.get("zeroth_order") is not None and not self.forward_only:
            return False
        return self.splits or settings.get("max_physical_batch_size") is None


def whole_passes(loop: Loop) -> None:
    """Pass after pass."""
    for _ in range(3):
        for batch in loop.loader:
            loop.step(batch)


def broken_off(loop: Loop) -> None:
    """Stop a pass in the middle, and begin another."""
    for _ in range(3):
        for batch in loop.loader:
            loop.step(batch)
            break


def skipped(loop: Loop) -> None:
    """Leave out every second batch."""
    for i, batch in enumerate(loop.loader):
        if i % 2:
            loop.step(batch)


def twice(loop: Loop) -> None:
    """Take two steps on each batch."""
    for batch in loop.loader:
        loop.step(batch)
        loop.step(batch, fresh=False)


def kept(loop: Loop) -> None:
    """Come back to a batch after others, and after another pass has begun."""
    first = next(iter(loop.loader))
    loop.step(first)
    for batch in loop.loader:
        loop.step(batch)
        loop.step(first, fresh=False)


def copied(loop: Loop) -> None:
    """Take steps on a copy of a batch that was used."""
    for batch in islice(loop.loader, 2):
        loop.step(batch)
        loop.step(tuple(part.clone() for part in batch), fresh=False)


def _three_steps_on_two(loop: Loop, loader: Iterable[Batch]) -> None:
    for batch in list(loader)[:2]:
        loop.step(batch)
        loop.step(batch, fresh=False)
        loop.step(batch, fresh=False)


def fetched_ahead(loop: Loop) -> None:
    """Take all batches from the loader, then three steps on each of the first two."""
    _three_steps_on_two(loop, loop.loader)


def other_loader(loop: Loop) -> None:
    """Put another loader around the private sampler, and take two steps on each of its batches."""
    for batch in islice(DataLoader(loop.loader.dataset, batch_sampler=loop.loader.batch_sampler), 3):
        loop.step(batch)
        loop.step(batch, fresh=False)


def fetched_by_another(loop: Loop) -> None:
    """Fetch all batches by another loader of the private sampler, then take three steps on each of the first two."""
    _three_steps_on_two(loop, DataLoader(loop.loader.dataset, batch_sampler=loop.loader.batch_sampler))


def accumulated(loop: Loop) -> None:
    """Go back through two batches before one step."""
    batches: Iterator[Batch] = iter(loop.loader)
    for first in batches:
        loop.backward(first)
        second = next(batches, None)
        if second is None:
            return
        loop.step(second)


def two_passes(loop: Loop) -> None:
    """Go back through the same batch twice before one step."""
    for batch in islice(loop.loader, 2):
        loop.backward(batch)
        loop.step(batch, fresh=False)


SCRIPTS = (
    Script("whole passes", whole_passes, ordinary=True, splits=True),
    Script("passes broken off", broken_off, ordinary=True),
    Script("batches left out", skipped, ordinary=True),
    Script("two steps on each batch", twice),
    Script("a batch kept", kept),
    Script("a copy of a batch", copied),
    Script("batches fetched ahead", fetched_ahead),
    Script("another loader around the sampler", other_loader),
    Script("batches that another loader fetched", fetched_by_another),
    Script("two batches before a step", accumulated, forward_only=False),
    Script("one batch twice before a step", two_passes, forward_only=False),
)
