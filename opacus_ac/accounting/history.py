"""The history of an accountant: its checks, and its form in a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from opacus_ac.accounting.events import Event, check_count, check_gaussian, check_noise_multiplier, check_sample_rate

Run = tuple[float, float, int]  # (noise_multiplier, sample_rate, steps)
_Key = TypeVar("_Key")


def _refuse_mutation(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
    raise TypeError(
        "accountant.history is a snapshot: a change made in place would not be accounted. Call accountant.step(...) or "
        "assign a whole list: accountant.history = [(noise_multiplier, sample_rate, steps), ...]"
    )


class HistorySnapshot(list[Run]):
    """A list that refuses to change; copies and pickles of it are plain lists."""

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    append = extend = insert = pop = remove = clear = sort = reverse = _refuse_mutation
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse_mutation


def check_event(event: Event) -> None:
    """Raise ``ValueError`` unless it is an ``Event``, of Gaussian noise."""
    if not isinstance(event, Event):
        raise ValueError(f"event={event!r} must be an opacus_ac.accounting.Event")
    check_gaussian(event)


def checked_runs(runs: Iterable[Sequence[Any]]) -> list[Run]:
    """Return validated runs, as plain floats and ints, without empty runs and with equal neighbours joined."""
    checked: list[Run] = []
    for index, run in enumerate(runs):
        try:
            noise_multiplier, sample_rate, count = run
        except (TypeError, ValueError):
            raise ValueError(f"history[{index}]={run!r} must be (noise_multiplier, sample_rate, steps)") from None
        noise, rate = check_noise_multiplier(noise_multiplier), check_sample_rate(sample_rate)
        steps = check_count(count, f"history[{index}] steps")
        if steps:
            append_run(checked, noise, rate, steps)
    return checked


def append_run(runs: list[Run], noise: float, rate: float, steps: int) -> None:
    """Add steps at the end, joined to the last run if it is equal."""
    if runs:
        last_noise, last_rate, last_steps = runs[-1]
        if last_noise == noise and last_rate == rate:
            runs[-1] = (noise, rate, last_steps + steps)
            return
    runs.append((noise, rate, steps))


def summed(counts: Iterable[tuple[_Key, int]]) -> dict[_Key, int]:
    """Return the counts by key, in the order in which the keys come first."""
    total: dict[_Key, int] = {}
    for key, steps in counts:
        total[key] = total.get(key, 0) + steps
    return total


def checked_others(counts: Mapping[Event, int]) -> dict[Event, int]:
    """Return validated counts of events that no triple can hold, without zeros."""
    checked: dict[Event, int] = {}
    for event, count in dict(counts).items():
        check_event(event)
        if event.is_plain:
            raise ValueError(f"other_events holds {event!r}: steps of this kind belong to history")
        if steps := check_count(count, f"other_events[{event!r}]"):
            checked[event] = steps
    return checked


def parsed_others(rows: Iterable[Sequence[Any]]) -> dict[Event, int]:
    """Return the events in the plain lists of a state dict."""
    counts: list[tuple[Event, int]] = []
    for index, row in enumerate(rows):
        try:
            *values, count = row
            counts.append((Event(*values), check_count(count, f"other_events[{index}] steps")))
        except TypeError:
            raise ValueError(
                f"other_events[{index}]={row!r} must be [noise_multiplier, sample_rate, sampling, dataset_size, "
                "max_batch_size, steps]"
            ) from None
    return checked_others(summed(counts))
