"""Replay: a run with a record and the same run without it, under the same noise.

The difference is what the record adds.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_ac._bytes import raw_bytes
from opacus_ac.audit.canary import private_parts
from opacus_ac.audit.published import Published
from opacus_ac.audit.streams import FixedDraws, public_generators, seed_public_generators
from opacus_ac.audit.task import Task
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.release.values import FloatArray

REFUSED = (ValueError, RuntimeError, NotImplementedError)
"""What a refusal is; anything else is an error of the audit."""

Batch = tuple[Tensor, ...]


def charges(engine: Any) -> Counter[tuple[float, float]]:
    """Return how often each (noise multiplier, sample rate) was charged."""
    found: Counter[tuple[float, float]] = Counter()
    for noise, rate, steps in engine.accountant.history:
        found[float(noise), float(rate)] += int(steps)
    for event, steps in getattr(engine.accountant, "other_events", {}).items():
        found[event.noise_multiplier, event.sample_rate] += int(steps)
    return found


@dataclass(frozen=True)
class Release:
    """What one step released.

    Attributes:
        total: sum of clipped gradients in units of C, with noise.
        statistics: what was released beside it, in units of its entries.
        searching: whether the step kept its sum to itself.
        fresh: whether its records came from one draw that no step had used.
        present: whether the record was in it.
        leftovers: what else may be looked at after the step: frozen weights and buffers, and the public generators.
    """

    total: FloatArray
    statistics: FloatArray
    searching: bool
    fresh: bool
    present: bool
    leftovers: dict[str, bytes]


@dataclass
class Run:
    """A private run under observation; what a script holds in its hands.

    Attributes:
        releases: what the steps released.
        refused: the message of the refusal that ended it, if one did.
        spent: charges of the run.
        engine: the engine.
        limit: largest physical batch, None for no split.
    """

    task: Task
    engine: Any
    model: Any
    optimizer: AdaptiveClipDPOptimizer
    loader: DataLoader[Batch]
    published: Published
    limit: int | None = None
    releases: list[Release] = field(default_factory=list)
    refused: str | None = None
    _fresh: list[bool] = field(default_factory=list)
    _members: list[int] = field(default_factory=list)

    def backward(self, batch: Batch, *, fresh: bool = True) -> None:
        """Forward and backward only."""
        self._note(batch, fresh)
        losses = self.task.losses(self.model, batch)
        if self.optimizer.statistics.loss_bound is not None:
            self.optimizer.record_losses(losses)
        (losses.mean() if self.optimizer.loss_reduction == "mean" else losses.sum()).backward()

    def step(self, batch: Batch, *, fresh: bool = True) -> None:
        """Forward, backward, step, and what the user's loop does around them."""
        before = self.optimizer.steps_taken
        if not self._members and not self._fresh:
            self.optimizer.zero_grad()
        self.published.before_step()
        if self.published.forward_only:
            self._note(batch, fresh)
            self.task.step(self.model, batch, self.optimizer)
        else:
            self.backward(batch, fresh=fresh)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.optimizer.steps_taken > before:
            self._released()

    @property
    def steps(self) -> int:
        """Number of releases so far."""
        return len(self.releases)

    def _note(self, batch: Batch, fresh: bool) -> None:
        self._fresh.append(fresh)
        self._members += self.task.members(batch).tolist()

    def _released(self) -> None:
        optimizer = self.optimizer
        searching = optimizer.policy.searching  # such a step keeps its sum to itself
        values = self.published.read(), self.published.statistics()
        one_draw = self.limit is not None or len(self._fresh) == 1
        present = self.task.canaries[0] in self._members
        self.releases.append(
            Release(*values, searching, one_draw and all(self._fresh), present, dict(self._leftovers()))
        )
        self._fresh, self._members = [], []
        # Both runs go on from the same public state, so that their releases can be compared.
        optimizer.max_grad_norm = optimizer.policy.initial_bound

    def _leftovers(self) -> Iterator[tuple[str, bytes]]:
        trained = set(self.published.parameters)
        for name, value in self.published.bare.state_dict().items():
            if name not in trained or not self.published.parameters[name].requires_grad:
                yield name, raw_bytes(value).tobytes()
        yield "torch's generator", torch.get_rng_state().numpy().tobytes()
        yield "numpy's generator", np.asarray(np.random.get_state(legacy=True)[1]).tobytes()  # type: ignore[index]


def replay(
    build: Callable[[], Any],
    task: Task,
    play: Callable[[Any], None],
    present: Sequence[bool],
    *,
    seed: int,
    public_seed: int = 0,
    rate: float = 0.5,
    **settings: Any,
) -> Run:
    """Play a script on a task whose record is in the draws that ``present`` says, under the noise of ``seed``.

    Args:
        build: makes the engine.
        task: data and model; the record is its first canary.
        play: the script.
        present: for each draw whether the record is in it; the last holds from then on.
        seed: seed of noise and draws.
        public_seed: seed of the generators that an attacker knows.
        rate: sampling rate.
        **settings: of ``make_private``.
    """
    engine = build()
    run: Run | None = None
    with public_generators(), warnings.catch_warnings():
        seed_public_generators(public_seed)
        warnings.simplefilter("ignore")
        try:
            bare, model, optimizer, loader = private_parts(
                engine.make_private, task, round(task.size * rate), seed,
                lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=1.0), **settings,
            )  # fmt: skip
            loader.batch_sampler.stream = FixedDraws(seed, {task.canaries[0]: present})  # type: ignore[union-attr]
            run = Run(
                task,
                engine,
                model,
                optimizer,
                loader,
                Published(bare, optimizer),
                settings.get("max_physical_batch_size"),
            )
            play(run)
        except REFUSED as error:
            if run is None:
                run = Run(task, engine, nn.Identity(), None, None, None)  # type: ignore[arg-type]
            run.refused = f"{type(error).__name__}: {error}"
    return run
