"""What one record can move under a clip policy, and what the policy learns from."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from opacus_ac.allocation.settings import NoiseAllocation
from opacus_ac.allocation.weights import GroupWeights
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.release.statistics import StepStatistics
from opacus_ac.release.values import StepRelease

MakePolicy = Callable[[float], ClipPolicy]

_BOUNDS = (1e-3, 0.7, 1.0, 200.0)
_STATISTICS: dict[str, dict[str, Any]] = {
    "no histogram": {"histogram": False},
    "histogram": {},
    "histogram of unclipped records": {"histogram_weight": 0.0},
    "heavy histogram": {"histogram_weight": 1.5, "bins": 7},
    "histogram and loss": {"loss_bound": 10.0},
}
_STEPS, _BATCH = 12, 48


def optimizer_by_hand(gradients: Tensor, *, losses: Tensor | None = None, **kwargs: Any) -> AdaptiveClipDPOptimizer:
    """Return a private optimizer around SGD with the given per-sample gradients ``[B, d]``, ready for its step.

    Args:
        gradients: one row per record; d at least 2, split over two parameters.
        losses: of the records ``[B]``, where the release has a noisy loss.
        **kwargs: arguments of the optimizer; by default no noise, C0 = 1, public batch size 1.
    """
    cut = min(2, gradients.shape[1] - 1)
    sizes = (cut, gradients.shape[1] - cut)
    parameters = [nn.Parameter(torch.zeros(size, dtype=gradients.dtype)) for size in sizes]
    arguments = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1, **kwargs}
    if isinstance(allocation := arguments.get("allocation"), NoiseAllocation):
        arguments["allocation"] = GroupWeights(allocation, parameters, ["first", "second"])
    optimizer = AdaptiveClipDPOptimizer(torch.optim.SGD(parameters, lr=1.0), **arguments)
    for parameter, rows in zip(parameters, gradients.split(sizes, dim=1), strict=True):
        parameter.grad_sample = rows.clone()  # type: ignore[attr-defined]
    if losses is not None:
        optimizer.record_losses(losses)
    return optimizer


def released_vector(gradients: Tensor, losses: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Return what one step would release of these records without noise, in units of C: ``[d + statistics]``."""
    optimizer = optimizer_by_hand(gradients, losses=losses, **kwargs)
    optimizer.clip_and_accumulate()
    sums = [p.summed_grad for p in optimizer.params]  # type: ignore[attr-defined]
    summed = torch.cat([total.reshape(-1) for total in sums]) / optimizer.max_grad_norm
    return torch.cat([summed.double(), torch.from_numpy(optimizer.statistics.vector())])


def check_clip_policy(make_policy: MakePolicy, *, trials: int = 10, seed: int = 0) -> float:
    """Check what a clip policy promises: bounded influence of a record, honest slack, a C that follows releases alone.

    Args:
        make_policy: makes a fresh policy from C0.
        trials: random batches per kind of statistics and C0.
        seed: of the batches and of the simulated run.

    Returns:
        The largest move of a release by one record that was found, as a share of the declared sensitivity.

    Guarantees:
        This is a search, not a proof. It covers gradients of norm C times 10^-6 to 10^6 and non-finite ones, at four
        C0, with every kind of statistics, and a run of 12 noisy steps, which a second policy must repeat from the
        releases alone.

    Raises:
        AssertionError: If a promise is broken; the message names it, with C0 and the numbers.

    Example:
        >>> from opacus_ac.clipping.policy import GeometricPolicy
        >>> round(check_clip_policy(GeometricPolicy), 6)
        1.0
    """
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for bound in _BOUNDS:
        _check_factors(make_policy(bound))
        for name, settings in _STATISTICS.items():
            if settings.get("histogram", True) or not make_policy(bound).needs_histogram:
                for _ in range(trials):
                    worst = max(worst, _largest_move(make_policy, bound, name, settings, generator))
        _check_run(make_policy, bound, generator)
    return worst


def _check_factors(policy: ClipPolicy) -> None:
    """Factors bound every norm, drop what is not finite, and keep to the share that ``gradient_share`` declares."""
    bound = policy.bound
    ratios = np.concatenate([[0.0], np.logspace(-8, 8, 321)])
    norms = torch.from_numpy(ratios * bound)
    factors = policy.factors(norms)
    if not bool((torch.isfinite(factors) & (factors >= 0)).all()):
        raise AssertionError(f"factors must be finite and >= 0; C = {bound:g}")
    share = (factors * norms / bound).numpy()
    i = int(share.argmax())
    if share[i] > 1 + 1e-12:
        raise AssertionError(
            f"a gradient of norm {ratios[i]:g} C keeps the norm {share[i]:g} C, more than C = {bound:g}"
        )
    left = policy.factors(torch.tensor([math.inf, math.nan], dtype=torch.float64))
    if left.tolist() != [0.0, 0.0]:
        raise AssertionError(f"records with a non-finite norm must get the factor 0, not {left.tolist()}")
    # Of all records up to the upper edge of a bin, none may have a larger share than was declared for the bin.
    declared = np.asarray(policy.gradient_share(ratios))
    largest = np.maximum.accumulate(share)
    j = int((largest - declared).argmax())
    if largest[j] > declared[j] + 1e-12:
        raise AssertionError(
            f"gradient_share({ratios[j]:g}) is {declared[j]:g}, but a gradient of norm up to {ratios[j]:g} C keeps "
            f"{largest[j]:g} C: the histogram would use room that is not there"
        )


