"""Time and memory of steps at the shapes of models that people train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from step_benchmark.measuring import Figures, measure
from step_benchmark.memory import release_memory
from step_benchmark.shapes import Shape
from step_benchmark.variants import NO_NOISE, PLAIN, VARIANTS, Options, Variant

from device_checks import zeroth

FIRST_ORDER: dict[str, Variant] = {**VARIANTS, "opacus-functorch": Variant("opacus", "functorch")}
OPACUS = ("opacus-hooks", "opacus-ghost", "opacus-functorch")
RECORDS_AT_MOST = 32
SHARE_OF_MEMORY = 0.85
"""Share of the free memory that variants may fill: an allocator loses some of it between its blocks."""


@dataclass(frozen=True)
class Target:
    """Largest ratio to the ordinary step that is aimed at; ``ahead``: how many times faster than Opacus."""

    time: float
    memory: float
    ahead: float = 1.5
    noise: float = 0.03


@dataclass(frozen=True)
class Speed:
    """A shape with what is measured on it."""

    name: str
    shape: Shape
    tiny: Shape
    seconds: float
    names: tuple[str, ...] = ("bk", f"bk{NO_NOISE}", *OPACUS)
    target: Target | None = None
    variants: Mapping[str, Variant] = field(default_factory=lambda: FIRST_ORDER)
    rounds: int = 7

    @property
    def needs(self) -> tuple[str, ...]:
        """Packages without which there is nothing to measure."""
        return ("peft",) if self.shape.lora_rank else ()

    def run(self, device: str, tiny: bool) -> dict[str, Any]:
        """Measure; return the shape that was measured, and the figures of every variant."""
        shape = self.tiny if tiny else self.shape
        options = Options(
            threads=1,
            device=device,
            autocast=True,
            ema=False,
            warmup=3,
            rounds=1 if tiny else self.rounds,
            memory_rounds=1,
            apart=False,
            halve=True,
            count_syncs=True,
            seconds=self.seconds / (8 if shape.at_once else 3),
        )
        if not shape.batch:
            batch = largest_batch(shape, self.variants[self.names[0]], options) if device == "cuda" else 1
            shape = replace(shape, batch=batch)
        figures = measure(shape, self.names, options, shape.at_once, self.variants)
        return {"shape": asdict(shape), "figures": {name: asdict(one) for name, one in figures.items()}}


def largest_batch(shape: Shape, variant: Variant, options: Options) -> int:
    """Return the largest batch, of 2, 4, 8, ... records, that fits beside the variants that live at the same time.

    The memory of two and of four records tells what a record takes, and what is there without one.
    """
    peaks = {}
    for records in (2, 4):
        trial = variant.ready(replace(shape, batch=records, parts=1), options)
        trial.warm_up()
        peaks[records], level = trial.memory()
        del trial
        release_memory()
        torch.cuda.empty_cache()
    each = max((peaks[4] - peaks[2]) / 2, 1e-3)
    fixed = (1 + shape.at_once) * level + max(0.0, peaks[2] - 2 * each)
    room = SHARE_OF_MEMORY * torch.cuda.mem_get_info()[0] / 2**20 - fixed
    batch = 2
    while 2 * batch <= min(RECORDS_AT_MOST, room / each):
        batch *= 2
    return batch


def figures_of(values: Mapping[str, Any]) -> tuple[Shape, dict[str, Figures]]:
    """Return what :meth:`Speed.run` measured, as the tables take it."""
    return Shape(**values["shape"]), {name: Figures(**one) for name, one in values["figures"].items()}


QWEN = Shape(896, 24, 14, 2, 4864, 151936, 0, 512, parts=4, at_once=2)
BITNET = Shape(2560, 30, 20, 5, 6912, 128256, 4, 512, family="BitNet", at_once=1)
LLAMA = Shape(
    4096, 32, 32, 8, 14336, 128256, 4, 512, tied=False, family="Llama", lora_rank=16, base="bfloat16", at_once=2
)
OPT = Shape(2560, 32, 32, 32, 10240, 50272, 8, 256, family="OPT")
VIT = Shape(768, 12, 12, 12, 3072, 100, 32, 0, family="ViT", image=224, tied=False, at_once=2)
TINY = Shape(32, 1, 4, 2, 48, 64, 2, 8, parts=2)
TINY_OF = {
    "BitNet": replace(TINY, family="BitNet", parts=1),
    "Llama": replace(TINY, family="Llama", tied=False, lora_rank=2, base="bfloat16", parts=1),
    "OPT": replace(TINY, family="OPT", kv_heads=4, parts=1),
    "ViT": replace(TINY, family="ViT", vocab=10, length=0, image=16, tied=False, parts=1),
}
ADAPTERS = Target(1.10, 1.05)
SPEEDS = (
    Speed("qwen2.5-0.5b full", QWEN, TINY, 70, target=Target(1.30, 1.15)),
    Speed("qwen2.5-0.5b lora", replace(QWEN, lora_rank=16), replace(TINY, lora_rank=2), 45, target=ADAPTERS),
    Speed(
        "bitnet-2b lora", replace(BITNET, lora_rank=16), replace(TINY_OF["BitNet"], lora_rank=2), 45, target=ADAPTERS
    ),
    Speed("bitnet-2b full", BITNET, TINY_OF["BitNet"], 50, names=("bk-fused-step",)),
    Speed("llama-8b lora", LLAMA, TINY_OF["Llama"], 50, target=ADAPTERS),
    Speed(
        "opt-2.7b zeroth order", OPT, TINY_OF["OPT"], 40, names=("zeroth-order",), variants=zeroth.VARIANTS, rounds=3
    ),
    Speed("vit-b full", VIT, TINY_OF["ViT"], 40),
)
__all__ = ["PLAIN", "SPEEDS", "Speed", "Target", "figures_of", "largest_batch"]
