"""Peak memory of a step against the length of a record."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from step_benchmark.memory import release_memory
from step_benchmark.shapes import new_batch
from step_benchmark.variants import PLAIN, Options

from device_checks.speed import FIRST_ORDER, QWEN, TINY

LENGTHS, TINY_LENGTHS = (512, 1024, 2048, 4096, 8192), (8, 16)
NAMES = (PLAIN, "bk", "bk-fused-step")


@dataclass(frozen=True)
class Lengths:
    """One record of growing length, one variant after the other, each on one model."""

    name: str
    seconds: float

    def run(self, device: str, tiny: bool) -> dict[str, Any]:
        """Measure; return MiB above what is held between steps, or the reason why there are none, by variant and length."""
        lengths = TINY_LENGTHS if tiny else LENGTHS
        shape = replace(TINY if tiny else QWEN, batch=1, parts=1, length=lengths[-1])
        options = Options(threads=1, device=device, autocast=True, warmup=2)
        found: dict[str, dict[str, Any]] = {}
        for name in NAMES:
            trial, found[name] = None, {}
            try:
                trial = FIRST_ORDER[name].ready(replace(shape, length=lengths[0]), options)
                for length in lengths:
                    trial.batches = [new_batch(replace(shape, length=length), device)]
                    trial.step()
                    found[name][str(length)] = trial.memory()[0]
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                found[name] |= {str(length): reason for length in lengths if str(length) not in found[name]}
            del trial
            release_memory()
            if device == "cuda":
                torch.cuda.empty_cache()
        return {"lengths": list(lengths), "mib": found}
