"""Passes over the sampler: what each has announced, and which of it has come."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from opacus_ac.sampling.delivery import Draw

_UNKNOWN = -1
"""Number of records of a part that another loader makes, until it comes."""


@dataclass(frozen=True)
class Worker:
    """A process that puts batches together for a loader.

    Attributes:
        process: its process id.
        number: its number among the workers of the loader.
        workers: how many there are; they take batches in turns.
    """

    process: int
    number: int
    workers: int


class Pass:
    """One iteration over the sampler: what it has announced, and what of that has come.

    Args:
        number: number of the pass.
        own: whether our own loader iterates.
    """

    def __init__(self, number: int, *, own: bool) -> None:
        self.number, self.own = number, own
        self.announced: deque[Draw] = deque()
        self.ended = False
        self.is_split = self.is_mixed_up = False
        self._latest: Draw | None = None
        self._arrived = 0
        self._taken: dict[int, Draw] = {}
        self._places = 0
        self._workers: dict[int, tuple[int, int]] = {}

    @property
    def is_within_a_batch(self) -> bool:
        """Whether parts of a logical batch are still to come."""
        return self.is_split and not self.ended and self._latest is not None and not self._latest.last

    def announce(self, draw: Draw) -> None:
        """Note a physical batch that will come."""
        self.announced.append(draw)
        self._latest = None if draw.part else draw

    def split(self, last: bool) -> None:
        """Announce the next part of the logical batch that was announced last; its parts come in its stead."""
        self.is_split = True
        if self._latest is None:
            return
        if self._latest.records != _UNKNOWN:  # not split yet
            if not self.announced or self.announced[-1] is not self._latest:
                self._latest = None  # what is split here is a batch of another pass
                return
            self.announced.pop()
            self._latest = replace(self._latest, records=_UNKNOWN, last=last)
        else:
            self._latest = replace(self._latest, part=self._latest.part + 1, last=last)
        self.announced.append(self._latest)

    def take(self, worker: Worker | None) -> Draw | None:
        """Return the draw of a batch that has just been put together; None where that is not known."""
        if worker is None:
            place, self._arrived = self._arrived, self._arrived + 1
        else:
            process, count = self._workers.get(worker.number, (worker.process, 0))
            if process != worker.process or not (self.announced or self._taken or self._places):
                return None  # of workers of another loader, or left over from the pass before
            self._workers[worker.number] = process, count + 1
            place = worker.number + worker.workers * count
        while self.announced and self._places <= place:
            self._taken[self._places] = self.announced.popleft()
            self._places += 1
        return self._taken.pop(place, None)
