"""The accountant "vrdp": Rényi accounting whose cost per step does not grow with the length of the history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
from opacus.accountants import RDPAccountant

from opacus_ac.accounting.divergence import rdp_event
from opacus_ac.accounting.events import (
    Event,
    check_count,
    check_delta,
    check_noise_multiplier,
    check_sample_rate,
)
from opacus_ac.accounting.history import (
    HistorySnapshot,
    Run,
    append_run,
    check_event,
    checked_others,
    checked_runs,
    parsed_others,
    summed,
)
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, FloatArray, epsilon_from_rdp
from opacus_ac.accounting.rdp_table import RDPTable


class VariableRateRDPAccountant(RDPAccountant):  # type: ignore[misc, unused-ignore]
    """Rényi accountant for noise multipliers and sample rates that may change every step ("vrdp").

    A drop-in for Opacus's ``RDPAccountant``: same history, same state dict, more orders, and a running sum of the
    divergences, so that a step costs O(orders) and ``get_epsilon`` does not depend on the number of steps.

    Guarantees:
        Epsilon is never negative and never below the exact Rényi bound on its orders. The first 256 distinct
        ``(noise_multiplier, sample_rate)`` pairs are exact; rates of later ones are rounded up to a 1 % grid (see
        ``RDPTable``). ``history`` always keeps the true values. With rates or noise chosen from past releases the sum
        at one preset order is a valid privacy filter (see ``RenyiFilter``); the best order chosen afterwards is not.

    ``history`` holds Poisson steps and shuffled passes (which cost what a step at rate 1 costs). Events of other kinds
    have no such triple; they are in ``other_events``, and in the state dict under that name when there are any.

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
        self._others: dict[Event, int] = {}
        self._rdp: FloatArray = np.zeros_like(self._table.orders)
        super().__init__()  # assigns history = []

    @classmethod
    def mechanism(cls) -> str:
        """Name under which ``register`` makes this accountant known to Opacus."""
        return "vrdp"

    def __len__(self) -> int:
        """Number of runs of equal consecutive steps, as in Opacus's, and of distinct other events; 0 at first."""
        return len(self._runs) + len(self._others)

    @property
    def history(self) -> list[Run]:
        """Runs of equal consecutive steps: ``[(noise_multiplier, sample_rate, steps), ...]``, true values.

        Reading takes a snapshot that refuses to be changed in place. Assigning validates every run, drops runs of 0
        steps, joins equal neighbours and recomputes the divergences; if a run is invalid nothing changes.

        Raises:
            ValueError: If anything but triples of valid values is assigned.
        """
        return HistorySnapshot(self._runs)

    @history.setter
    def history(self, runs: Iterable[Sequence[Any]]) -> None:
        self._replace(checked_runs(runs), self._others)

    @property
    def other_events(self) -> dict[Event, int]:
        """Events that the triples of ``history`` cannot hold, and how often each happened; a copy.

        Assigning replaces them, leaves ``history`` alone and recomputes the divergences.

        Raises:
            ValueError: If anything but such events and counts is assigned; nothing changes then.
        """
        return dict(self._others)

    @other_events.setter
    def other_events(self, counts: Mapping[Event, int]) -> None:
        self._replace(self._runs, checked_others(counts))

    def counts(self) -> dict[Event, int]:
        """Return every event accounted and how often.

        A shuffled pass comes back as a Poisson step at rate 1, which costs the same.
        """
        counts = {
            Event(*pair): steps for pair, steps in summed(((run[0], run[1]), run[2]) for run in self._runs).items()
        }
        return {**counts, **self._others}

    def _replace(self, runs: list[Run], others: dict[Event, int]) -> None:
        """Take over a whole validated history."""
        self._table.forget()
        pairs = summed((self._table.resolve(run[0], run[1]), run[2]) for run in runs)
        rdp = self._table.total(pairs)
        for event, steps in others.items():
            rdp += steps * self._table.event_row(event)
        self._runs, self._others, self._rdp = runs, others, rdp

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Account one step.

        Args:
            noise_multiplier: ratio of the noise std (on the sum) to the L2 sensitivity of the release.
            sample_rate: probability with which each record entered the batch (never a realised batch size).

        Raises:
            ValueError: If a value is out of range; nothing is accounted then.
        """
        self._account(check_noise_multiplier(noise_multiplier), check_sample_rate(sample_rate), 1)

    def _account(self, noise: float, rate: float, steps: int) -> None:
        self._rdp += steps * self._table.row(self._table.resolve(noise, rate))
        append_run(self._runs, noise, rate, steps)

    def step_event(self, event: Event, steps: int = 1) -> None:
        """Account events of any kind; a shuffled pass counts as one step at rate 1.

        Args:
            event: what was released.
            steps: how many such events.

        Raises:
            ValueError: If ``event`` is not an ``Event``, or ``steps`` no count; nothing is accounted then.
        """
        check_event(event)
        if check_count(steps, "steps") == 0:
            return
        if event.is_plain:
            self._account(event.noise_multiplier, event.sample_rate, int(steps))
            return
        self._account_other(event, int(steps))

    def _account_other(self, event: Event, steps: int) -> None:
        self._rdp += steps * self._table.event_row(event)
        self._others[event] = self._others.get(event, 0) + steps

    def spent_rdp(self, order: float) -> float:
        """Return the Rényi divergence spent so far at one order, in nats.

        Args:
            order: above 1; one of ``DEFAULT_ALPHAS`` costs nothing, another is computed from all events.

        Raises:
            ValueError: If the order is out of range.
        """
        found = np.flatnonzero(self._table.orders == order)
        return float(self._rdp[found[0]]) if found.size else float(self._rdp_at([order])[0])

    def _rdp_at(self, orders: Sequence[float]) -> FloatArray:
        """Return exact divergences at other orders, [n]."""
        rdp = np.zeros(len(orders))
        for event, steps in self.counts().items():
            rdp += steps * rdp_event(event, orders)
        return rdp

    def get_privacy_spent(self, *, delta: float, alphas: Sequence[float] | None = None) -> tuple[float, float]:
        """Return the epsilon spent so far, and the Rényi order that gives it.

        Args:
            delta: target delta.
            alphas: Rényi orders to use instead of the default ones; the divergences are then recomputed exactly from
                the history, at a cost that grows with its number of distinct pairs.

        Returns:
            ``(epsilon, order)``; ``(0.0, 0.0)`` before the first step.

        Raises:
            ValueError: If ``delta`` is negative or an order is not above 1.
        """
        if not len(self):
            check_delta(delta)
            return 0.0, 0.0
        if alphas is None:
            return epsilon_from_rdp(self._rdp, self._table.orders, delta)
        return epsilon_from_rdp(self._rdp_at(alphas), alphas, delta)

    def get_epsilon(self, delta: float, alphas: Sequence[float] | None = None, **kwargs: Any) -> float:
        """Return the epsilon spent so far, under the adjacency of the events accounted (see ``ADJACENCY``).

        Args:
            delta: target delta.
            alphas: Rényi orders to use instead of the default ones.
            **kwargs: arguments meant for other accountants (Opacus's engine passes them on); ignored.

        Raises:
            ValueError: If ``delta`` is negative or an order is not above 1.
        """
        return self.get_privacy_spent(delta=delta, alphas=alphas)[0]

    def epsilon_after(self, event: Event, delta: float, steps: int = 1) -> float:
        """Return what epsilon would be after more events of one kind; the accountant does not change.

        Args:
            event: the event to come.
            delta: target delta.
            steps: how many such events.

        Raises:
            ValueError: If an argument is out of range.
        """
        check_event(event)
        if check_count(steps, "steps") == 0:
            return self.get_epsilon(delta)
        return epsilon_from_rdp(self._rdp_after(event, int(steps)), self._table.orders, delta)[0]

    def _rdp_after(self, event: Event, steps: int) -> FloatArray:
        after: FloatArray = self._rdp + steps * self._table.event_row(event, remember=False)
        return after

    def state_dict(self, destination: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return Opacus's state, and ``"other_events"`` (plain lists) if ``history`` cannot hold all events."""
        state: dict[str, Any] = super().state_dict(destination)
        if self._others:
            state["other_events"] = [[*astuple(event)[:-1], steps] for event, steps in self._others.items()]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Replace the history by a saved one.

        Args:
            state_dict: what ``state_dict`` returned; it is copied, not kept.

        Raises:
            ValueError: If it is empty, incomplete, invalid or of another accountant; nothing changes then.
        """
        theirs = state_dict.get("mechanism") if state_dict else None
        if theirs in ("rdp", "vrdp", "vpld") and theirs != self.mechanism() and "history" in state_dict:
            raise ValueError(
                f"state_dict of the {theirs!r} accountant cannot be loaded into {self.mechanism()!r}; its history can "
                "be taken over with accountant.history = state_dict['history']"
            )
        others = parsed_others(state_dict.get("other_events", [])) if state_dict else {}
        before, self._others = self._others, others  # the setter of history computes both
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self._others = before
            raise

    def get_optimizer_hook_fn(self, sample_rate: float) -> Callable[[Any], None]:
        """Return a hook for ``DPOptimizer.attach_step_hook`` that accounts each step.

        Args:
            sample_rate: rate to account when the optimizer does not say more. If the optimizer has an attribute
                ``current_event`` that holds an ``Event``, that event is accounted instead.

        Raises:
            ValueError: If several Poisson batches were accumulated into one step; the hook raises it. Opacus would
                account k batches at rate q as one at rate k q. A record can be drawn more than once, so that epsilon
                is too small.
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
