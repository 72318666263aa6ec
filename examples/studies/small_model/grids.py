"""Which cells a study has: the paper's questions, how the clipping norm matters, and what a run of 20 minutes can hold."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from common.tone_dialogues import TONES
from small_model.cell import Cell
from small_model.methods import METHODS
from small_model.public import MODELS

Seeds = tuple[int, ...]
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0)
MAIN = ("adamw-flat", "dp-adam-ac")
OTHERS = ("dp-adam-ac+", "dp-sgd", "opacus-adaptive")
PARTS = tuple(name for name in METHODS if name.startswith("dp-adam-ac+ without"))
DE_NOISED = "dp-adam-ac+ without EMA"
REFERENCES = ("paper-raw", "non-private")
SEEDS: Seeds = (0, 1, 2)


def full(seeds: Seeds = SEEDS) -> list[Cell]:
    """Both models and tones: flat beside adaptive at every epsilon, every other method, each part removed, and no noise.

    The other methods run at every epsilon for the small language model and at 4 for the ternary one, as does what lacks a part for both.
    """
    places = list(product(seeds, TONES))

    def rows(model: str, methods: tuple[str, ...], epsilons: tuple[float, ...]) -> list[Cell]:
        return [
            Cell(method, model, tone, epsilon, seed)
            for (seed, tone), epsilon, method in product(places, epsilons, methods)
        ]

    cells = (
        rows("llama", MAIN, EPSILONS)
        + references(seeds)
        + rows("llama", OTHERS, (4.0,))
        + rows("bitnet", MAIN, (1.0, 4.0, 16.0))
    )
    return (
        cells
        + rows("llama", PARTS, (4.0,))
        + rows("bitnet", OTHERS, (4.0,))
        + rows("bitnet", MAIN, (2.0, 8.0))
        + rows("bitnet", PARTS, (4.0,))
        + rows("llama", OTHERS, (1.0, 2.0, 8.0, 16.0))
    )


def references(seeds: Seeds, tones: tuple[str, ...] = TONES) -> list[Cell]:
    """Rows without a finite epsilon."""
    return [
        Cell(method, model, tone, None, seed) for seed, model, tone, method in product(seeds, MODELS, tones, REFERENCES)
    ]


RATES = {"adamw": (0.006, 0.012), "dp-adamw": (0.002, 0.004), "sgd": (0.2, 0.5)}
FLAT, ADAPTIVE = (0.01, 1.0, 10.0, 100.0), (0.01, 1.0, 100.0)


def tuning(seeds: Seeds = SEEDS) -> list[Cell]:
    """Flat C over four decades and the default from three C0, with two learning rates each, in half as many steps.

    SGD's step is in proportion to C, so its learning rates are for C = 1 and divided by C0.
    """
    cells = []
    for optimizer, data in (("adamw", "easy"), ("adamw", "heavy"), ("sgd", "easy")):
        cells += _tuned(seeds, optimizer, data, 4.0, FLAT, ADAPTIVE)
    cells += _tuned(seeds, "dp-adamw", "easy", 4.0, (1.0,), (1.0,))
    for epsilon in (1.0, 16.0):
        cells += _tuned(seeds, "adamw", "easy", epsilon, (1.0, 10.0), (0.01, 100.0))
    return cells


def _tuned(
    seeds: Seeds, optimizer: str, data: str, epsilon: float, flat: tuple[float, ...], adaptive: tuple[float, ...]
) -> list[Cell]:
    rows = [("adamw-flat", bound) for bound in flat] + [("dp-adam-ac", bound) for bound in adaptive]
    return [
        Cell(
            method,
            epsilon=epsilon,
            seed=seed,
            rate=rate / bound if optimizer == "sgd" else rate,
            bound=bound,
            optimizer=optimizer,
            data=data,
            steps=25,
        )
        for seed, (method, bound), rate in product(seeds, rows, RATES[optimizer])
    ]


def budget(seeds: Seeds = SEEDS) -> list[Cell]:
    """Equal epsilon and equal compute: 6,000 records in batches of 200 or 400; flat with two kinds of momentum and of accounting."""
    flat = ("adamw-flat", "adamw-flat tighter")
    cells = []
    for seed in seeds:
        for batch, steps, rates in ((200, 30, (0.008, 0.012)), (400, 15, (0.008, 0.012, 0.018))):
            for method, beta1, rate in product(flat, (None, 0.5), rates):
                cells.append(Cell(method, epsilon=4.0, seed=seed, rate=rate, batch=batch, steps=steps, beta1=beta1))
            for method, rate in product(("dp-adam-ac tighter", "dp-adam-ac everything"), rates):
                cells.append(Cell(method, epsilon=4.0, seed=seed, rate=rate, batch=batch, steps=steps))
    return cells


def momentum(seeds: Seeds = SEEDS) -> list[Cell]:
    """Flat and the default from no momentum to AdamW's usual one, at the default size."""
    at_four = product(seeds, MAIN, (4.0,), (0.0, 0.5, 0.8, 0.9))
    elsewhere = product(seeds, MAIN, (1.0, 16.0), (0.5, 0.9))
    return [
        Cell(method, epsilon=epsilon, seed=seed, rate=0.008, beta1=beta1)
        for seed, method, epsilon, beta1 in (*at_four, *elsewhere)
    ]


