"""The reference of ``reference`` around whole surfaces (a Trainer, a command line, several ranks), with any model.

There records have no axes of their own. Instead the gradient of every record is computed by itself, on a twin of the model that
the package never saw, with the weights of the step; the un-noised sum is then solved for how much of each record is in it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from reference import DELTA, SLACK, Book, DrawnBatch, NoiseTally, Reference, Release, Violation, epsilon_of, watched
from torch import Tensor, nn

from opacus_ac import PrivacyEngine

PRESENT = 0.02
"""Share of its clipped gradient from which on a record counts as being in a sum."""

LOOSE, TIGHT = 1.6, 1.1
"""How far above a lower bound a report may be: by Renyi accounting, of few steps, and by privacy loss distributions."""


class Oracle:
    """Gradients and losses of records, each alone.

    Args:
        model: a model with the weights' names of the private one.
        records: one argument of ``loss`` for each record of the dataset, in its order.
        loss: loss of one record.
    """

    def __init__(self, model: nn.Module, records: Sequence[Any], loss: Callable[[nn.Module, Any], Tensor]) -> None:
        self.model, self.records, self.loss = copy.deepcopy(model).train(), list(records), loss

    def gradients(self, weights: dict[str, Tensor], names: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the gradients ``[N, P]`` by the named parameters, in their order, and the losses ``[N]``."""
        self.model.load_state_dict(weights)
        parameters = dict(self.model.named_parameters())
        rows, losses = [], []
        for record in self.records:
            self.model.zero_grad()
            loss = self.loss(self.model, record)
            loss.backward()
            rows.append(torch.cat([_flat(parameters[name].grad, parameters[name]) for name in names]))
            losses.append(float(loss))
        return torch.stack(rows), torch.tensor(losses, dtype=torch.float64)


