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
APART = (1.0, 4.0, 16.0)
MAIN = ("adamw-usual", "adamw-flat", "dp-adam-ac", "auto-flat")
OTHERS = ("dp-adam-ac+", "dp-sgd", "opacus-adaptive")
PARTS = tuple(name for name in METHODS if name.startswith("dp-adam-ac+ without"))
DE_NOISED = "dp-adam-ac+ without EMA"
REFERENCES = ("paper-raw", "non-private")
AS_USUAL = {"beta1": 0.9, "accountant": "vrdp"}
SEEDS: Seeds = (0, 1, 2)


def full(seeds: Seeds = SEEDS) -> list[Cell]:
    """The main methods at every epsilon, every other method, each part removed, and no noise.

    The second tone has the small language model's main methods only. The ternary model has fewer epsilons.
    """
    first, second = TONES

    def rows(model: str, tone: str, methods: tuple[str, ...], epsilons: tuple[float, ...]) -> list[Cell]:
        return [Cell(method, model, tone, epsilon, seed) for seed, epsilon, method in product(seeds, epsilons, methods)]

    return (
        rows("llama", first, MAIN, EPSILONS)
        + references(seeds)
        + rows("bitnet", first, MAIN, APART)
        + rows("llama", first, OTHERS, APART)
        + rows("llama", first, PARTS, (4.0,))
        + rows("llama", second, MAIN, EPSILONS)
        + rows("bitnet", first, OTHERS + PARTS, (4.0,))
    )


def references(seeds: Seeds, tones: tuple[str, ...] = TONES) -> list[Cell]:
    """Rows without a finite epsilon."""
    return [
        Cell(method, model, tone, None, seed) for seed, model, tone, method in product(seeds, MODELS, tones, REFERENCES)
    ]


RATES = (0.006, 0.012)
FLAT, ADAPTIVE = (0.01, 1.0, 10.0, 100.0), (0.01, 1.0, 100.0)


def tuning(seeds: Seeds = SEEDS) -> list[Cell]:
    """Flat C over four decades and the default from three C0, on both kinds of data, with two learning rates each."""
    rows = [("adamw-flat", bound) for bound in FLAT] + [("dp-adam-ac", bound) for bound in ADAPTIVE]
    return [
        Cell(method, seed=seed, rate=rate, bound=bound, data=data, steps=25)
        for data in ("easy", "heavy")
        for seed, (method, bound), rate in product(seeds, rows, RATES)
    ]


def budget(seeds: Seeds = SEEDS) -> list[Cell]:
    """Equal epsilon and equal compute: 6,000 records in batches of 200 or 400."""
    methods = ("adamw-usual", "adamw-flat", "dp-adam-ac", "dp-adam-ac growing")
    sizes = ((200, 30, (0.008, 0.012)), (400, 15, (0.008, 0.012, 0.018)))
    return [
        Cell(method, seed=seed, rate=rate, batch=batch, steps=steps)
        for seed in seeds
        for batch, steps, rates in sizes
        for method, rate in product(methods, rates)
    ]


def momentum(seeds: Seeds = SEEDS) -> list[Cell]:
    """Flat C from no momentum to AdamW's usual one, at the default size."""
    at_four = product(seeds, (4.0,), (0.0, 0.5, 0.8, 0.9))
    elsewhere = product(seeds, (1.0, 16.0), (0.5, 0.9))
    return [
        Cell("adamw-flat", epsilon=epsilon, seed=seed, rate=0.008, beta1=beta1)
        for seed, epsilon, beta1 in (*at_four, *elsewhere)
    ]


def lengths(seeds: Seeds = (0,)) -> list[Cell]:
    """The default in runs of 30 to 1,000 steps: the last weights beside the averaged ones, of one run each."""
    rates = {30: (0.008,), 100: (0.008,), 300: (0.008, 0.002), 1000: (0.008, 0.002)}
    return [
        Cell("dp-adam-ac", seed=seed, steps=steps, rate=rate, **AS_USUAL)
        for seed, (steps, own) in product(seeds, rates.items())
        for rate in own
    ]


LONG_RATES = {
    300: {"adamw-flat": (0.002, 0.004, 0.008), "dp-adam-ac": (0.002, 0.004, 0.008), DE_NOISED: (0.001, 0.002, 0.004)},
    1000: {"adamw-flat": (0.001,), "dp-adam-ac": (0.001, 0.002), DE_NOISED: (0.0005, 0.001)},
}


def long(seeds: Seeds = SEEDS) -> list[Cell]:
    """Parts of DP-Adam-AC in runs that are long enough for averages and rate control to act, at several rates each.

    Flat C beside the default, and the default around noise-corrected Adam, all with momentum 0.9 and Renyi accounting.
    Every run with an average gives both its last and its averaged weights.
    """
    return [
        Cell(method, seed=seed, steps=steps, rate=rate, **AS_USUAL)
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
        for seed, model, epsilon, method in product(seeds, MODELS, (1.0, 4.0), ("adamw-flat", "dp-adam-ac"))
    ]
    cells += [Cell(method, MODELS[0], tone, 4.0, seed) for seed, method in product(seeds, (*PARTS, *OTHERS))]
    rows = [("adamw-flat", bound) for bound in (1.0, 10.0, 100.0)] + [("dp-adam-ac", bound) for bound in (0.01, 100.0)]
    short = [Cell(m, seed=seed, rate=0.008, bound=bound, steps=25) for seed, (m, bound) in product(seeds, rows)]
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
