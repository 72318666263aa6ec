"""The gate before the logs and metrics of a Lightning ``Trainer``: releases pass, other values are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer

_COUNTERS = ("epoch", "step", "global_step", "trainer/global_step")
_RATES = ("lr", "learning_rate", "momentum", "weight_decay")
_DICTS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


class _Watched(dict[str, Any]):
    """A dict of metrics that asks the gate before it takes a value. A copy of it is an ordinary dict."""

    ask: Callable[[str, Any], None] | None = None

    def __setitem__(self, name: str, value: Any) -> None:
        if self.ask is not None:
            self.ask(name, value)
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

    def __ior__(self, other: Any) -> _Watched:  # type: ignore[override, misc]
        self.update(other)
        return self

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class ReleasedOnly:
    """Refuses values of private batches that a ``fit`` would log, show or monitor, in any training hook.

    The gate covers the result collection (``self.log``, ``self.log_dict``, ``pl_module.log`` of callbacks), the loggers
    (``log_metrics`` and other ``log_*``), their ``experiment`` (``add_*``, ``log*``), the dicts of metrics that
    checkpoints and early stopping monitor, and the progress bar. Hooks of validation and sanity checking may log
    anything, because their data are public.

    Args:
        trainer: the ``lightning.Trainer``.
        optimizer: the private optimizer, whose learning rates are public.
        public_keys: further names whose values the user declares public.

    Guarantees:
        While a training hook runs, a value passes only if its name is in ``public_keys``, if it is a counter of steps
        or epochs or a number of the optimizer (such as the learning rate) under its usual name, or if it is logged
        within :meth:`released`.
    """

    def __init__(self, trainer: Any, optimizer: AdaptiveClipDPOptimizer, public_keys: Iterable[str] = ()) -> None:
        self._trainer, self._optimizer = trainer, optimizer
        self._public_keys = frozenset(public_keys)
        self._open = 0
        self._passed: set[str] = set()  # names of training values in the result collection
        self._undo: list[Callable[[], None]] = []
        self._watched: set[int] = set()
        self._started = False

    # ---------------------------------------------------------------- what is public

    @contextmanager
    def released(self) -> Iterator[None]:
        """Return a context for values that are released, or that the gate was asked about already."""
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def _public_stage(self) -> bool:
        trainer = self._trainer
        return bool(trainer.validating or trainer.sanity_checking or trainer.testing or trainer.predicting)

    def ask(self, name: str, value: Any, way: str = "logs") -> None:
        """Check that a value may be logged under this name.

        Args:
            name: the name.
            value: the value.
            way: the verb for the message.

        Raises:
            ValueError: If it may not.
        """
        if self._open or self._public_stage() or name in self._public_keys or self._is_known(name, value):
            return
        hook = getattr(self._trainer.lightning_module, "_current_fx_name", None) or "the training"
        raise ValueError(
            f"{hook} {way} {name} of a private batch without noise: leave it out. PrivacyCallback logs the released "
            "values (loss_bound= in make_private adds a noisy loss). Metrics of public data belong into "
            f"validation_step. For a public constant, by your word, use PrivacyCallback(public_keys=[{name!r}])"
        )

    def _is_known(self, name: str, value: Any) -> bool:
        """Say whether the value is the counter, or the number of the optimizer, that its name stands for."""
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):
            return False
        if name in _COUNTERS:
            steps = (self._trainer.global_step, self._optimizer.steps_taken, self._trainer.fit_loop.total_batch_idx)
            epoch = self._trainer.current_epoch
            return number in {epoch, epoch + 1, *steps, *(step + 1 for step in steps)}
        if name.replace("/", "-").split("-")[0] not in _RATES:
            return False
        return any(math.isclose(number, rate, rel_tol=1e-6) for rate in self._rates())

    def _rates(self) -> Iterator[float]:
        multiplier = 1.0 if self._optimizer.control is None else self._optimizer.control.multiplier
        for config in self._trainer.lr_scheduler_configs:
            yield from getattr(config.scheduler, "_last_lr", ())
        for group in self._optimizer.param_groups:
            yield group["lr"] * multiplier
            numbers = [n for n in group.values() if isinstance(n, int | float)]
            yield from (float(n) for n in (*numbers, *group.get("betas", ())))

    # ---------------------------------------------------------------- the ways out

    def watch(self) -> None:
        """Put the gate before every way of logging. Call it again for loggers and metrics that were added since."""
        connector, results = self._trainer._logger_connector, self._trainer.fit_loop.epoch_loop._results
        if id(results) not in self._watched:
            self._watched.add(id(results))
            self._replace(results, "log", self._before_results(results.log))
            self._replace(connector, "reset_metrics", self._after(connector.reset_metrics, self._watch_dicts))
            for name in (
                "update_train_step_metrics",
                "update_train_epoch_metrics",
            ):  # of values that passed
                self._replace(connector, name, self._let_through(getattr(connector, name)))
            bar = self._trainer.progress_bar_callback
            if bar is not None:
                self._replace(bar, "get_metrics", self._after_bar(bar.get_metrics))
        self._watch_dicts()
        for logger in self._trainer.loggers:
            if id(logger) not in self._watched:
                self._watched.add(id(logger))
                self._watch_methods(logger, ("log_",))
                self._watch_methods(getattr(logger, "experiment", None), ("log", "add_"))

    def start(self) -> None:
        """Note that private batches follow. Hyperparameters and graphs are logged before this, and pass."""
        self._started = True

    def close(self) -> None:
        """Give the watched objects their own methods back."""
        while self._undo:
            self._undo.pop()()
        self._watched.clear()

    def _replace(self, owner: Any, name: str, function: Any) -> None:
        """Replace a method of an object until :meth:`close`."""
        setattr(owner, name, function)
        self._undo.append(lambda: delattr(owner, name))

    def _before_results(self, log: Callable[..., None]) -> Callable[..., None]:
        def ask(fx: str, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            self.ask(name, value)
            self._passed |= {name, f"{name}_step", f"{name}_epoch"}
            with self.released():
                log(fx, name, value, *args, **kwargs)

        return ask

    def _let_through(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.released():
                return function(*args, **kwargs)

        return call

    def _after(self, function: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            then()
            return result

        return both

    def _after_bar(self, get_metrics: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            shown = get_metrics(*args, **kwargs)
            for name in shown.keys() - self._trainer.progress_bar_metrics.keys() - {"v_num"}:
                self.ask(name, shown[name], "shows")
            return shown

        return ask

    def _watch_dicts(self) -> None:
        connector = self._trainer._logger_connector
        for name in _DICTS:
            held = getattr(connector, name)
            if not isinstance(held, _Watched):
                watched = _Watched(held)
                watched.ask = self._ask_metric
                setattr(connector, name, watched)

                def undo(name: str = name) -> None:
                    setattr(connector, name, dict(getattr(connector, name)))

                self._undo.append(undo)

    def _ask_metric(self, name: str, value: Any) -> None:
        if name not in self._passed:
            self.ask(name, value, "sets")

    def _watch_methods(self, owner: Any, prefixes: tuple[str, ...]) -> None:
        """Ask before every call of a method whose name has one of the prefixes, of a logger or its experiment."""
        for name in dir(type(owner)) if owner is not None else ():
            method = getattr(owner, name, None) if name.startswith(prefixes) else None
            if callable(method):
                self._replace(owner, name, self._before_method(name, method))

    def _before_method(self, method_name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if self._started or method_name == "log_metrics":
                for name, value in _named(method_name, args, kwargs):
                    self.ask(name, value)
            with self.released():
                return method(*args, **kwargs)

        return ask


def _named(method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the names and values that a call of a logger, or of its experiment, would log."""
    given = [*args, *kwargs.values()]
    for value in given:
        if isinstance(value, Mapping):
            return [(str(name), item) for name, item in value.items()]
    texts = [value for value in given if isinstance(value, str)]
    numbers = [value for value in given if not isinstance(value, str)]
    return [(texts[0] if texts else method, numbers[0] if numbers else None)]
