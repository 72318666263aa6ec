"""What was really released, recorded at the lowest seams, and what it really costs: the independent side of the comparison.

Every record has a gradient along an axis of its own, and every draw of a sampler too (see :class:`Rows`), far longer than C.
So the un-noised sum that reaches the noise says which records are in it, from which draws, and how often each. Charges are read
from the accountant or from the ledger's file, and epsilon is a lower bound of dp-accounting's on the releases themselves.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from dp_accounting.pld import privacy_loss_distribution
from torch import Tensor, nn
from torch.utils.data import Dataset

from opacus_ac.release import GaussianMechanism
from opacus_ac.sampling import (
    FixedSizeBatchSampler,
    PoissonBatchSampler,
    ShuffledBatchSampler,
    TruncatedPoissonBatchSampler,
)

RECORDS, DRAWS = 10, 32
LENGTH = 1e6
"""Norm of a record's gradient along its own axis; far above every C."""
DELTA = 1e-3
SLACK = 1e-3
logging.getLogger("absl").setLevel(logging.ERROR)


class Violation(AssertionError):
    """The guarantee does not hold; ``kind`` says in which way."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


class Rows(Dataset):
    """Records as rows ``[RECORDS + 2]``: one-hot, a one, and the number of the draw that fetched it; the label is that number.

    An index of a sampler under watch is ``record + RECORDS * draw``; a plain index is a fetch outside of any draw.
    """

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        record, draw = int(index) % RECORDS, int(index) // RECORDS
        row = torch.zeros(RECORDS + 2)
        row[record], row[-2], row[-1] = 1.0, 1.0, draw
        return row, torch.tensor(draw)


class Model(nn.Module):
    """One weight for each pair (draw, record), an adapter of one weight, a frozen layer and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Linear(RECORDS, DRAWS, bias=False)
        self.adapter = nn.Linear(1, 1, bias=False)
        self.base = nn.Linear(1, 1, bias=False)
        self.base.requires_grad_(False)
        self.register_buffer("scale", torch.ones(()))
        self.late: Any = lambda _: None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x[:, :RECORDS])
        if rows.requires_grad:
            rows.register_hook(self.late)
        return self.adapter(x[:, -2:-1]) + rows * self.scale + 0 * self.base(x[:, -2:-1])


def record_losses(outputs: Tensor, draws: Tensor) -> Tensor:
    """Losses ``[B]`` whose gradients are ``LENGTH`` along the axis of (draw, record), and along the adapter's."""
    return LENGTH * outputs.gather(1, draws[:, None]).squeeze(1)


@dataclass
class DrawnBatch:
    """What a sampler drew: records, true rate, kind, and the pass (a run of the sampler) that it belongs to."""

    number: int
    kind: str
    rate: float
    order: tuple[int, ...]
    in_pass: int
    limit: int | None = None
    left_out: frozenset[int] = frozenset()
    uses: int = 0

    @property
    def records(self) -> frozenset[int]:
        """The records that the collate function leaves in."""
        return frozenset(self.order) - self.left_out


@dataclass
class Release:
    """One noised vector as it really was."""

    sums: dict[str, Tensor]
    std: float
    bound: float
    available: Counter
    counts: int | None = None
    vector: Any = None
    unit: float = 0.0  # norm of one record's part of the sums
    weight: float = 0.0  # of the statistics' entry of a record
    statistics_std: float = 0.0
    sensitivity: float = 1.0
    scale: float = 1.0
    outputs: dict[str, Tensor] = field(default_factory=dict)
    draw: DrawnBatch | None = None
    records: frozenset[int] = frozenset()
    noise: float = 0.0  # true noise multiplier
    closed: bool = False


