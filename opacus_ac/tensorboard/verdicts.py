"""What the curves of a run say, in words. Pure functions of the privacy record and of released curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from opacus_ac.release.running_mean import WINDOW, with_error

Curves = Mapping[str, list[list[Any]]]
"""``[steps, values]`` by the name of the tag, without "privacy/"."""

SILENT = 180.0
"""Seconds without new data after which a run is not called running."""
CLEAR = 3.0
"""Errors by which two means must differ to be called different."""
WIDEST = 0.1
"""Largest error of the mean clip rate at which it is judged: the half width of the band by default."""


class Verdict(NamedTuple):
    """One sentence about a run; ``level`` is "good", "note", "warning" or "bad"."""

    level: str
    text: str


class Judgement(NamedTuple):
    """What holds of a run: its state ("waiting", "running", "silent", "ended", "used up") and the verdicts on it."""

    state: str
    verdicts: list[Verdict]


def judge(meta: Mapping[str, Any], curves: Curves, idle: float | None = None) -> Judgement:
    """Return the state of a run and what its curves say.

    Args:
        meta: the privacy record.
        curves: the curves, as the page gets them.
        idle: seconds since the run wrote something; None if that is not known.
    """
    if "unreadable" in meta:
        return Judgement("unknown", [])
    state, about = _state(meta, curves, idle)
    found = [about, *_privacy(meta, curves), *_clipping(curves), *_loss(curves)]
    return Judgement(state, found)


def last(curves: Curves, name: str) -> tuple[int, Any] | None:
    """Return the last (step, value) of a curve, or None."""
    steps, values = curves.get(name, [[], []])
    return (steps[-1], values[-1]) if steps else None


def held(curves: Curves, name: str, step: int) -> float | None:
    """Return the value at ``step`` of a curve that has points only where it changes."""
    found = None
    for at, value in zip(*curves.get(name, [[], []]), strict=True):
        if at > step and found is not None:
            break
        found = value
    return found if isinstance(found, float | int) else None


def _state(meta: Mapping[str, Any], curves: Curves, idle: float | None) -> tuple[str, Verdict]:
    steps = [column[0][-1] for column in curves.values() if column[0]]
    step, remaining = max(steps, default=0), last(curves, "remaining_steps")
    left = remaining[1] if remaining else None
    if left == 0:
        epsilon, target = last(curves, "epsilon"), last(curves, "epsilon_target")
        spent = f": epsilon {epsilon[1]:.4g} of {target[1]:.4g}" if epsilon and target else ""
        return "used up", Verdict("good", f"the budget is used up{spent}, after step {step}")
    if meta.get("ended"):
        rest = f"; {left:.0f} more steps fit the budget" if isinstance(left, float | int) else ""
        return "ended", Verdict("note", f"ended after step {step}{rest}")
    if idle is not None and idle >= SILENT:
        return "silent", Verdict(
            "warning", f"no data for {_span(idle)}: the run was stopped, or a step takes this long"
        )
    if step == 0:
        return "waiting", Verdict("note", "no step yet: the first release comes after the first batch")
    return "running", Verdict("good", f"running, step {step}")


def _span(seconds: float) -> str:
    """Return a time in the largest unit of which it has two.

    >>> _span(185), _span(7300), _span(400_000)
    ('3 min', '2 h', '4 days')
    """
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // 1440} days"


def _privacy(meta: Mapping[str, Any], curves: Curves) -> Iterator[Verdict]:
    epsilon = last(curves, "epsilon")
    if meta.get("private") is not True or (epsilon and epsilon[1] == "infinity"):
        yield Verdict("bad", "not private: no finite epsilon holds")


def _clipping(curves: Curves) -> Iterator[Verdict]:
    """Say whether the running mean of the clip rate is where it is wanted."""
    mean, wanted = last(curves, "noisy_clip_rate_mean"), last(curves, "target_clip_rate")
    if mean is None or not isinstance(mean[1], float | int):
        return
    error = held(curves, "noisy_clip_rate_mean_std", mean[0])
    shown = with_error(mean[1], error)
    if error is None or error > WIDEST:
        yield Verdict("note", f"the clip rate is too noisy to say whether C follows the norms ({shown})")
        return
    if wanted is None:
        yield Verdict("note", f"clip rate {shown}")
        return
    low, high = last(curves, "clip_rate_low"), last(curves, "clip_rate_high")
    band = (low[1] if low else wanted[1] - WIDEST, high[1] if high else wanted[1] + WIDEST)
    below = _trailing(curves["noisy_clip_rate_mean"], lambda rate: rate < band[0])
    above = _trailing(curves["noisy_clip_rate_mean"], lambda rate: rate > band[1])
    if below or above:
        side, means = ("below", "larger") if below else ("above", "smaller")
        count = _counted(below or above, "step")
        yield Verdict(
            "warning",
            f"clip rate {side} its band for {count}: C is {means} than wanted ({shown}, target {wanted[1]:.3g})",
        )
        return
    bounds = [value for value in curves.get("max_grad_norm", [[], []])[1] if isinstance(value, float | int)]
    moves = bounds and max(bounds) > min(bounds)
    subject = (
        "C follows the norms" if moves else f"C stays at {bounds[-1]:.4g}" if bounds else "C is where it is wanted"
    )
    yield Verdict("good", f"{subject}: clip rate {shown}, target {wanted[1]:.3g}")


def _trailing(column: list[list[Any]], outside: Callable[[float], bool]) -> int:
    """Return over how many steps up to the last one all values are outside."""
    first = None
    for step, value in zip(*(side[::-1] for side in column), strict=True):
        if not isinstance(value, float | int) or not outside(value):
            break
        first = step
    return 0 if first is None else int(column[0][-1] - first + 1)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _loss(curves: Curves) -> Iterator[Verdict]:
    """Compare the first mean over a whole window with the last one that shares no step with it."""
    steps, values = curves.get("noisy_loss_mean", [[], []])
    if not steps or steps[-1] < steps[0] + 2 * WINDOW - 1:
        return
    start = next(i for i, step in enumerate(steps) if step >= steps[0] + WINDOW - 1)
    first, end = values[start], values[-1]
    errors = [held(curves, "noisy_loss_mean_std", step) for step in (steps[start], steps[-1])]
    if first is None or end is None or errors[0] is None or errors[1] is None:
        return
    both = math.hypot(errors[0], errors[1])
    if abs(end - first) <= CLEAR * both:
        yield Verdict("note", f"no change of the noisy loss beyond its noise: {with_error(end - first, both)}")
        return
    level, verb = ("good", "fell") if end < first else ("warning", "rose")
    yield Verdict(level, f"noisy loss {verb} from {with_error(first, errors[0])} to {with_error(end, errors[1])}")