def _flat(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return (torch.zeros_like(parameter) if gradient is None else gradient).detach().double().reshape(-1)


@dataclass
class SurfaceRun:
    """What one call of ``make_private`` made, by whatever surface."""

    engine: Any
    module: nn.Module
    optimizer: Any
    book: Book

    @property
    def names(self) -> list[str]:
        """Names of the trained parameters, in the optimizer's order."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        return [names[id(p)] for p in self.optimizer.params]

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the state of the model."""
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def follows_releases(self, charged: float) -> bool:
        """Whether noise or rates may follow from releases: never here."""
        return False


@dataclass
class Parts:
    """What the oracle says about a release, and what the sum was solved for."""

    gradients: Tensor  # [N, P]
    losses: Tensor  # [N]
    expected: Tensor  # factors [N] that clip to C
    found: Tensor = field(default_factory=lambda: torch.zeros(0))  # factors [N] in the sum
    statistics: Tensor = field(default_factory=lambda: torch.zeros(0))  # norm [N] of a record's statistics


class SurfaceReference(Reference):
    """Watches every private run that a surface makes.

    Args:
        oracle: gradients of the records.
        ledger: the ledger that charges are read from; None for the engine's accountant.
        rank: of this process.
        world: number of processes; each notes what it finds, since an error of one alone would leave the others waiting.
    """

    def __init__(self, oracle: Oracle, ledger: str | None = None, rank: int = 0, world: int = 1) -> None:
        super().__init__(NoiseTally())
        self.oracle, self.book, self.rank, self.world = oracle, Book(ledger), rank, world
        self.applied = NoiseTally()
        self.found: list[Violation] = []
        self.parts: dict[int, Parts] = {}

    def begin(self, engine: Any, module: nn.Module, optimizer: Any) -> None:
        """Watch a run; several are one account, as those that resume each other are."""
        self.runs.append(SurfaceRun(engine, module, optimizer, self.book))
        optimizer.original_optimizer.register_step_pre_hook(lambda *_: self.noting(self.check_applied))

    def noting(self, check: Callable[..., None], *args: Any) -> None:
        """Run a check; with one process raise what it raises, with several keep it."""
        try:
            check(*args)
        except Violation as violation:
            if self.world == 1:
                raise
            self.found.append(violation)

    def draw(self, kind: str, rate: float, indices: list[int], limit: int | None = None) -> list[int]:
        """Note a draw."""
        self.draws.append(DrawnBatch(len(self.draws) + 1, kind, rate, tuple(indices), self.passes, limit))
        return indices

    def names(self, totals: Sequence[Tensor]) -> list[str]:
        """Return a name for each of the sums, which are in the order of the parameters."""
        return [str(number) for number in range(len(totals))]

    def release(self, mechanism: Any, totals: Sequence[Tensor], std: float) -> Release:
        """Note the sums that are about to be noised, and the gradients that belong into them."""
        release = super().release(mechanism, totals, std)
        gradients, losses = self.oracle.gradients(self._of.weights(), self._of.names)
        expected = (release.bound / gradients.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)
        self.parts[id(release)] = Parts(gradients, losses, expected)
        return release

    def statistics(self, mechanism: Any, statistics: Any, std: float) -> None:
        """Note the statistics, and how long what a record adds to them is."""
        super().statistics(mechanism, statistics, std)
        parts = self.parts[id(self.releases[-1])]
        norms = parts.gradients.norm(dim=1).numpy()
        length = np.zeros(len(norms))
        if statistics.histogram:  # a certified norm may be one bin higher
            bins = [statistics._window.groups(norms * factor) for factor in (1 - SLACK, 1 + SLACK)]
            length = np.minimum(*(statistics._weights[b] for b in bins))
        if statistics.loss_bound is not None:
            share = parts.losses.clamp(0, statistics.loss_bound).numpy() / statistics.loss_bound
            length = np.hypot(length, statistics.loss_weight * share)
        parts.statistics = torch.from_numpy(length)

    def close(self) -> None:
        """Hold the last release against its charge."""
        self.noting(super().close)

    def examine(self, release: Release, run: Any) -> None:
        """Solve the sum for the records in it, and find the draw that has them."""
        parts, bound = self.parts[id(release)], release.bound
        total = torch.cat([part.reshape(-1) for part in release.sums.values()])
        gradients = self.stretch(parts.gradients, total.numel())
        parts.found = torch.linalg.lstsq(gradients.T, total[:, None], driver="gelsd").solution[:, 0]
        rest = float((total - gradients.T @ parts.found).norm())
        if rest > SLACK * bound:
            raise Violation("stranger", f"{rest / bound:.5f} C of the sum are of none of the records")
        times = parts.found / parts.expected
        lengths = parts.found.abs() * parts.gradients.norm(dim=1) / bound
        present = times.abs() > PRESENT
        if float(times.abs().max()) > 1.5:
            raise Violation(
                "twice", f"record {int(times.abs().argmax())} is {float(times.abs().max()):.3f} times in the sum"
            )
        if float(lengths.max()) > 1 + SLACK:
            raise Violation("norm", f"a record adds {float(lengths.max()):.5f} C")
        if present.any() and float(times[present].min()) < 0.98:
            raise Violation("scale", f"a record adds {float(times[present].min()):.4f} of what it should")
        release.records = frozenset(int(i) for i in present.nonzero()[:, 0])
        self._identify(release, run)

    def stretch(self, gradients: Tensor, size: int) -> Tensor:
        """Return the columns that this rank noises, of gradients ``[N, P]`` that the ranks share evenly, padded."""
        if self.world == 1 or size >= gradients.shape[1]:
            return nn.functional.pad(gradients, (0, size - gradients.shape[1]))
        padded = nn.functional.pad(gradients, (0, size * self.world - gradients.shape[1]))
        return padded[:, self.rank * size : (self.rank + 1) * size]

    def _identify(self, release: Release, run: Any) -> None:
        fits = [draw for draw in self.draws if draw.uses == 0 and draw.records == release.records]
        if not fits:
            unused = [sorted(draw.records) for draw in self.draws if draw.uses == 0]
            raise Violation("draws", f"records {sorted(release.records)} in a release are no draw of {unused}")
        release.draw = fits[0]
        for earlier in self.draws[: fits[0].number - 1]:
            earlier.uses += earlier.uses == 0  # was left out, and comes no more

    def true_noise(self, release: Release) -> float:
        """Return the noise multiplier of a release: its noise over what the record that adds most really adds to it."""
        if not release.records:
            return super().true_noise(release)
        if release.std == 0 or release.statistics_std == 0:
            return 0.0
        parts, records = self.parts[id(release)], sorted(release.records)
        lengths = parts.found.abs() * parts.gradients.norm(dim=1) / release.std
        if release.vector is not None and release.vector.size:
            lengths = torch.hypot(lengths, parts.statistics / release.statistics_std)
        return float(1 / lengths[records].max())

    # ------------------------------------------------------------ what is applied, and what is reported

    def check_applied(self) -> None:
        """Hold the gradients that the inner optimizer is about to apply against the records' sum: the rest is one noise."""
        self.close()
        if not self.releases or self.releases[-1].draw is None:
            raise Violation("raw", "the inner optimizer applies gradients that were not released")
        release, run = self.releases[-1], self.runs[-1]
        parts = self.parts.pop(id(release), None)
        if parts is None:
            raise Violation("raw", "the inner optimizer applies gradients of a release a second time")
        applied = torch.cat([_flat(p.grad, p) for p in run.optimizer.params]) / release.scale
        if release.std == 0:
            raise Violation("noise", "the inner optimizer applies a sum without noise")
        records = sorted(release.records)
        noise = (applied - parts.expected[records] @ parts.gradients[records]) / release.std
        if float(noise.abs().min()) == 0:
            raise Violation("noise", "a coordinate is applied without noise")
        self.applied.add(None, noise)
        for tally in (self.tally, self.applied):
            tally.check()
        outputs = torch.cat([output.double().reshape(-1) for output in release.outputs.values()]) / release.scale
        if self.world == 1 and not torch.equal(outputs, applied):
            raise Violation("raw", "the inner optimizer applies other gradients than were released")

    def check_reports(self, reports: dict[int, float], factor: float = LOOSE) -> None:
        """Hold the epsilon that was reported after each of some steps against what they really cost, and what was charged.

        What they cost follows from how much the records added. Records that are all shorter than C cost less than their
        charge, so that it bounds a report from below only. The charges bound it from above.

        Raises:
            Violation: A report is below the cost, or so far above the charges that it says nothing.
        """
        charges = self.book.charged(self.runs[-1].engine.accountant)
        ((noise, rate, _),) = charges  # all of one kind
        for steps, reported in reports.items():
            book = Book()
            book.releases = self.book.releases[:steps]
            spent, stated = book.epsilon(), epsilon_of(((noise, rate),) * steps)
            if not spent <= reported:
                raise Violation("epsilon", f"{reported:.4f} is reported after {steps} steps that cost {spent:.4f}")
            if not reported <= factor * stated + 0.05:
                raise Violation("epsilon", f"{reported:.4f} is reported after {steps} steps charged with {stated:.4f}")

    def finish(self, steps: int) -> None:
        """Hold the last release against its charge, and check that all were seen.

        Raises:
            Violation: the first one that was kept; more or fewer releases or charges than steps.
        """
        self.close()
        if self.found:
            raise self.found[0]
        self.tally.check()
        self.applied.check()
        charged = sum(self.book.charged(self.runs[-1].engine.accountant).values())
        if not steps == charged == len(self.book.releases):
            raise Violation("charge", f"{charged} charges, and {len(self.book.releases)} releases, in {steps} steps")
        if not any(release.records for release in self.releases):
            raise Violation("draws", "no release had a record")
        assert self.applied.count


@contextmanager
def watched_surface(reference: SurfaceReference) -> Iterator[None]:
    """Let ``reference`` see all runs that are made private, their draws and their noise."""
    original = PrivacyEngine.make_private

    def make_private(self: Any, **options: Any) -> Any:
        made = original(self, **options)
        reference.begin(self, options["module"], made[1])
        return made

    PrivacyEngine.make_private = make_private  # type: ignore[method-assign]
    try:
        with watched(reference):
            yield
    finally:
        PrivacyEngine.make_private = original  # type: ignore[method-assign]


def some(reports: Sequence[float]) -> dict[int, float]:
    """Return the first, the middle and the last report by the number of the step, of one for every step."""
    return {n: reports[n - 1] for n in sorted({1, math.ceil(len(reports) / 2), len(reports)})}


__all__ = ["DELTA", "TIGHT", "Oracle", "SurfaceReference", "some", "watched_surface"]