def lengths(seeds: Seeds = (0,)) -> list[Cell]:
    """The default in runs of 30 to 1,000 steps: the last weights beside the averaged ones, of one run each."""
    rates = {30: (0.008,), 100: (0.008,), 300: (0.008, 0.002), 1000: (0.008, 0.002)}
    return [
        Cell("dp-adam-ac", seed=seed, steps=steps, rate=rate)
        for seed, (steps, own) in product(seeds, rates.items())
        for rate in own
    ]


LONG_RATES = {
    300: {"adamw-flat": (0.002, 0.004, 0.008), "dp-adam-ac": (0.002, 0.004, 0.008), DE_NOISED: (0.001, 0.002, 0.004)},
    1000: {"adamw-flat": (0.001,), "dp-adam-ac": (0.001, 0.002), DE_NOISED: (0.0005, 0.001)},
}


def long(seeds: Seeds = SEEDS) -> list[Cell]:
    """Parts of DP-Adam-AC in runs that are long enough for averages and rate control to act, at several rates each.

    Flat C beside the default, and the default around noise-corrected Adam. Every run with an average gives both its
    last and its averaged weights.
    """
    return [
        Cell(method, seed=seed, steps=steps, rate=rate)
        for steps, of_method in LONG_RATES.items()
        for seed in seeds
        for method, rates in of_method.items()
        for rate in rates
    ]


def quick(seeds: Seeds = (0,)) -> list[Cell]:
    """One tone; two epsilons for each model, each part removed once, and a short row of C0."""
    tone = TONES[0]
    cells = [
        Cell(method, model, tone, epsilon, seed)
        for seed, model, epsilon, method in product(seeds, MODELS, (1.0, 4.0), MAIN)
    ]
    cells += [Cell(method, MODELS[0], tone, 4.0, seed) for seed, method in product(seeds, (*PARTS, *OTHERS))]
    rows = [("adamw-flat", bound) for bound in (1.0, 10.0, 100.0)] + [("dp-adam-ac", bound) for bound in (0.01, 100.0)]
    short = [
        Cell(m, seed=seed, rate=0.008, bound=bound, optimizer="adamw", steps=25)
        for seed, (m, bound) in product(seeds, rows)
    ]
    return cells + references(seeds, (tone,)) + short


GRIDS: dict[str, Callable[..., list[Cell]]] = {
    "full": full,
    "tuning": tuning,
    "budget": budget,
    "momentum": momentum,
    "lengths": lengths,
    "long": long,
    "quick": quick,
}