def _draw(generator: torch.Generator, records: int, bound: float) -> Tensor:
    """Gradients of random directions and of norms from 10^-6 C to 10^6 C, ``[records, 5]``."""
    directions = torch.randn(records, 5, generator=generator, dtype=torch.float64)
    exponents = torch.rand(records, 1, generator=generator, dtype=torch.float64) * 12 - 6
    near = torch.rand(records, 1, generator=generator) < 0.5  # half of them within a factor of 10 of C
    sizes = bound * 10 ** torch.where(near, exponents / 6, exponents)
    return directions / directions.norm(dim=1, keepdim=True) * sizes


def _largest_move(
    make_policy: MakePolicy, bound: float, name: str, settings: dict[str, Any], generator: torch.Generator
) -> float:
    """The move of the release by one record over the declared sensitivity, for a record of each kind."""
    statistics = StepStatistics(**settings)

    def release(rows: Tensor) -> Tensor:
        losses = None if statistics.loss_bound is None else rows.norm(dim=1) * 1e3
        try:
            return released_vector(
                rows,
                losses,
                clip_policy=make_policy(bound),
                max_grad_norm=bound,
                statistics=statistics,
                lr_control=False,
            )
        except ValueError as error:  # the step itself holds a policy to C and to its gradient_share
            raise AssertionError(f"with {name} and C = {bound:g}, a step is refused: {error}") from error

    batch = _draw(generator, 3, bound)
    before, worst = release(batch), 0.0
    for value in (None, math.nan, math.inf):
        extra = _draw(generator, 1, bound)
        if value is not None:
            extra[0, 1] = value
        moved = float((release(torch.cat([batch, extra])) - before).norm()) / statistics.sensitivity
        if not moved <= 1 + 1e-9:
            raise AssertionError(
                f"with {name} and C = {bound:g}, a record of norm {float(extra.norm()):g} moves the release by "
                f"{moved:.4f} times the declared sensitivity"
            )
        worst = max(worst, moved)
    return worst


def _check_run(make_policy: MakePolicy, bound: float, generator: torch.Generator) -> None:
    """Run some noisy steps; C must stay in its range, and follow from releases alone."""
    policy = make_policy(bound)
    releases, chosen, rates = _run(policy, generator)
    for step, value in enumerate(chosen, 1):
        if not (math.isfinite(value) and policy.min_norm <= value <= policy.max_norm):
            raise AssertionError(
                f"C = {value!r} after step {step} is outside of [{policy.min_norm!r}, {policy.max_norm!r}]"
            )
    if not policy.is_private:
        return
    halfway = make_policy(bound)
    for step, release in enumerate(releases):
        if step == _STEPS // 2:
            halfway = _reloaded(halfway, make_policy(bound))
        halfway.update(release)
        if halfway.bound != chosen[step] or halfway.clip_rate(release) != rates[step]:
            raise AssertionError(
                f"step {step + 1}: the same releases, without the records (and through state_dict at step "
                f"{_STEPS // 2}), lead to C = {halfway.bound!r} and clip rate {halfway.clip_rate(release)!r}, the run "
                f"had {chosen[step]!r} and {rates[step]!r}. A private policy is a function of its releases, and its "
                "state_dict has all of its state"
            )


def _run(policy: ClipPolicy, generator: torch.Generator) -> tuple[list[StepRelease], list[float], list[float | None]]:
    """Take steps on records whose norms fall.

    Returns the releases, the C after each, and the clip rate that steers the learning rate.
    """
    optimizer = optimizer_by_hand(
        _draw(generator, _BATCH, policy.bound), clip_policy=policy, max_grad_norm=policy.bound, noise_multiplier=1.0,
        expected_batch_size=_BATCH, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    typical = 30 * policy.bound
    releases, chosen, rates = [], [], []
    for step in range(_STEPS):
        rows = torch.randn(_BATCH, 5, generator=generator, dtype=torch.float64) * typical * 0.9**step
        for parameter, part in zip(optimizer.params, rows.split([p.numel() for p in optimizer.params], 1), strict=True):
            parameter.grad_sample = part  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.released is not None
        releases.append(optimizer.released)
        chosen.append(policy.bound)
        rates.append(policy.clip_rate(optimizer.released))
    return releases, chosen, rates


def _reloaded(policy: ClipPolicy, fresh: ClipPolicy) -> ClipPolicy:
    """``policy`` after its state went through plain values, as in a checkpoint."""
    state = copy.deepcopy(policy.state_dict())
    try:
        state = json.loads(json.dumps(state))
    except TypeError as error:
        raise AssertionError(f"state_dict must have plain values (numbers, strings, lists, dicts): {error}") from error
    fresh.load_state_dict(state)
    return fresh