class Book:
    """The releases that one account has to answer for: those of a ledger, or of an engine without one."""

    def __init__(self, ledger: str | None = None) -> None:
        self.ledger = ledger
        self.releases: list[Release] = []
        self.consumed: Counter = Counter()
        self.covers: list[tuple[int, float, set[int]]] = []  # (pass, noise, records) of charges of whole passes
        self.adaptive = False
        self.reported = 0.0

    def charged(self, accountant: Any) -> Counter:
        """Return what has been charged, by (noise, rate, kind)."""
        found: Counter = Counter()
        if self.ledger is None:
            for noise, rate, steps in accountant.history:
                found[float(noise), float(rate), "poisson"] += steps
            for event, steps in getattr(accountant, "other_events", {}).items():
                found[event.noise_multiplier, event.sample_rate, event.sampling] += steps
        elif os.path.exists(self.ledger):
            with open(self.ledger, "rb") as file:
                for line in file:
                    entry = json.loads(line)
                    if entry["kind"] == "charge":
                        kind = "poisson" if entry["sampling"] == "shuffled" else entry["sampling"]
                        found[entry["noise_multiplier"], entry["sample_rate"], kind] += 1
        return found

    def merge(self, other: Book, accountant: Any) -> None:
        """Answer for another book's releases too; what has been charged so far pays for nothing that comes."""
        known = {id(release) for release in self.releases}
        self.releases += [release for release in other.releases if id(release) not in known]
        self.adaptive |= other.adaptive
        self.consumed = self.charged(accountant)

    def copy(self) -> Book:
        """Return the book as a checkpoint keeps it."""
        other = Book(self.ledger)
        other.releases, other.adaptive = list(self.releases), self.adaptive
        return other

    def epsilon(self) -> float:
        """Return a lower bound of the epsilon of what was really released, at ``DELTA``."""
        single: list[tuple[float, float]] = []
        together: dict[int, list[Release]] = defaultdict(list)  # by draw
        for release in self.releases:
            if release.draw is None:
                single.append((release.noise, 1.0))
            else:
                together[release.draw.number].append(release)
        passes: dict[int, list[Release]] = defaultdict(list)
        for releases in together.values():
            draw = releases[0].draw
            assert draw is not None
            if draw.kind == "shuffled":
                for release in releases:
                    for record in release.records:
                        passes[record].append(release)
            else:
                single.append((_joint(releases), _true_rate(draw)))
        worst = max(([(release.noise, 1.0) for release in found] for found in passes.values()), key=len, default=[])
        return epsilon_of(tuple(sorted((round(z, 6), round(q, 9)) for z, q in [*single, *worst])))


def _joint(releases: list[Release]) -> float:
    """Noise multiplier of several releases of the same sum: one Gaussian with the sum of their precisions."""
    precision = sum(math.inf if r.noise == 0 else r.noise**-2 for r in releases)
    return 0.0 if precision == math.inf else precision**-0.5


def _true_rate(draw: DrawnBatch) -> float:
    """Probability with which a record is in the batch, of a truncated one after its truncation."""
    if draw.limit is None:
        return draw.rate
    others, q = RECORDS - 1, draw.rate
    chances = (math.comb(others, k) * q**k * (1 - q) ** (others - k) for k in range(others + 1))
    return q * sum(p * min(1.0, draw.limit / (k + 1)) for k, p in enumerate(chances))


@lru_cache(maxsize=4096)
def _distribution(noise: float, rate: float) -> Any:
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        pessimistic_estimate=False,
        value_discretization_interval=0.02,
        use_connect_dots=False,
    )


@lru_cache(maxsize=65536)
def epsilon_of(releases: tuple[tuple[float, float], ...]) -> float:
    """Return an optimistic epsilon of independent subsampled Gaussians ``(noise, rate)``: what no true statement is below."""
    if any(noise == 0 for noise, _ in releases):
        return math.inf
    total = None
    for (noise, rate), count in Counter(releases).items():
        part = _distribution(noise, rate)
        part = part if count == 1 else part.self_compose(count)
        total = part if total is None else total.compose(part)
    return 0.0 if total is None else float(total.get_epsilon_for_delta(DELTA))


class NoiseTally:
    """Moments of all noise that was drawn, over its stated std, and of its products with the noise of the step before."""

    def __init__(self) -> None:
        self.count, self.squares, self.products = 0, 0.0, 0.0
        self.pairs = 0
        self._last: dict[int, Tensor] = {}

    def add(self, owner: Any, noise: Tensor) -> None:
        """Take in standardised noise of one release."""
        self.count += noise.numel()
        self.squares += float(noise.square().sum())
        last = self._last.get(id(owner)) if owner is not None else None
        if owner is None:
            return
        if last is not None and last.shape == noise.shape:
            self.products += float((last * noise).sum())
            self.pairs += noise.numel()
        self._last = {id(owner): noise}

    def check(self, sigmas: float = 5.0) -> None:
        """Raise when variance or correlation are more than ``sigmas`` standard errors off."""
        if self.count and abs(self.squares / self.count - 1) > sigmas * math.sqrt(2 / self.count):
            raise Violation("noise", f"variance {self.squares / self.count:.4f} of {self.count} values")
        if self.pairs and abs(self.products / self.pairs) > sigmas / math.sqrt(self.pairs):
            raise Violation("noise", f"correlation {self.products / self.pairs:.4f} with the step before")


