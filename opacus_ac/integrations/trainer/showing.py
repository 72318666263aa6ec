"""Shows the noisy loss of a run as a running mean with its error, as far as people read it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

WINDOW = 20
"""Most steps in a running mean."""
NOISY = ("loss", "train_loss")
"""Log entries that have noise."""
_PRINTING = ("ProgressCallback", "PrinterCallback", "NotebookProgressCallback")


def with_error(value: float, error: float | None) -> str:
    """Return a number and its standard error, with the digits that the error leaves.

    >>> with_error(3.1416, 0.42), with_error(3.1416, 0.0271), with_error(31.4, 12.0), with_error(3.1416, None)
    ('3.1 ± 0.4', '3.14 ± 0.03', '31 ± 12', '3.1')
    """
    if error is None or not math.isfinite(error) or not math.isfinite(value):
        return f"{value:.2g}"
    if error == 0:
        return f"{value:.3g}"
    decimals = -math.floor(math.log10(error))
    decimals -= int(round(error, decimals) >= 10 ** (1 - decimals))  # 0.96 is shown as 1
    decimals = max(0, decimals)
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


class RunningLoss:
    """The mean of the noisy losses of the last steps, and the std of the noise that is left in it."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def add(self, loss: float | None, std: float | None) -> None:
        """Take the loss that a step released, with the std of its noise; None where it released none."""
        if loss is not None and std is not None and math.isfinite(loss):
            self._steps.append((loss, std))

    def __str__(self) -> str:
        if not self._steps:
            return "not released"
        losses, stds = zip(*self._steps, strict=True)
        error = math.sqrt(math.fsum(std**2 for std in stds)) / len(stds)
        return with_error(math.fsum(losses) / len(losses), error)


def _readable(logs: Mapping[str, Any], running: RunningLoss) -> dict[str, Any]:
    """Return a log entry with the running mean in place of the noisy loss."""
    return {name: str(running) if name in NOISY else value for name, value in logs.items()}


class _Readable:
    """Before a class of transformers that prints log entries: its lines have the running mean of the noisy loss."""

    running: RunningLoss

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        """Print the entry."""
        return super().on_log(args, state, control, _readable(logs or {}, self.running), **kwargs)  # type: ignore[misc]


def show_released(callbacks: Iterable[Any]) -> RunningLoss:
    """Have the printing callbacks of a Trainer show the running mean of the noisy loss, and return this mean.

    Callbacks of the user's own stay as they are.
    """
    running = RunningLoss()
    for callback in callbacks:
        kind = type(callback)
        if kind.__name__ in _PRINTING and kind.__module__.startswith("transformers."):
            callback.__class__ = type(kind.__name__, (_Readable, kind), {})
            callback.running = running
    return running
