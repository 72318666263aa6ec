"""The accountant "vrdp": Rényi accounting whose cost per step does not grow with the length of the history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from opacus.accountants import RDPAccountant, create_accountant, register_accountant

from opacus_ac.accounting.events import (
    Event,
    check_count,
    check_delta,
    check_noise_multiplier,
    check_sample_rate,
)
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, FloatArray, epsilon_from_rdp, rdp_poisson_gaussian
from opacus_ac.accounting.table import RDPTable

Run = tuple[float, float, int]  # (noise_multiplier, sample_rate, steps)


def _refuse_mutation(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise TypeError(
        "accountant.history is a snapshot: a change made in place would not be accounted. Call accountant.step(...) or "
        "assign a whole list: accountant.history = [(noise_multiplier, sample_rate, steps), ...]"
    )


class _HistorySnapshot(list[Run]):
    """A list that refuses to change; copies and pickles of it are plain lists."""

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    append = extend = insert = pop = remove = clear = sort = reverse = _refuse_mutation
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse_mutation


class VariableRateRDPAccountant(RDPAccountant):  # type: ignore[misc, unused-ignore]
    """Rényi accountant for noise multipliers and sample rates that may change every step ("vrdp").

    A drop-in for Opacus's ``RDPAccountant``: same history, same state dict, more orders, and a running sum of the
    divergences, so that a step costs O(orders) and ``get_epsilon`` does not depend on the number of steps.

    Guarantees:
        Epsilon is never negative and never below the exact Rényi bound on its orders. The first 256 distinct
        ``(noise_multiplier, sample_rate)`` pairs are exact; rates of later ones are rounded up to a 1 % grid (see
        ``RDPTable``). ``history`` always keeps the true values. With rates or noise chosen from past releases the sum is
        a valid privacy filter (stop before a preset budget is exceeded), not an odometer.

    References:
        arXiv 1908.10530 (subsampled Gaussian), 1905.09982 theorem 21 (conversion), 2008.11193 and 2103.01379
        (privacy filters).

    >>> accountant = VariableRateRDPAccountant()
    >>> for rate in (0.01, 0.012, 0.014):
    ...     accountant.step(noise_multiplier=1.0, sample_rate=rate)
    >>> round(accountant.get_epsilon(delta=1e-5), 3)
    1.06
    """

    DEFAULT_ALPHAS: Sequence[float] = DEFAULT_ORDERS.tolist()

    def __init__(self) -> None:
        self._table = RDPTable(DEFAULT_ORDERS)
        self._runs: list[Run] = []
        self._rdp: FloatArray = np.zeros_like(self._table.orders)
        super().__init__()  # assigns history = []

    @classmethod
    def mechanism(cls) -> str:
        """Name under which ``register`` makes this accountant known to Opacus."""
        return "vrdp"

    def __len__(self) -> int:
        """Number of runs of equal consecutive steps, as in Opacus's RDP accountant; 0 before the first step."""
        return len(self._runs)

    @property
    def history(self) -> list[Run]:
        """Runs of equal consecutive steps: ``[(noise_multiplier, sample_rate, steps), ...]``, true values.

        Reading takes a snapshot that refuses to be changed in place. Assigning validates every run, drops runs of 0
        steps, joins equal neighbours and recomputes the divergences; if a run is invalid nothing changes.

        Raises:
            ValueError: On assignment of anything but triples of valid values.
        """
        return _HistorySnapshot(self._runs)

    @history.setter
    def history(self, runs: Iterable[Sequence[Any]]) -> None:
        checked = _checked_runs(runs)
        self._table.forget()
        counts: dict[tuple[float, float], int] = {}
        for noise_multiplier, sample_rate, steps in checked:
            pair = self._table.resolve(noise_multiplier, sample_rate)
            counts[pair] = counts.get(pair, 0) + steps
        self._rdp = self._table.total(counts)
        self._runs = checked

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Account one step.

        Args:
            noise_multiplier: std of the noise on the sum, over the L2 sensitivity of the release.
            sample_rate: probability with which each record entered the batch (never a realised batch size).

        Raises:
            ValueError: If a value is out of range; nothing is accounted then.
        """
        noise, rate = check_noise_multiplier(noise_multiplier), check_sample_rate(sample_rate)
        self._rdp += self._table.row(self._table.resolve(noise, rate))
        _append_run(self._runs, noise, rate, 1)

    def step_event(self, event: Event) -> None:
        """Account one event; a shuffled pass counts as one step at rate 1.

        Raises:
            ValueError: If ``event`` is not an ``Event``.
        """
        _check_event(event)
        self.step(noise_multiplier=event.noise_multiplier, sample_rate=event.sample_rate)

    def get_privacy_spent(self, *, delta: float, alphas: Sequence[float] | None = None) -> tuple[float, float]:
        """Epsilon spent so far, and the Rényi order that gives it.

        Args:
            delta: target delta.
            alphas: Rényi orders to use instead of the default ones; the divergences are then recomputed exactly from
                the history, at a cost that grows with its number of distinct pairs.

        Returns:
            ``(epsilon, order)``; ``(0.0, 0.0)`` before the first step.

        Raises:
            ValueError: If ``delta`` is negative or an order is not above 1.
        """
        if not self._runs:
            check_delta(delta)
            return 0.0, 0.0
        if alphas is None:
            return epsilon_from_rdp(self._rdp, self._table.orders, delta)
        counts: dict[tuple[float, float], int] = {}
        for noise_multiplier, sample_rate, steps in self._runs:
            counts[noise_multiplier, sample_rate] = counts.get((noise_multiplier, sample_rate), 0) + steps
        rdp = np.zeros(len(alphas))
        for (noise_multiplier, sample_rate), steps in counts.items():
            rdp += steps * rdp_poisson_gaussian(noise_multiplier, sample_rate, alphas)
        return epsilon_from_rdp(rdp, alphas, delta)

    def get_epsilon(self, delta: float, alphas: Sequence[float] | None = None, **kwargs: Any) -> float:
        """Epsilon spent so far, under the adjacency of the events accounted (see ``ADJACENCY``).

        Args:
            delta: target delta.
            alphas: Rényi orders to use instead of the default ones.
            **kwargs: arguments meant for other accountants (Opacus's engine passes them on); ignored.

        Raises:
            ValueError: If ``delta`` is negative or an order is not above 1.
        """
        return self.get_privacy_spent(delta=delta, alphas=alphas)[0]

    def epsilon_after(self, event: Event, delta: float, steps: int = 1) -> float:
        """What epsilon would be after more events of one kind; the accountant does not change.

        Args:
            event: the event to come.
            delta: target delta.
            steps: how many such events.

        Raises:
            ValueError: If an argument is out of range.
        """
        _check_event(event)
        if check_count(steps, "steps") == 0:
            return self.get_epsilon(delta)
        pair = self._table.resolve(event.noise_multiplier, event.sample_rate, remember=False)
        return epsilon_from_rdp(self._rdp + int(steps) * self._table.row(pair), self._table.orders, delta)[0]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the history by a saved one.

        Args:
            state_dict: what ``state_dict`` returned; it is copied, not kept.

        Raises:
            ValueError: If it is empty, incomplete, invalid or of another accountant; nothing changes then.
        """
        if state_dict and "history" in state_dict and state_dict.get("mechanism") == "rdp":
            raise ValueError(
                "state_dict of the 'rdp' accountant cannot be loaded into 'vrdp'; its history can be taken over with "
                "accountant.history = state_dict['history']"
            )
        super().load_state_dict(state_dict)

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Any], None]:
        """A hook for ``DPOptimizer.attach_step_hook`` that accounts each step.

        Args:
            sample_rate: rate to account when the optimizer does not say more. If the optimizer has an attribute
                ``current_event`` that holds an ``Event``, that event is accounted instead.

        Raises:
            ValueError: From the hook, if several Poisson batches were accumulated into one step. Opacus would account
                k batches at rate q as one at rate k q; but a record can be drawn more than once, and that reports too
                small an epsilon.
        """
        rate = check_sample_rate(sample_rate)

        def hook_fn(optimizer: Any) -> None:
            event = getattr(optimizer, "current_event", None)
            if isinstance(event, Event):
                self.step_event(event)
                return
            batches = optimizer.accumulated_iterations
            if batches > 1:
                raise ValueError(
                    f"accumulated_iterations={batches}: {batches} sampled batches in one step are not one batch at "
                    f"rate {batches} * {rate}. Make the sampled batch larger and split it with max_physical_batch_size "
                    "or opacus.utils.batch_memory_manager.BatchMemoryManager"
                )
            self.step(noise_multiplier=optimizer.noise_multiplier, sample_rate=rate)

        return hook_fn


