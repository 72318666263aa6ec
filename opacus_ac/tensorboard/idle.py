"""How long ago a run wrote something. The times of its events do not tell: they are all the same, on purpose."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from pathlib import Path


class Idle:
    """Looks at when the event files of a run changed, or, where there are none to see, at when its curves grew.

    Args:
        logdir: TensorBoard's folder; None or empty if it reads another source.
        clock: returns the time in seconds.
    """

    def __init__(self, logdir: str | None, clock: Callable[[], float] = time.time) -> None:
        self._logdir, self._clock = logdir, clock
        self._seen: dict[str, tuple[Hashable, float]] = {}

    def seconds(self, run: str, newest: Hashable) -> float:
        """Return for how many seconds a run has been silent, as far as is known.

        Args:
            run: name of a run that TensorBoard has read: its folder below ``logdir``.
            newest: anything that changes when the run writes.
        """
        now, written = self._clock(), self._written(run)
        if written is not None:
            return max(0.0, now - written)
        before, since = self._seen.get(run, (None, now))
        if before != newest:
            since = now
        self._seen[run] = (newest, since)
        return now - since

    def _written(self, run: str) -> float | None:
        """Return when an event file of the run was last written to; None where there is none to see."""
        if not self._logdir:
            return None
        try:
            return max(path.stat().st_mtime for path in Path(self._logdir, run).glob("*tfevents*"))
        except (OSError, ValueError):
            return None
