"""Callbacks of a run on the command line: progress on stderr, and an orderly end after a signal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """Ends a run with a checkpoint after the current step when SIGINT or SIGTERM arrives. A second one ends it at once.

    Attributes:
        signal: the signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Return a context in which signals are handled. Only the main thread can handle them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        print(
            "\nstopping after this step, with a checkpoint; a second signal stops at once (the step stays charged)",
            file=sys.stderr,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer for a checkpoint and the end of the run."""
        if self.signal is not None:
            control.should_save = control.should_training_stop = True


class StepLines(TrainerCallback):
    """Shows released values on stderr: a progress bar on a terminal, one line per log entry elsewhere.

    Args:
        trainer: the :class:`PrivateTrainer`.
    """

    _SHOWN = (("epsilon", "epsilon", ".3f"), ("loss", "noisy loss", ""), ("noisy_clip_rate", "clip rate", ".2f"),
              ("max_grad_norm", "C", ".3g"), ("eval_loss", "public loss", ".3f"))  # fmt: skip

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._bar: Any = None
        self._values: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the values of a log entry."""
        found = {**(logs or {}), **({"loss": str(self.trainer.running_loss)} if "loss" in (logs or {}) else {})}
        values = {title: format(found[key], form) for key, title, form in self._SHOWN if key in found}
        if values and state.max_steps:  # before the training there are no steps to count
            self._values |= values
            self._show(values, state)

    def _show(self, values: dict[str, str], state: Any) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.set_postfix(self._values)
        else:
            shown = "  ".join(f"{title} {value}" for title, value in values.items())
            print(f"step {state.global_step}/{state.max_steps}  {shown}", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the epsilon of the last step, which the log may have left out, and close the bar."""
        last = {"epsilon": f"{self.trainer.get_epsilon():.3f}"}
        if last["epsilon"] != self._values.get("epsilon"):
            self._values |= last
            self._show(last, state)
        if self._bar is not None:
            self._bar.close()
            self._bar = None