class Reference:
    """Watches the draws, the noise and the inner optimizer of all runs of a sequence.

    Args:
        tally: takes in all noise.
        frozen: the reference of an earlier run of the same sequence; draws and releases are then its own, without ``without``.
        without: the record that a neighbouring dataset lacks.
        seed: of the draws, which are the reference's own, so that a sequence can be played again.
    """

    def __init__(
        self, tally: NoiseTally, frozen: Reference | None = None, without: int | None = None, seed: int = 0
    ) -> None:
        self.tally, self.frozen, self.without = tally, frozen, without
        self.random = random.Random(seed)
        self.draws: list[DrawnBatch] = []
        self.passes = 0
        self.left_out: frozenset[int] = frozenset()  # by the collate function
        self.runs: list[Any] = []
        self.releases: list[Release] = []
        self.decoded: list[Any] = []
        self.failing: str | None = None

    # ------------------------------------------------------------ draws

    def draw(self, kind: str, rate: float, indices: list[int], limit: int | None = None) -> list[int]:
        """Note a draw and return its indices, which carry its number."""
        number = len(self.draws) + 1
        if kind == "fixed_size":
            indices = sorted(self.random.sample(range(RECORDS), len(indices)))
        elif kind != "shuffled":
            indices = [i for i in range(RECORDS) if self.random.random() < rate]
            indices = indices if limit is None else sorted(self.random.sample(indices, min(limit, len(indices))))
        if self.frozen is not None:
            known = self.frozen.draws[number - 1] if number <= len(self.frozen.draws) else None
            indices = [] if known is None else [i for i in known.order if i != self.without]
        if number >= DRAWS:
            raise OutOfDraws
        self.draws.append(DrawnBatch(number, kind, rate, tuple(indices), self.passes, limit, self.left_out))
        return [index + RECORDS * number for index in indices]

    # ------------------------------------------------------------ releases

    def _run(self, mechanism: Any) -> Any:
        for run in self.runs:
            if run.optimizer.mechanism is mechanism:
                return run
        raise Violation("stranger", "noise of a mechanism that no run has")

    def release(self, mechanism: Any, totals: Sequence[Tensor], std: float) -> Release:
        """Note the sums that are about to be noised."""
        self.close()
        run = self._run(mechanism)
        sums = dict(zip(self.names(totals), (total.detach().clone().double() for total in totals), strict=True))
        available = run.book.charged(run.engine.accountant) - run.book.consumed
        release = Release(sums, float(std), float(run.optimizer.policy.bound), available)
        release.sensitivity = run.optimizer.statistics.sensitivity
        self.releases.append(release)
        self._of = run
        return release

    def statistics(self, mechanism: Any, statistics: Any, std: float) -> None:
        """Note the statistics that belong to the sums before."""
        if not self.releases or self.releases[-1].closed:
            raise Violation("order", "statistics without a gradient before them")
        release = self.releases[-1]
        release.vector, release.statistics_std = statistics.vector().copy(), std
        if statistics.histogram:
            counts = statistics._counts
            release.counts = int(counts.sum())
            release.weight = float(max((statistics._weights[counts > 0]), default=0.0))

    def close(self) -> None:
        """Hold the last release, complete or not, against its charge."""
        if not self.releases or self.releases[-1].closed:
            return
        release, run = self.releases[-1], self._of
        release.closed = True
        self.examine(release, run)
        if release.counts is not None and release.counts != len(release.records):
            raise Violation("counts", f"statistics of {release.counts} records, a sum of {len(release.records)}")
        release.noise = self.true_noise(release)
        if self.frozen is None:
            self._check_charge(release, run)
        run.book.releases.append(release)
        if release.draw is not None:
            release.draw.uses += 1

    def names(self, totals: Sequence[Tensor]) -> list[str]:
        """Return a name for each of the sums that are noised together."""
        return [name_of(total) for total in totals]

    def examine(self, release: Release, run: Any) -> None:
        """Find out what is in the sums of a release, and of which draw it is.

        Raises:
            Violation: a record is in them twice, or with more or less than C, or records of several draws are.
        """
        release.unit = check_sums(release, run.adapter_was_in)
        self._identify(release, run)

    def true_noise(self, release: Release) -> float:
        """Return the noise multiplier of a release: its noise over what a record really adds to it."""
        if not release.records:
            return release.std / (release.sensitivity * release.bound)
        parts = [(release.unit, release.std), (release.weight, release.statistics_std)]
        precision = sum(math.inf if std == 0 else (part / std) ** 2 for part, std in parts if part)
        return 0.0 if precision == math.inf else float(precision**-0.5)

    def _identify(self, release: Release, run: Any) -> None:
        """Find the draw of a release: from its sum, or, of an empty one, from the batch that was last run backward."""
        seen = release.sums["rows"].abs() > 0.01 * release.bound
        numbers = {int(d) for d in seen.any(1).nonzero()}
        release.records = frozenset(int(i) for i in seen.any(0).nonzero())
        if not numbers and run.last_draw and is_half(release):
            release.records = self.draws[run.last_draw - 1].records
        if len(numbers) > 1:
            raise Violation("draws", f"records of draws {sorted(numbers)} in one release")
        number = numbers.pop() if numbers else run.last_draw
        release.draw = self.draws[number - 1] if number else None

    def _check_charge(self, release: Release, run: Any) -> None:
        draw, book = release.draw, run.book
        first = draw is not None and draw.uses == 0
        if draw is not None and release.records != draw.records and draw.kind == "poisson":
            part = release.records < draw.records
            raise Violation("part", f"{'a part' if part else 'more than'} of a draw was released")
        rate = draw.rate if draw is not None and first and draw.kind != "shuffled" else 1.0
        kinds = {"poisson"} if draw is None or draw.kind == "shuffled" else {"poisson", draw.kind}
        fits = [
            (q, -z, kind)
            for (z, q, kind), count in release.available.items()
            if count > 0 and q >= rate - 1e-12 and z <= release.noise * (1 + SLACK) and (q == 1 or kind in kinds)
        ]
        if fits:
            q, z, kind = min(fits)
            book.consumed[-z, q, kind] += 1
            book.adaptive |= run.follows_releases(-z)
            if draw is not None and draw.kind == "shuffled":
                book.covers.append((draw.in_pass, -z, set(release.records)))
            return
        if draw is not None and draw.kind == "shuffled":
            for in_pass, noise, records in book.covers:
                if in_pass == draw.in_pass and not records & release.records and noise <= release.noise * (1 + SLACK):
                    records |= release.records
                    return
        what = dict(+release.available)
        raise Violation(
            "charge", f"a release of noise {release.noise:.4f} at true rate {rate:g} ({draw}) had charges {what} only"
        )


