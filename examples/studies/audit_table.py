"""Claimed epsilon against audited lower bound, per step, for this package, the published rule and Opacus's clippers.

    python examples/studies/audit_table.py --steps 10000
    python examples/studies/audit_table.py --power        # how many observations a canary audit needs

Every mechanism claims noise multiplier z. Given the other records of a batch, one step then claims to be a Gaussian
mechanism with mu = 1 / z; the sampler's coin puts a canary into each batch or not, and the test is the same for all. Where
an adaptive rule publishes its clipping norm, that is part of what is tested. Other libraries are used as they document.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import opacus
import torch
from opacus.utils.adaptive_clipping.adaptive_clipping_utils import PrivacyEngineAdaptiveClipping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac.audit import canary_audit, scalar_audit
from opacus_ac.audit.bounds import gaussian_epsilon, mu_from_errors, mu_from_means

RECORDS, FEATURES, BATCH = 64, 8, 32
DELTA = 1e-5
CANARY = RECORDS - 1  # the last record: the only one with a value in the last feature


@dataclass
class Row:
    """Lower bounds of epsilon by two tests; None where a test was not made."""

    mechanism: str
    observed: str
    threshold: float
    means: float | None


class Task:
    """Two classes, one linear layer that is put back to zero after every step; C = 1.

    At zero weights a record's gradient has norm ``|x| / sqrt(2)``. All ordinary records are well above C; the canary has
    norm ``norm`` in a feature of its own.
    """

    def __init__(self, norm: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.zeros(RECORDS, FEATURES + 1)
        directions = nn.functional.normalize(torch.randn(CANARY, FEATURES, generator=generator), dim=1)
        inputs[:CANARY, :FEATURES] = 10 * directions
        inputs[CANARY, FEATURES] = norm * math.sqrt(2)
        targets = torch.randint(0, 2, (RECORDS,), generator=generator)
        self.dataset = TensorDataset(torch.arange(RECORDS), inputs, targets)
        slope = torch.tensor([0.5, 0.5])
        slope[targets[CANARY]] = -0.5
        self.direction = slope * math.sqrt(2)

    def model(self) -> nn.Module:
        model = nn.Linear(FEATURES + 1, 2, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=BATCH)

    def along(self, gradient: Tensor) -> float:
        """Length of ``gradient`` along the canary's."""
        return float(self.direction @ gradient[:, FEATURES])


def batches(loader: DataLoader[Any], steps: int) -> Iterator[tuple[int, Tensor, Tensor, bool]]:
    """Yield (records beside the canary, inputs, targets, whether the canary is in) of ``steps`` Poisson batches."""
    taken = 0
    while taken < steps:
        for numbers, inputs, targets in loader:
            inside = bool((numbers == CANARY).any())
            yield len(numbers) - inside, inputs, targets, inside
            taken += 1
            if taken == steps:
                return


def row(mechanism: str, observed: str, seen: list[tuple[bool, float]], alpha: float, middle: float = 0.5) -> Row:
    """Bounds from (in or out, statistic); the threshold is fixed beforehand."""
    inside, values = np.array([i for i, _ in seen]), np.array([v for _, v in seen])
    ins, outs = values[inside], values[~inside]
    errors = (int((outs > middle).sum()), outs.size, int((ins <= middle).sum()), ins.size)
    bounds = (gaussian_epsilon(mu, DELTA) for mu in (mu_from_errors(*errors, alpha), mu_from_means(ins, outs, alpha)))
    return Row(mechanism, observed, *bounds)


