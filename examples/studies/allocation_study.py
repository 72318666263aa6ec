"""Which source of weights for noise allocation finds the optimum, and what does it cost?  Synthetic gradients, real steps.

    python examples/studies/allocation_study.py                    # a table; about two minutes

A record's gradient in group g has the rms norm ``G_g``, of which a part points the same way for all records. Steps are taken by the
private optimizer with its default clip policy. Shown is the noise energy that the formula of docs/allocation.md gives for the
learned weights, over that of equal weights, mean over the seeds; what a source pays for is part of it. Noise is seeded, so that the
table is the same at every run.
"""

from __future__ import annotations

import argparse
import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from opacus_ac.allocation import GroupWeights, NoiseAllocation, optimal_weights
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.optimizer import AdaptiveClipDPOptimizer

SOURCES = {
    "dimension": NoiseAllocation("dimension"),
    "history": NoiseAllocation("history", warmup=3),
    "paid": NoiseAllocation("paid"),
}


@dataclass(frozen=True)
class Setting:
    """Groups of parameters, and how the records' gradients are in them.

    Attributes:
        sizes: numbers of coordinates.
        norms: root mean square of the records' gradient norms.
        shared: the part of a norm that points the same way for all records, in [0, 1].
        active: the fraction of the records that have a gradient there at all.
        batch: records in a step.
        noise_multiplier: noise over the joint sensitivity.
    """

    sizes: tuple[int, ...]
    norms: tuple[float, ...]
    shared: tuple[float, ...]
    active: tuple[float, ...] = ()
    batch: int = 64
    noise_multiplier: float = 1.0


def spread(low: float, count: int) -> tuple[float, ...]:
    return tuple(float(x) for x in np.geomspace(low, 1.0, count))


SETTINGS = {
    "two groups, means in proportion to norms": Setting((900, 100), (0.1, 1.0), (0.5, 0.5)),
    "two groups, the large gradients cancel": Setting((1000, 1000), (1.0, 0.1), (0.0, 1.0), batch=256),
    "20 groups, weak signal": Setting((1000,) * 20, spread(0.1, 20), (0.3,) * 20, batch=32),
    "20 groups, strong signal": Setting((1000,) * 20, spread(0.1, 20), (0.3,) * 20, batch=192),
    "20 groups, half of them in 5 % of the records": Setting(
        (1000,) * 20, spread(0.1, 20), (0.3,) * 20, (0.05,) * 10 + (1.0,) * 10
    ),
    "20 groups, nothing to gain": Setting((1000,) * 20, (1.0,) * 20, (0.3,) * 20),
}


def record_gradients(setting: Setting, generator: torch.Generator) -> list[Tensor]:
    """Return the records' gradients ``[B, d_g]`` of each group."""
    active = setting.active or (1.0,) * len(setting.sizes)
    rows = []
    for size, norm, part, rate in zip(setting.sizes, setting.norms, setting.shared, active, strict=True):
        own = torch.randn(setting.batch, size, generator=generator, dtype=torch.float64) / math.sqrt(size)
        given = torch.rand(setting.batch, 1, generator=generator, dtype=torch.float64) < rate
        rows.append(norm / math.sqrt(rate) * given * (part / math.sqrt(size) + math.sqrt(1 - part**2) * own))
    return rows


def noise_energy(weights: list[float], setting: Setting) -> float:
    """Return the noise energy by the theory, with C in proportion to the rms of the scaled norms, over that of equal weights."""

    def energy(w: list[float]) -> float:
        bound = sum((each * norm) ** 2 for each, norm in zip(w, setting.norms, strict=True))
        return bound * sum(d / each**2 for each, d in zip(w, setting.sizes, strict=True))

    return energy(weights) / energy([1.0] * len(weights))


def learned_energy(allocation: NoiseAllocation, setting: Setting, steps: int, seed: int) -> float:
    """Return the noise energy after some steps, what the release of the source costs included."""
    parameters = [nn.Parameter(torch.zeros(d, dtype=torch.float64)) for d in setting.sizes]
    optimizer = AdaptiveClipDPOptimizer(
        torch.optim.SGD(parameters, lr=0.0),
        noise_multiplier=setting.noise_multiplier,
        max_grad_norm=0.5,
        expected_batch_size=setting.batch,
        lr_control=False,
        ema_decay=None,
        allocation=GroupWeights(allocation, parameters, [str(i) for i in range(len(parameters))]),
        generator=torch.Generator().manual_seed(seed),
    )
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(steps):
        for parameter, rows in zip(parameters, record_gradients(setting, generator), strict=True):
            parameter.grad_sample = rows
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.allocation is not None
    cost = optimizer.statistics.sensitivity**2 / (1 + optimizer.statistics.histogram_weight**2)
    return cost * noise_energy(optimizer.allocation.weights, setting)


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict[int, float]]]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 40])
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=NotPrivateWarning)
    found: dict[str, dict[str, dict[int, float]]] = {}
    print(
        "| noise energy, equal weights = 1 | optimum | "
        + " | ".join(f"{s}, {n} steps" for s in SOURCES for n in args.steps)
        + " |"
    )
    print("|---" * (2 + len(SOURCES) * len(args.steps)) + "|")
    for name, setting in SETTINGS.items():
        found[name] = {
            source: {
                n: sum(learned_energy(allocation, setting, n, 10 * s) for s in range(args.seeds)) / args.seeds
                for n in args.steps
            }
            for source, allocation in SOURCES.items()
        }
        best = noise_energy(optimal_weights(setting.sizes, setting.norms), setting)
        cells = [f"{value:.2f}" for row in found[name].values() for value in row.values()]
        print(f"| {name} | {best:.2f} | {' | '.join(cells)} |", flush=True)
    return found


if __name__ == "__main__":
    main()
