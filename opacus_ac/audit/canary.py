"""White-box canary audit: one record, in or out of each step by the sampler's own coin, against the step's claim."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from opacus_ac.audit.bounds import (
    count_p_value,
    gaussian_epsilon,
    mu_from_errors,
    mu_from_means,
)
from opacus_ac.audit.noise import spread_finding
from opacus_ac.audit.published import Published
from opacus_ac.audit.result import AuditResult, Finding, check_confidence
from opacus_ac.audit.task import CanaryTask, Task, endless
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.release.values import FloatArray, StepRelease
from opacus_ac.sampling.loader import PrivateDataLoader
from opacus_ac.zeroth_order.settings import preset

MakePrivate = Callable[..., tuple[Any, AdaptiveClipDPOptimizer, PrivateDataLoader]]
Indices = npt.NDArray[np.int64]
SAMPLE_RATE = 0.5
CHECKS = 4


def _alone(values: FloatArray) -> FloatArray:
    return values


def private_parts(
    make_private: MakePrivate | None,
    task: Task,
    batch_size: int,
    seed: int | None,
    inner: Callable[[nn.Module], torch.optim.Optimizer],
    **settings: Any,
) -> tuple[nn.Module, Any, AdaptiveClipDPOptimizer, PrivateDataLoader]:
    """Return (bare model, model, optimizer, loader) of a task that was made private.

    Raises:
        ValueError: If the sampler draws no coins under these settings, or ``make_private`` refuses them.
    """
    if not settings.get("poisson_sampling", True):
        raise ValueError("the audit needs poisson_sampling=True: the sampler's draws are its coins")
    if make_private is None:
        from opacus_ac.engine.privacy_engine import PrivacyEngine

        make_private = PrivacyEngine().make_private
    paper = settings.get("zeroth_order")
    if isinstance(paper, str):
        directions = min(8, preset(paper).num_directions)
        settings = {**settings, "zeroth_order": preset(paper, num_directions=directions, direction_seed=seed)}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    bare = task.model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotPrivateWarning)
        made = make_private(
            module=bare,
            optimizer=inner(bare),
            data_loader=task.loader(batch_size),
            noise_generator=generator,
            **settings,
        )
    return bare, *made


@dataclass
class Observations:
    """What the steps of one audit showed.

    Attributes:
        inside: how often the canary was in the step's batch, ``[T]``.
        statistic: the release along the canary, 0 expected without it and 1 with it, ``[T]``.
        noise: per tensor, the noise of each step in units of its claimed std; NaN where a release shows none.
    """

    inside: list[int] = field(default_factory=list)
    statistic: list[float] = field(default_factory=list)
    noise: dict[str, list[FloatArray]] = field(default_factory=dict)

    def add_noise(self, name: str, values: FloatArray) -> None:
        """Note the noise of a tensor in one step."""
        self.noise.setdefault(name, []).append(values)

    def tables(self) -> dict[str, FloatArray]:
        """Return the noise of each tensor, ``{name: [T, D]}``."""
        return {name: np.array(values) for name, values in self.noise.items()}


class _Auditor:
    """Knows every record and the initial weights, to which it returns after each step; sees what the step publishes.

    Args:
        task: data and model.
        bare: the model that is trained.
        optimizer: the private optimizer around plain gradient descent with learning rate 1.
        holds_canary: whether this process' data hold the canary.
        sum_over_ranks: adds up a vector over the processes of a distributed run.
        noise_multiplier: z, the claim; what the optimizer says of itself is not asked.
    """

    def __init__(
        self,
        task: CanaryTask,
        bare: nn.Module,
        optimizer: AdaptiveClipDPOptimizer,
        holds_canary: bool,
        sum_over_ranks: Callable[[FloatArray], FloatArray],
        noise_multiplier: float,
    ) -> None:
        self.optimizer, self.sum_over_ranks = optimizer, sum_over_ranks
        self.std = noise_multiplier * optimizer.statistics.sensitivity
        self.published = Published(bare, optimizer)
        grads = task.gradients()
        self.sizes = {name: g.shape[1] for name, g in grads.items()}
        self.gradients = np.concatenate(list(grads.values()), axis=1)
        self.norms = np.linalg.norm(self.gradients, axis=1)
        self.own = task.canaries[0] if holds_canary else -1
        self.canary = sum_over_ranks(self.gradients[self.own] if holds_canary else 0 * self.gradients[0])
        self.seen = Observations()

    def factors(self) -> FloatArray:
        """Return every record's clip factor at the C of the step that comes, the canary's last."""
        norms = np.append(self.norms, np.linalg.norm(self.canary))
        return np.asarray(self.optimizer.policy.factors(torch.from_numpy(norms)).numpy())

    def observe(self, release: StepRelease, members: Indices, factors: FloatArray) -> None:
        """Compare what a step published with what its batch, known to the auditor, adds up to."""
        bound, std = release.max_grad_norm, self.std
        published = self.published.read()
        others = members[members != self.own]
        count = int(self.sum_over_ranks(np.array([float((members == self.own).sum())]))[0])
        rest = published - self.sum_over_ranks(factors[others] @ self.gradients[others] / bound)
        contribution = factors[-1] * self.canary / bound
        along, weight = float(rest @ contribution), float(contribution @ contribution)
        histogram = self._histogram_rest(release, others)
        if histogram is not None:
            entries, weights, group = histogram
            along += weights[group] * entries[group]
            weight += weights[group] ** 2
            entries[group] -= count * weights[group]
            self.seen.add_noise("histogram", np.where(weights > 1e-6, entries, np.nan) / std)
        self.seen.inside.append(count)
        self.seen.statistic.append(along / weight)
        noise, first = (rest - count * contribution) / std, 0
        for name, size in self.sizes.items():
            self.seen.add_noise(name, noise[first : first + size])
            first += size

    def _histogram_rest(self, release: StepRelease, others: FloatArray) -> tuple[FloatArray, FloatArray, int] | None:
        """Return (released entries less those of the other records, weight of each entry, the canary's entry)."""
        histogram = release.histogram
        if histogram is None:
            return None
        weights = release.histogram_weights
        groups = histogram.window.groups(self.norms[others])
        exact = self.sum_over_ranks(np.bincount(groups, minlength=weights.size).astype(np.float64))
        group = int(histogram.window.groups(np.array([np.linalg.norm(self.canary)]))[0])
        return weights * (histogram.counts - exact), weights, group


def _train(
    task: CanaryTask,
    model: Any,
    optimizer: AdaptiveClipDPOptimizer,
    loader: PrivateDataLoader,
    auditor: _Auditor,
    steps: int,
) -> None:
    """Run the user's loop for ``steps`` observed steps, handing each release to the auditor."""
    members: list[Indices] = []
    taken = 0
    for batch in endless(loader):
        factors = auditor.factors()
        task.backward(model, batch, optimizer)
        optimizer.step()
        members.append(task.members(batch))
        if optimizer.steps_taken == taken:
            continue  # all but the last physical batch of a step
        taken = optimizer.steps_taken
        if not optimizer.policy.searching:  # such a step keeps its gradient to itself
            assert optimizer.released is not None
            auditor.observe(optimizer.released, np.concatenate(members), factors)
        members = []
        if len(auditor.seen.inside) == steps:
            return


def _findings(seen: Observations, noise_multiplier: float, alpha: float, delta: float) -> tuple[Finding, ...]:
    """Return the findings; each check may be wrong with probability ``alpha``."""
    inside, values = np.array(seen.inside) > 0, np.array(seen.statistic)
    ins, outs = values[inside], values[~inside]
    claim = gaussian_epsilon(1 / noise_multiplier, delta)
    bounds = {
        "canary, threshold 1/2": mu_from_errors(
            int((outs > 0.5).sum()), outs.size, int((ins <= 0.5).sum()), ins.size, alpha
        ),
        "canary, Gaussian means": mu_from_means(ins, outs, alpha),
    }
    found = []
    for check, mu in bounds.items():
        epsilon = gaussian_epsilon(mu, delta)
        shown = f"epsilon >= {epsilon:.3f} (mu >= {mu:.3f})"
        promised = f"epsilon <= {claim:.3f} (mu = {1 / noise_multiplier:.3f})"
        found.append(Finding(check, promised, shown, mu > 1 / noise_multiplier, claim, epsilon))
    return (*found, spread_finding(seen.tables(), alpha), _rate_finding(inside, alpha))


def _rate_finding(inside: npt.NDArray[np.bool_], alpha: float) -> Finding:
    """Return whether the canary was drawn as often as the sampling rate says."""
    hits, trials = int(inside.sum()), inside.size
    p_value = count_p_value(hits, trials, SAMPLE_RATE)
    shown = f"drawn {hits} times of {trials} (p = {p_value:.2g})"
    return Finding("sampling rate", f"rate {SAMPLE_RATE:g}", shown, p_value < alpha)


def canary_audit(
    make_private: MakePrivate | None = None,
    *,
    noise_multiplier: float = 1.0,
    steps: int = 1000,
    confidence: float = 0.999,
    delta: float = 1e-5,
    seed: int | None = None,
    task: CanaryTask | None = None,
    holds_canary: bool = True,
    sum_over_ranks: Callable[[FloatArray], FloatArray] = _alone,
    **settings: Any,
) -> AuditResult:
    """Audit the private step as it is released, with a record made to be seen.

    A small model is made private and trained by the ordinary loop on Poisson batches of rate 1/2, so the sampler tosses
    a fair coin over the canary at every step. The auditor knows all records and all coins but the canary's, puts the
    weights back after each step, and reads the published weights and the released histogram along the canary's
    contribution. Given the other records, a step claims to be a Gaussian mechanism of noise multiplier ``z``, so that
    observation is N(0, z^2) without the canary and N(1, z^2) with it; each step is an independent observation.

    Args:
        make_private: what makes the task private, ``PrivacyEngine().make_private`` by default.
        noise_multiplier: z, the claim; passed on.
        steps: number of observations.
        confidence: of the verdict, all checks together.
        delta: delta of the epsilons.
        seed: seed of noise and sampling for a run that can be repeated; None audits the secret streams.
        task: data and model; by default 63 records and a canary.
        holds_canary: whether this process' data hold the canary; for a distributed run, one rank after the other. The
            other ranks pass a task of their own with ``strength=0``.
        sum_over_ranks: adds up a float64 vector over the processes of a distributed run.
        **settings: of ``make_private``: ``grad_sample_mode``, ``clipping``, ``clip_policy``,
            ``max_physical_batch_size``, ``fused_step``, ...

    Returns:
        Lower bounds of the step's epsilon beside its claim (for one step whose batch is known but for one record), the
        noise of every tensor, and the realised sampling rate.

    Guarantees:
        A mechanism that does what it claims is refuted with probability at most ``1 - confidence``.

    Raises:
        ValueError: If there are too few steps, there is no noise, or ``make_private`` refuses the settings.

    References:
        Nasr et al. 2023 (arXiv 2302.07956), section 4; Dong, Roth and Su 2019 (arXiv 1905.02383).
    """
    alpha = check_confidence(confidence) / CHECKS
    if steps < 100:
        raise ValueError(f"steps must be at least 100 for bounds that say anything, got {steps!r}")
    if not noise_multiplier > 0:
        raise ValueError(f"noise_multiplier must be > 0 to have a claim to audit, got {noise_multiplier!r}")
    seen, optimizer = _observe(
        make_private,
        task or CanaryTask(),
        steps,
        seed,
        {"noise_multiplier": noise_multiplier, **settings},
        holds_canary,
        sum_over_ranks,
    )
    notes = () if optimizer.policy.is_private else ("the clip policy reads raw norms; this audit does not look at C",)
    return AuditResult(
        audit="white-box canary",
        subject=describe(noise_multiplier, settings),
        observations=steps,
        confidence=confidence,
        delta=delta,
        findings=_findings(seen, noise_multiplier, alpha, delta),
        notes=notes,
    )


def _observe(
    make_private: MakePrivate | None,
    task: CanaryTask,
    steps: int,
    seed: int | None,
    settings: dict[str, Any],
    holds_canary: bool = True,
    sum_over_ranks: Callable[[FloatArray], FloatArray] = _alone,
) -> tuple[Observations, AdaptiveClipDPOptimizer]:
    """Return what ``steps`` private steps showed, and the optimizer that took them."""
    bare, model, optimizer, loader = private_parts(
        make_private,
        task,
        task.size // 2,
        seed,
        lambda module: torch.optim.SGD(module.parameters(), lr=1.0),
        **settings,
    )
    auditor = _Auditor(task, bare, optimizer, holds_canary, sum_over_ranks, settings["noise_multiplier"])
    _train(task, model, optimizer, loader, auditor, steps)
    return auditor.seen, optimizer


def observe_noise(
    make_private: MakePrivate | None, task: CanaryTask, steps: int, seed: int | None, settings: dict[str, Any]
) -> dict[str, FloatArray]:
    """Return the noise of each tensor, ``{name: [T, D]}`` in units of its claimed std: releases less the exact sums."""
    return _observe(make_private, task, steps, seed, settings)[0].tables()


def describe(noise_multiplier: float, settings: dict[str, Any]) -> str:
    """Return what is audited, in words."""
    chosen = {"grad_sample_mode": "bk", "clipping": "adaptive", **settings}
    stated = [f"{k}={v}" for k, v in chosen.items() if v is not None and v is not False]
    return f"noise multiplier {noise_multiplier:g}, {', '.join(stated)}"
