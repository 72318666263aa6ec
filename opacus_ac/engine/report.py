"""The privacy statement of a run: what is protected, by which mechanism, and what was released."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from opacus_ac.accounting import AttackBounds, attack_sentences
from opacus_ac.budget.advice import weak_promise
from opacus_ac.budget.charges import privacy_unit
from opacus_ac.optimizer.auto_adam import AutoAdam
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.sampling.plan import SamplingPlan


@dataclass(frozen=True)
class PrivacyReport:
    """Everything that somebody needs to check the claim; ``str()`` for people, :meth:`to_json` for files.

    Attributes:
        epsilon: privacy loss spent so far; infinity when no bound holds.
        delta: the delta it holds at.
        accountant: method that gives this epsilon: an accountant, or the privacy loss distribution of its history.
        bounds: every epsilon that holds, by method.
        unit: what one record is: a row, or a user with all rows.
        adjacency: which datasets are neighbours.
        sampling: how batches were drawn.
        dataset_size: N, taken as a public constant.
        expected_batch_size: smallest and largest expected batch size so far (the plan's when no step was taken).
        history: accounted (noise multiplier, sample rate, steps).
        steps: steps taken.
        noise_multiplier: ratio of the noise's standard deviation to the L2 sensitivity of the whole release.
        gradient_noise_multiplier: standard deviation of the gradient noise, in units of C.
        clip_policy: rule that chose C.
        max_grad_norm: C of the next step, a function of releases.
        released: what every step released.
        noise_source: where the noise came from.
        ledger: the privacy ledger in words: charges, runs, head; None without one.
        learning_rate: how the inner optimizer found its learning rate; None where it was given one.
        attacks: what any attacker can do at most; None where it was not asked for.
        warnings: what the reader must know.
    """

    epsilon: float
    delta: float
    accountant: str
    bounds: dict[str, float]
    unit: str
    adjacency: str
    sampling: str
    dataset_size: int
    expected_batch_size: tuple[float, float]
    history: list[tuple[float, float, int]]
    steps: int
    noise_multiplier: float
    gradient_noise_multiplier: float
    clip_policy: str
    max_grad_norm: float
    released: list[str]
    noise_source: str
    ledger: str | None = None
    learning_rate: str | None = None
    attacks: AttackBounds | None = None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values as JSON has them, with what they mean for attackers in words.

        An infinite epsilon becomes the string "infinity".
        """

        def finite(epsilon: float) -> float | str:
            return "infinity" if math.isinf(epsilon) else epsilon

        bounds = {name: finite(epsilon) for name, epsilon in self.bounds.items()}
        words = self.attack_sentences()
        plain = {**asdict(self), "epsilon": finite(self.epsilon), "bounds": bounds, "attack_sentences": words}
        values: dict[str, Any] = json.loads(json.dumps(plain, allow_nan=False))
        return values

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def attack_sentences(self) -> list[str]:
        """Return in words what any attacker can do; empty where it was not asked for."""
        return [] if self.attacks is None else attack_sentences(self.attacks)

    def __str__(self) -> str:
        low, high = self.expected_batch_size
        size = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        rates = [q for _, q, _ in self.history] or [low / self.dataset_size]
        rate = f"{rates[0]:.6g}" if min(rates) == max(rates) else f"{min(rates):.6g} to {max(rates):.6g}"
        others = "".join(f"; {name}: {e:.4f}" for name, e in self.bounds.items() if name != self.accountant)
        lines = [
            f"({self.epsilon:.4f}, {self.delta:g})-differential privacy by {self.accountant} accounting{others}",
            f"  protects        {self.unit}",
            f"  neighbours      {self.adjacency}",
            f"  sampling        {self.sampling}, N = {self.dataset_size}, expected batch {size}, rate q = {rate}",
            f"  steps           {self.steps}",
            f"  noise           multiplier {self.noise_multiplier:.4f} "
            f"(gradient {self.gradient_noise_multiplier:.4f} C), {self.noise_source}",
            f"  clipping        {self.clip_policy}, next C = {self.max_grad_norm:.4g}",
            f"  released        {'; '.join(self.released)}",
            *([f"  learning rate   {self.learning_rate}"] if self.learning_rate is not None else []),
            *([f"  ledger          {self.ledger}"] if self.ledger is not None else []),
            *(f"  attackers       {sentence}" for sentence in self.attack_sentences()),
            *(f"  WARNING         {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def make_report(
    optimizer: AdaptiveClipDPOptimizer,
    plan: SamplingPlan,
    *,
    bounds: dict[str, float],
    attacks: AttackBounds | None = None,
    delta: float,
    adjacency: str,
    history: list[tuple[float, float, int]],
    notes: Sequence[str] = (),
    unknown_batches: int = 0,
    ledger: str | None = None,
) -> PrivacyReport:
    """Put together the statement of a run from its parts; nothing private enters.

    Args:
        optimizer: the private optimizer.
        plan: its sampling plan.
        bounds: every epsilon that holds at ``delta``, by method.
        attacks: what any attacker can do at most, or None.
        delta: delta.
        adjacency: neighbouring relation under which they hold.
        history: accounted (noise multiplier, sample rate, steps).
        notes: what the account says beside its bounds (:meth:`opacus_ac.budget.account.Account.notes`).
        unknown_batches: steps on batches of unknown origin.
        ledger: the ledger in words.
    """
    accountant = min(bounds, key=lambda name: bounds[name])
    sizes = [rate * plan.sizes.dataset_size for _, rate, _ in history if plan.sampling != "shuffled"]
    sizes = sizes or [plan.sizes.expected(0)]
    inner = optimizer.original_optimizer
    return PrivacyReport(
        epsilon=bounds[accountant],
        delta=delta,
        accountant=accountant,
        bounds=bounds,
        attacks=attacks,
        unit=privacy_unit(plan.max_rows_per_user),
        adjacency=adjacency,
        sampling=plan.sampling,
        dataset_size=plan.sizes.dataset_size,
        expected_batch_size=(min(sizes), max(sizes)),
        history=history,
        steps=optimizer.steps_taken,
        noise_multiplier=optimizer.mechanism.noise_multiplier,
        gradient_noise_multiplier=optimizer.mechanism.gradient_multiplier(optimizer.statistics),
        clip_policy=optimizer.policy.name,
        max_grad_norm=optimizer.max_grad_norm,
        released=_released(optimizer),
        noise_source=optimizer.mechanism.stream.description,
        ledger=ledger,
        learning_rate=inner.describe() if isinstance(inner, AutoAdam) else None,
        warnings=_warnings(optimizer, delta, plan.sizes.dataset_size, unknown_batches, notes),
    )


def _released(optimizer: AdaptiveClipDPOptimizer) -> list[str]:
    """Say in words what every step releases."""
    parts = [part for part in optimizer.parts.values() if part is not None]
    return [optimizer.sum_description, *(line for part in parts for line in part.released())]


def _warnings(
    optimizer: AdaptiveClipDPOptimizer, delta: float, records: int, unknown_batches: int, notes: Sequence[str]
) -> list[str]:
    """Say what a reader of the claim must know."""
    found = [line for part in optimizer.parts.values() if part is not None for line in part.warnings()]
    found += weak_promise(None, delta, records)
    if isinstance(optimizer.original_optimizer, AutoAdam):
        found += optimizer.original_optimizer.warnings()
    found += notes
    if unknown_batches:
        found.append(f"{unknown_batches} steps on batches of unknown origin were charged at sample rate 1")
    return found
