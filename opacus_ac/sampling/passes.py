"""Passes over the sampler: the batches that each pass has announced, and those that have arrived."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from opacus_ac.sampling.delivery import Draw

_UNKNOWN = -1
"""Number of records of a part that another loader makes, until the part arrives."""


@dataclass(frozen=True)
class Worker:
    """A worker process of a loader.

    Attributes:
        process: its process id.
        number: its number among the workers of the loader.
        workers: number of workers of the loader. They take batches in turns.
    """

    process: int
    number: int
    workers: int


class Pass:
    """One iteration over the sampler, with the batches that were announced and those that have arrived.

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
        """Note a physical batch that will arrive."""
        self.announced.append(draw)
        self._latest = None if draw.part else draw

    def split(self, last: bool) -> None:
        """Announce the next part of the logical batch that was announced last. Its parts arrive instead of it."""
        self.is_split = True
        if self._latest is None:
            return
        if self._latest.records != _UNKNOWN:  # not split yet
            if not self.announced or self.announced[-1] is not self._latest:
                self._latest = None  # the batch that is being split is of another pass
                return
            self.announced.pop()
            self._latest = replace(self._latest, records=_UNKNOWN, last=last)
        else:
            self._latest = replace(self._latest, part=self._latest.part + 1, last=last)
        self.announced.append(self._latest)

    def take(self, worker: Worker | None) -> Draw | None:
        """Return the draw of a batch that has just been collated; None if it is unknown.

        Args:
            worker: the worker that collated it; None for this process.
        """
        if worker is None:
            place, self._arrived = self._arrived, self._arrived + 1
        else:
            process, count = self._workers.get(worker.number, (worker.process, 0))
            if process != worker.process or not (self.announced or self._taken or self._places):
                return None  # a batch of another loader's workers, or one left over from the pass before
            self._workers[worker.number] = process, count + 1
            place = worker.number + worker.workers * count
        while self.announced and self._places <= place:
            self._taken[self._places] = self.announced.popleft()
            self._places += 1
        return self._taken.pop(place, None)