def register() -> None:
    """Make "vrdp" known to Opacus, so that ``create_accountant("vrdp")`` works; calling it again changes nothing.

    Raises:
        ValueError: If another class already has that name.
    """
    name = VariableRateRDPAccountant.mechanism()
    try:
        known = type(create_accountant(name))
    except ValueError:
        known = None
    if known is not VariableRateRDPAccountant:
        register_accountant(name, VariableRateRDPAccountant)


def _check_event(event: Event) -> None:
    if not isinstance(event, Event):
        raise ValueError(f"event={event!r} must be an opacus_ac.accounting.Event")


def _checked_runs(runs: Iterable[Sequence[Any]]) -> list[Run]:
    """Validated runs, as plain floats and ints, without empty runs and with equal neighbours joined."""
    checked: list[Run] = []
    for index, run in enumerate(runs):
        try:
            noise_multiplier, sample_rate, count = run
        except (TypeError, ValueError):
            raise ValueError(f"history[{index}]={run!r} must be (noise_multiplier, sample_rate, steps)") from None
        noise, rate = check_noise_multiplier(noise_multiplier), check_sample_rate(sample_rate)
        steps = check_count(count, f"history[{index}] steps")
        if steps:
            _append_run(checked, noise, rate, steps)
    return checked


def _append_run(runs: list[Run], noise: float, rate: float, steps: int) -> None:
    """Add steps at the end, joined to the last run if it is equal."""
    if runs:
        last_noise, last_rate, last_steps = runs[-1]
        if last_noise == noise and last_rate == rate:
            runs[-1] = (noise, rate, last_steps + steps)
            return
    runs.append((noise, rate, steps))