class OutOfDraws(Exception):
    """The sequence has used all axes for draws; it ends here."""


def name_of(total: Tensor) -> str:
    """Tell a parameter by its shape."""
    return {DRAWS * RECORDS: "rows", 1: "adapter"}.get(total.numel(), f"other{tuple(total.shape)}")


def is_half(release: Release) -> bool:
    """Whether a backward pass that an exception ended on its way was released: gradients of the adapter alone."""
    return (
        float(release.sums["rows"].abs().max()) == 0
        and float(release.sums.get("adapter", torch.zeros(())).abs().sum()) > 0
    )


def check_sums(release: Release, adapter_was_in: bool = False) -> float:
    """Check multiplicities; return the norm of one record's part of the sum.

    Args:
        release: the sums.
        adapter_was_in: whether the adapter was trained as the gradients were computed, so that its part was clipped with them.
    """
    rows, adapter = release.sums["rows"], release.sums.get("adapter")
    both = adapter is not None and float(adapter.abs().sum()) > 0.01 * release.bound
    share = math.sqrt(0.5) if both or adapter_was_in else 1.0
    unit = share * min(release.bound, LENGTH / share)
    times = rows.abs() / unit
    per_record = times.sum(0)
    if float(per_record.max()) > 1.5:
        raise Violation("twice", f"record {int(per_record.argmax())} is {float(per_record.max()):.3f} times in the sum")
    if float(per_record.max()) > 1 + SLACK:
        raise Violation("norm", f"a record adds {float(per_record.max()):.5f} C")
    if (
        both
        and not is_half(release)
        and abs(float(adapter.sum()) / unit - float(per_record.sum())) > 0.02 * max(1.0, float(per_record.sum()))
    ):
        raise Violation(
            "adapter",
            f"{float(adapter.sum()) / unit:.3f} records' worth on the adapter, {per_record.sum():.3f} on the rows",
        )
    present = times[times > 0.01]
    if present.numel() and float(present.min()) < 0.98:
        raise Violation("scale", f"a record adds {float(present.min()):.4f} C, and its gradient is longer than C")
    return unit / share if both else unit


