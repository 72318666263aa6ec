"""The gate before the log of a ``Trainer``: released values and public constants pass, all others are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers.trainer_callback import CallbackHandler

_REMEDY = (
    "it has no noise. Leave it out. The released values are logged already (loss_bound= adds a noisy loss). Values of "
    "public data may be logged while evaluate() or predict() runs. If its values are public constants by your word, "
    "add the name to public_keys of your subclass of PrivateTrainer"
)


class _Logs(dict[str, Any]):
    """A log entry as callbacks see it. They may remove values, and add only values that the gate lets pass."""

    gate: ReleasedLog | None = None

    def __setitem__(self, name: str, value: Any) -> None:
        if self.gate is not None:
            self.gate.ask(name, value)
        super().__setitem__(name, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Add several values; the gate is asked about each."""
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Add a value where there is none; the gate is asked about it."""
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> _Logs:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class ReleasedHandler(CallbackHandler):
    """A callback handler whose ``on_log`` asks the gate. All ways of logging end there, ``Trainer.log`` included."""

    gate: ReleasedLog

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        """Hand the entry to the callbacks after a check that all of it is public."""
        self.gate.take(logs)
        shown = _Logs(logs)
        shown.gate = self.gate
        return super().on_log(args, state, control, shown, **kwargs)

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Call the callbacks, and check the log afterwards."""
        if event == "on_train_begin":
            self.gate.begin()
        result = super().call_event(event, args, state, control, **kwargs)
        self.gate.look()
        return result


class ReleasedLog:
    """Keeps values of private batches out of the log of a :class:`PrivateTrainer`.

    Args:
        trainer: the :class:`PrivateTrainer`.

    Guarantees:
        ``state.log_history`` holds only released values, learning rates, counters, means of noisy losses, names in
        ``public_keys``, and what was logged during an evaluation of public data. The same holds for
        ``trainer_state.json``, event files, progress bars and printed entries. Values are compared, so a loss without
        noise does not pass under the name of the noisy one.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._evaluating = self._writing = 0
        self._undo: list[Callable[[], None]] = []
        self.checking = False
        """Whether the check of the loss before training runs. It uses private records, so its logs are dropped."""
        self._taken: list[dict[str, Any]] = []
        self.values: Mapping[str, float] = {}
        self._rates: list[float] = []
        self._total, self._steps = 0.0, 0  # sum and number of noisy losses since training began
        self._logged_total, self._logged_steps = 0.0, 0  # the part of them that is in the log already
        handler = trainer.callback_handler
        handler.__class__ = type("ReleasedHandler", (ReleasedHandler, type(handler)), {"gate": self})

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Return a context in which public data are evaluated."""
        self._evaluating += 1
        try:
            yield
        finally:
            self._evaluating -= 1

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Return a context for code that writes released values only to an event file."""
        self._writing += 1
        try:
            yield
        finally:
            self._writing -= 1

    def watch(self, callback: Any) -> None:
        """Until :meth:`close`, let only log entries and released values into a ``TensorBoardCallback``'s event file."""
        writer = callback.tb_writer
        self._replace(callback, "on_log", self._let_through(callback.on_log))
        for name in dir(type(writer)):
            if name.startswith("add_"):
                self._replace(writer, name, self._ask_first(name, getattr(writer, name)))

    def close(self) -> None:
        """Give the event files their own methods back."""
        while self._undo:
            self._undo.pop()()

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        setattr(owner, name, function)
        self._undo.append(lambda: delattr(owner, name))

    def _let_through(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.writing():
                return function(*args, **kwargs)

        return call

    def _ask_first(self, method: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._writing:
                given = [*args, *kwargs.values()]
                name = next((value for value in given if isinstance(value, str)), method)
                self.ask(name, next((value for value in given if not isinstance(value, str)), None))
            with self.writing():
                return function(*args, **kwargs)

        return call

    def begin(self) -> None:
        """Accept the log of a new run, or of the checkpoint to resume from, as it is."""
        self._taken = [dict(entry) for entry in self._trainer.state.log_history]
        self._total, self._steps, self._logged_total, self._logged_steps = 0.0, 0, 0.0, 0

    def add_step(self, loss: float | None) -> None:
        """Note the learning rates of a step, and its noisy loss (None if no loss is released)."""
        rates = (group.get("lr") for group in self._trainer.private_optimizer.param_groups)
        self._rates = [float(rate) for rate in rates if rate is not None]
        self._total += math.nan if loss is None else loss
        self._steps += 1

    # ---------------------------------------------------------------- what is public

    def ask(self, name: str, value: Any) -> None:
        """Check that a value may be logged under this name.

        Raises:
            ValueError: If it may not. The log is put back as it was before.
        """
        if not self._is_public(name, value):
            self._restore()
            raise ValueError(f"{name} is logged while private batches are trained on: {_REMEDY}")

    def _is_public(self, name: str, value: Any) -> bool:
        if self._evaluating or name in self._trainer.public_keys:
            return True
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            return False
        return any(math.isclose(number, known, rel_tol=1e-3, abs_tol=1e-6) for known in self._known(name))

    def _known(self, name: str) -> Iterator[float]:
        """Yield the public values that have this name."""
        trainer = self._trainer
        if name in self.values:
            yield self.values[name]
        elif name == "epoch":
            yield trainer.state.epoch or 0.0
        elif name in ("step", "global_step"):
            yield trainer.state.global_step
        elif name == "learning_rate" and trainer.private_optimizer is not None:
            yield from self._rates  # those of the step: the scheduler has set the next ones by now
            yield from (float(group["lr"]) for group in trainer.private_optimizer.param_groups)
        elif name == "loss":
            yield (self._total - self._logged_total) / max(1, self._steps - self._logged_steps)
        elif name == "train_loss":
            yield self._total / max(1, self._steps)

    # ---------------------------------------------------------------- the log

    def take(self, logs: Mapping[str, Any]) -> None:
        """Check an entry that ``Trainer.log`` has just added to the history.

        Raises:
            ValueError: If a value of it may not be logged. The entry is removed.
        """
        self.look(but_last=True)
        for name, value in logs.items():
            self.ask(name, value)
        if "loss" in logs:
            self._logged_total, self._logged_steps = self._total, self._steps
        self._taken += [dict(entry) for entry in self._trainer.state.log_history[len(self._taken) :]]

    def look(self, *, but_last: bool = False, whole: bool = False) -> None:
        """Check that every entry of the history came through the gate.

        Args:
            but_last: leave out the last entry, which is being checked already.
            whole: compare all entries, not only their number and the last one.

        Raises:
            ValueError: If there is another entry. It is removed.
        """
        found = self._trainer.state.log_history
        wanted = len(self._taken)
        start = 0 if whole else max(0, wanted - 1)
        if self._taken[start:] == found[start:wanted] and len(found) - int(but_last) <= wanted:
            return
        known = [set(entry.items()) for entry in self._taken]
        new = [dict(e) for e in found if not any(_same(e, k) for k in known)]
        self._restore()
        names = sorted({str(name) for entry in new for name in entry} - {"step", "epoch"})
        raise ValueError(
            f"{', '.join(names) or 'an entry'} was put into state.log_history without being logged: {_REMEDY}"
        )

    def _restore(self) -> None:
        self._trainer.state.log_history[:] = [dict(entry) for entry in self._taken]


def _same(entry: Mapping[str, Any], known: set[tuple[str, Any]]) -> bool:
    try:
        return set(entry.items()) == known
    except TypeError:  # a value that cannot be hashed
        return False