def opacus_flat(z: float, steps: int, seed: int, alpha: float) -> Row:
    torch.manual_seed(seed)
    task = Task(1e4, seed)
    bare = task.model()
    model, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=bare,
        optimizer=torch.optim.SGD(bare.parameters(), lr=0.0),
        data_loader=task.loader(),
        noise_multiplier=z,
        max_grad_norm=1.0,
    )
    seen = []
    for _, inputs, targets, inside in batches(loader, steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        seen.append((inside, task.along(bare.weight.grad) * BATCH))
    return row("Opacus, flat", "gradient", seen, alpha)


def opacus_hooks(z: float, steps: int, seed: int, alpha: float, count_std: float) -> Row:
    """``PrivacyEngine(clipping="adaptive")``; it publishes C, and with it the noisy fraction of unclipped records."""
    torch.manual_seed(seed)
    task, rate, target = Task(0.999, seed), 0.2, 0.5
    bare = task.model()
    model, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=bare,
        optimizer=torch.optim.SGD(bare.parameters(), lr=0.0),
        data_loader=task.loader(),
        noise_multiplier=z,
        max_grad_norm=1.0,
        clipping="adaptive",
        grad_sample_mode="hooks",
        target_unclipped_quantile=target,
        clipbound_learning_rate=rate,
        max_clipbound=1e8,
        min_clipbound=1e-8,
        unclipped_num_std=count_std,
    )
    gradient_std = (z**-2 - (2 * count_std) ** -2) ** -0.5
    trust = np.array([gradient_std**-2, count_std**-2])
    seen = []
    for others, inputs, targets, inside in batches(loader, steps):
        optimizer.max_grad_norm = 1.0  # every step from the same state, in which the canary's norm is just below C
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        fraction = target - math.log(float(optimizer.max_grad_norm)) / rate
        both = np.array([task.along(bare.weight.grad) * BATCH, fraction * others])
        seen.append((inside, float(trust @ both / trust.sum())))
    return row(f'Opacus, clipping="adaptive", unclipped_num_std={count_std:g}', "gradient and C", seen, alpha)


def opacus_ghost(z: float, steps: int, seed: int, alpha: float) -> Row:
    """``PrivacyEngineAdaptiveClipping`` with a criterion of reduction "mean", which its constructor asks for."""
    torch.manual_seed(seed)
    task = Task(1e4, seed)
    bare = task.model()
    model, optimizer, criterion, loader = PrivacyEngineAdaptiveClipping().make_private(
        module=bare,
        optimizer=torch.optim.SGD(bare.parameters(), lr=0.0),
        data_loader=task.loader(),
        criterion=nn.CrossEntropyLoss(reduction="mean"),
        noise_multiplier=z,
        max_grad_norm=1.0,
        grad_sample_mode="ghost",
        target_unclipped_quantile=0.5,
        min_clipbound=0.1,
    )
    seen = []
    for others, inputs, targets, inside in batches(loader, steps):
        if others <= 10 * z:
            continue  # its assertion on the batch size would stop the run
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()
        seen.append((inside, task.along(bare.weight.grad) * BATCH / float(optimizer.max_grad_norm)))
    return row("Opacus, PrivacyEngineAdaptiveClipping (ghost)", "gradient", seen, alpha, 3.0)


def micro_batches(z: float, steps: int, seed: int, alpha: float, size: int = 4) -> Row:
    """The published clipping: the summed gradient of each micro-batch of ``size`` is clipped to C size, noise z C."""
    task = Task(1e4, seed)
    model = task.model()
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(steps):
        chosen = torch.from_numpy(np.flatnonzero(rng.random(RECORDS) < BATCH / RECORDS))
        _, inputs, targets = task.dataset[chosen]
        total = z * torch.from_numpy(rng.normal(size=(2, FEATURES + 1))).float()
        for x, y in zip(inputs.split(size), targets.split(size), strict=True):
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), model.weight)
            total += gradient * min(1.0, size / float(gradient.norm()))
        seen.append((bool((chosen == CANARY).any()), task.along(total)))
    return row(f"published rule, micro-batches of {size}", "gradient", seen, alpha, size / 2)


def ours(z: float, steps: int, seed: int, confidence: float, name: str, **settings: Any) -> Row:
    result = canary_audit(noise_multiplier=z, steps=steps, seed=seed, confidence=confidence, delta=DELTA, **settings)
    threshold, means = (result.finding(check).epsilon for check in ("canary, threshold", "canary, Gaussian"))
    assert threshold is not None
    return Row(name, "gradient and histogram", threshold, means)