@contextmanager
def watched(reference: Reference) -> Iterator[None]:
    """Let ``reference`` see the noise and the draws of the package."""
    spies = (
        (os, "fsync", _watch_fsync),
        (GaussianMechanism, "noise_in_place", _watch_noise),
        (GaussianMechanism, "release_statistics", _watch_statistics),
        (PoissonBatchSampler, "_draw", _watch_draws),
        (TruncatedPoissonBatchSampler, "_draw", _watch_draws),
        (FixedSizeBatchSampler, "_draw", _watch_draws),
        (ShuffledBatchSampler, "_logical_batches", _watch_passes),
    )
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in spies]
    for owner, name, spy in spies:
        setattr(owner, name, spy(reference, vars(owner)[name]))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _watch_fsync(reference: Reference, original: Any) -> Any:
    def fsync(handle: int) -> None:
        fail(reference, "fsync")
        original(handle)

    return fsync


def _watch_noise(reference: Reference, original: Any) -> Any:
    def noise_in_place(self: Any, totals: Sequence[Tensor], std: Any, scale: float = 1.0) -> None:
        if not isinstance(std, float | int):
            original(self, totals, std, scale)
            return
        fail(reference, "before noise")
        release = reference.release(self, totals, std)
        release.scale = float(scale)
        if reference.frozen is not None:
            known = reference.frozen.releases[len(reference.releases) - 1]
            for name, total in zip(reference.names(totals), totals, strict=True):
                total.copy_(known.outputs[name])
        else:
            original(self, totals, std, scale)
            if std:
                before = torch.cat([release.sums[name].reshape(-1) for name in reference.names(totals)])
                drawn = (torch.cat([t.detach().double().reshape(-1) / scale for t in totals]) - before) / std
                if float(drawn.abs().min()) == 0:
                    raise Violation("noise", "a coordinate without noise")
                reference.tally.add(self, drawn)
        release.outputs = dict(zip(reference.names(totals), (t.detach().clone() for t in totals), strict=True))
        fail(reference, "after noise")

    return noise_in_place


def _watch_statistics(reference: Reference, original: Any) -> Any:
    def release_statistics(self: Any, statistics: Any, expected_batch_size: float, *ranks: Any) -> Any:
        reference.statistics(self, statistics, self.gradient_multiplier(statistics))
        fail(reference, "in statistics")
        place = len(reference.releases) - 1
        if reference.frozen is not None:
            return reference.frozen.decoded[place]
        with _noise_of_statistics(reference, statistics):
            decoded = original(self, statistics, expected_batch_size, *ranks)
        reference.decoded += [None] * (place - len(reference.decoded)) + [decoded]
        return decoded

    return release_statistics


@contextmanager
def _noise_of_statistics(reference: Reference, statistics: Any) -> Iterator[None]:
    """Take the noise of the statistics into the tally: what is decoded, without what was summed."""
    summed, decode = statistics.vector().copy(), type(statistics).decode

    def look(noisy: Any, std: float, expected_batch_size: float) -> Any:
        if std > 0 and summed.size:
            drawn = torch.as_tensor((noisy - summed) / std)
            if float(drawn.abs().min()) == 0:
                raise Violation("noise", "a statistic without noise")
            reference.tally.add(None, drawn)
        return decode(statistics, noisy, std, expected_batch_size)

    statistics.decode = look
    try:
        yield
    finally:
        del statistics.decode


def _watch_draws(reference: Reference, original: Any) -> Any:
    def _draw(self: Any, rate: float) -> list[int]:
        return reference.draw(self.plan.sampling, rate, original(self, rate), self.plan.max_batch_size)

    return _draw


def _watch_passes(reference: Reference, original: Any) -> Any:
    def _logical_batches(self: Any, start: int) -> Any:
        reference.passes += 1
        own = reference.passes
        for expected, indices in original(self, start):
            reference.passes, now = own, reference.passes  # passes may be open side by side
            drawn = reference.draw("shuffled", 1.0, list(indices))
            reference.passes = now
            yield expected, drawn

    return _logical_batches


class Injected(BaseException):
    """An interrupt at a point that the sequence asked for."""


def fail(reference: Reference, site: str) -> None:
    """Raise if the sequence asked for a failure here; it asks for one at a time."""
    if reference.failing == site:
        reference.failing = None
        raise OSError(28, "No space left on device") if site == "fsync" else Injected(site)
