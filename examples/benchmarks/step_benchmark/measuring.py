"""Variants of one shape measured in turn."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.dummy
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from step_benchmark.shapes import Shape
from step_benchmark.variants import NO_NOISE, PLAIN, VARIANTS, Options, Variant, not_applicable
from step_benchmark.workers import Failed, Worker, in_processes

LOSS_TOLERANCE = {False: 1e-4, True: 2e-2}  # relative, without and with autocast


@dataclass
class Figures:
    """What was measured of one variant of one shape."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    noise_shares: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)
    idle_share: float = 0.0
    trained: int = 0
    parameters: int = 0
    parts: int = 1
    syncs: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    note: str = ""


class Group:
    """Variants that live at the same time, ``plain`` always among them."""

    def __init__(
        self, shape: Shape, variants: Mapping[str, Variant], options: Options, results: dict[str, Figures]
    ) -> None:
        self.options, self.results = options, results
        self.losses: dict[str, float] = {}
        context: Any = multiprocessing.get_context("spawn") if in_processes(options) else multiprocessing.dummy
        self.workers = {name: Worker(context, shape, variant, options) for name, variant in variants.items()}

    def ask(self, name: str, request: str) -> Any:
        """Return the worker's answer; None once it has failed, which is noted and reported at once."""
        if name not in self.workers:
            return None
        try:
            return self.workers[name].ask(request)
        except Failed as error:
            self.fail(name, str(error))
            return None

    def fail(self, name: str, message: str) -> None:
        """Take a worker out of the group."""
        self.results[name].failure = message.strip()
        print(f"{name} failed:\n{message}", file=sys.stderr, flush=True)
        self.workers.pop(name).stop()

    def build(self) -> None:
        """Build and warm up one worker after the other; all must compute the same loss."""
        for name in list(self.workers):
            built = self.ask(name, "build")
            if built is None:
                continue
            self.results[name].trained, self.results[name].parameters = built["counts"]
            self.results[name].parts = built["parts"]
            self.losses[name] = built["loss"]
            wanted = self.losses.get(PLAIN, built["loss"])
            if not math.isclose(built["loss"], wanted, rel_tol=LOSS_TOLERANCE[self.options.autocast]):
                self.fail(name, f"its first loss is {built['loss']:.6f}, that of {PLAIN} {wanted:.6f}")

    def run(self) -> None:
        """Build, time the rounds, measure memory."""
        self.build()
        order, shuffle = list(self.workers), random.Random(0).shuffle
        start = time.monotonic()
        for number in range(self.options.rounds):
            if number and time.monotonic() - start > self.options.seconds:
                break
            shuffle(order)
            print(f"round {number + 1} of {self.options.rounds}", file=sys.stderr, flush=True)
            self.note_times({name: seconds for name in order if (seconds := self.ask(name, "time")) is not None})
        for _ in range(self.options.memory_rounds):
            for name in order:
                if (measured := self.ask(name, "memory")) is not None:
                    self.results[name].peak_mib.append(measured[0])
                    self.results[name].resident_mib.append(measured[1])
        for name in order if self.options.count_syncs else ():
            self.results[name].syncs = self.ask(name, "syncs") or {}
        for name in order:
            self.results[name].idle_share = max(self.results[name].idle_share, self.ask(name, "idle") or 0.0)

    def note_times(self, times: dict[str, float]) -> None:
        """Keep the times of one round with what is compared within it."""
        for name, seconds in times.items():
            figures = self.results[name]
            figures.seconds.append(seconds)
            if PLAIN in times:
                figures.ratios.append(seconds / times[PLAIN])
            if name + NO_NOISE in times:
                figures.noise_shares.append(1 - times[name + NO_NOISE] / seconds)

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop()


def groups(names: Sequence[str], at_once: int) -> Iterator[list[str]]:
    """Split variants into groups with ``plain`` in each; a variant without noise stays with its noisy one."""
    families: dict[str, list[str]] = {}
    for name in names:
        if name != PLAIN:
            families.setdefault(name.removesuffix(NO_NOISE), []).append(name)
    group: list[str] = []
    for family in families.values():
        if group and at_once and len(group) + len(family) > at_once:
            yield [PLAIN, *group]
            group = []
        group += family
    yield [PLAIN, *group]


def measure(
    shape: Shape,
    names: Sequence[str],
    options: Options,
    at_once: int,
    variants: Mapping[str, Variant] = VARIANTS,
) -> dict[str, Figures]:
    """Measure the named variants of a shape, ``plain`` with them."""
    results = {name: Figures(note=not_applicable(name, shape)) for name in dict.fromkeys([PLAIN, *names])}
    for members in groups([name for name, figures in results.items() if not figures.note], at_once):
        print(f"measuring {', '.join(members)}", file=sys.stderr, flush=True)
        group = Group(shape, {name: variants[name] for name in members}, options, results)
        try:
            group.run()
        finally:
            group.stop()
    return results