def raw_rule(z: float, runs: int, seed: int, confidence: float) -> Row:
    """C of the published rule, read after one step."""
    result = scalar_audit(
        noise_multiplier=z,
        runs=runs,
        steps=1,
        seed=seed,
        confidence=confidence,
        delta=DELTA,
        clip_policy="raw_percentile",
    )
    shown = result.finding("record readable").epsilon
    assert shown is not None
    return Row("published rule, percentile of raw norms", f"C alone, {2 * runs} steps", shown, None)


def show(rows: list[Row], z: float) -> None:
    claim = gaussian_epsilon(1 / z, DELTA)
    print("| Mechanism | Observed | Claimed epsilon | Shown by a threshold | Shown by Gaussian means | |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        refuted = "**refuted**" if max(r.threshold, r.means or 0.0) > claim else ""
        means = "–" if r.means is None else f">= {r.means:.2f}"
        print(f"| {r.mechanism} | {r.observed} | {claim:.2f} | >= {r.threshold:.2f} | {means} | {refuted} |")


SIZES = (100, 200, 300, 500, 700, 1000, 1500, 2000, 3000, 5000, 7000, 10_000, 15_000, 20_000, 30_000)


def observations_needed(mu: float, error: float, bound: Callable[[Any, Any], float], seed: int) -> int | None:
    """Return the first of ``SIZES`` at which 95 of 100 simulated audits find more than the claim ``mu``."""
    rng = np.random.default_rng(seed)
    for size in SIZES:
        refuted = 0
        for _ in range(100):
            coins = rng.random(size) < 0.5
            values = coins + rng.standard_normal(size) / (mu * error)
            refuted += bound(values[coins], values[~coins]) > mu
        if refuted >= 95:
            return size
    return None


def power(seed: int, alpha: float) -> None:
    """Print the observations that a canary audit needs to refute noise that is too small."""

    def by_threshold(ins: Any, outs: Any) -> float:
        return mu_from_errors(int((outs > 0.5).sum()), outs.size, int((ins <= 0.5).sum()), ins.size, alpha)

    def by_means(ins: Any, outs: Any) -> float:
        return mu_from_means(ins, outs, alpha)

    print("| Claimed mu | noise half as large: threshold, means | noise variance half as large: threshold, means |")
    print("|---|---|---|")
    for mu in (2.0, 1.0, 0.5, 0.3):
        cells = [
            ", ".join(str(observations_needed(mu, error, bound, seed)) for bound in (by_threshold, by_means))
            for error in (2.0, math.sqrt(2))
        ]
        print(f"| {mu:g} | {cells[0]} | {cells[1]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--noise-multiplier", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--confidence", type=float, default=0.999)
    parser.add_argument(
        "--power", action="store_true", help="print the observations that a canary audit needs, and stop"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    z, steps, seed, confidence = options.noise_multiplier, options.steps, options.seed, options.confidence
    alpha = (1 - confidence) / 4  # as in canary_audit
    if options.power:
        power(seed, alpha)
        return
    made: list[Callable[[], Row]] = [
        lambda: ours(z, steps, seed, confidence, "opacus_ac, percentile"),
        lambda: ours(z, steps, seed, confidence, "opacus_ac, geometric, hooks", clip_policy="geometric", grad_sample_mode="hooks"),
        lambda: opacus_flat(z, steps, seed, alpha),
        lambda: raw_rule(z, 400, seed, confidence),
        lambda: micro_batches(z, steps, seed, alpha),
        lambda: opacus_hooks(z, steps, seed, alpha, 1.0),
        lambda: opacus_hooks(z, steps, seed, alpha, BATCH / 20),
        lambda: opacus_ghost(z, steps, seed, alpha),
    ]  # fmt: skip
    print(
        f"opacus {version('opacus')}, torch {torch.__version__}, z = {z:g}, {steps} steps, delta = {DELTA:g}, seed {seed},"
    )
    print(f"confidence {confidence:g} per row\n")
    show([make() for make in made], z)


if __name__ == "__main__":
    main()
