"""The optimizers that the study compares: each a row of a table.

All see the same private batches at the same epsilon and number of steps. A method has today's defaults, the accountant "vpld" and
the momentum of the planned steps, where its row does not say otherwise. ``adamw-usual`` is DP-AdamW as it is usually run: momentum
0.9, Renyi accounting. ``dp-adam-ac`` is the package's default around ``torch.optim.AdamW``; ``dp-adam-ac+`` has every part that
the package offers (noise-corrected Adam, averaged weights); the rows below it take one part away each. ``dp-adam-ac growing`` has
batches that end 1.5 times as large as they start, at as many records in all. ``paper-raw`` is the published rule on un-noised norms
with the noise of epsilon 4: no epsilon holds for it. It and ``non-private`` have the usual momentum.

Learning rates were chosen once, for ``llama``, the loving tone and a seed that no table contains, among 0.008 and 0.012 (AdamW),
0.003, 0.006 and 0.01 (noise-corrected), 1, 2 and 4 (SGD) at epsilon 4; the tuning grid varies them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from opacus_ac.optimizer import AutoAdam, DPAdamW

Parameters = Iterable[torch.nn.Parameter]


class Package(NamedTuple):
    """A package with an optimizer that needs no learning rate."""

    module: str
    requirement: str


PACKAGES = {
    "prodigy": Package("prodigyopt", "prodigyopt==1.1.2"),
    "d-adaptation": Package("dadaptation", "dadaptation==3.2"),
    "dog": Package("dog", "dog-optimizer==1.0.3"),
}
"""The packages of optimizers that are needed for their own rows only."""


def _package(optimizer: str) -> Any:
    module, requirement = PACKAGES[optimizer]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SystemExit(f"this row needs another package: pip install --no-deps {requirement}") from None


OPTIMIZERS: dict[str, Callable[[Parameters, float, float, int], Optimizer]] = {
    "adamw": lambda parameters, rate, beta1, steps: torch.optim.AdamW(
        parameters, lr=rate, betas=(beta1, 0.999), weight_decay=0.0
    ),
    "dp-adamw": lambda parameters, rate, beta1, steps: DPAdamW(
        parameters, lr=rate, betas=(beta1, 0.999), weight_decay=0.0
    ),
    "auto": lambda parameters, rate, beta1, steps: AutoAdam(parameters, lr=rate, beta1=beta1, steps=steps),
    "prodigy": lambda parameters, rate, beta1, steps: _package("prodigy").Prodigy(
        parameters, lr=rate, betas=(beta1, 0.999), weight_decay=0.0
    ),
    "d-adaptation": lambda parameters, rate, beta1, steps: _package("d-adaptation").DAdaptAdam(
        parameters, lr=rate, betas=(beta1, 0.999), log_every=0
    ),
    "dog": lambda parameters, rate, beta1, steps: _package("dog").LDoG(parameters, lr=rate),
    "sgd": lambda parameters, rate, beta1, steps: torch.optim.SGD(parameters, lr=rate, momentum=beta1),
}


@dataclass(frozen=True)
class Method:
    """How a row of the study trains.

    Args:
        optimizer: inner optimizer, by name.
        rate: learning rate, unless the cell names one.
        bound: clipping norm C0, unless the cell names one.
        beta1: momentum, unless the cell names one; None for that of the planned steps.
        arguments: of ``make_private``.
        averaged: whether the averaged weights are the result.
        engine: "opacus_ac", "opacus" (Opacus's own), or "none" (no privacy).
        accountant: of the epsilon, unless the cell names one. Opacus's own engine has its own that is nearest.
        growth: expected batch size of the last step over that of the first, geometric between, as many records in all.
    """

    optimizer: str = "adamw"
    rate: float = 0.008
    bound: float = 1.0
    beta1: float | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False
    engine: str = "opacus_ac"
    accountant: str = "vpld"
    growth: float = 1.0


_FLAT: dict[str, Any] = {"clipping": "flat", "lr_control": False, "ema_decay": None}

METHODS: dict[str, Method] = {
    "dp-sgd": Method("sgd", rate=2.0, arguments=_FLAT),
    "adamw-usual": Method(beta1=0.9, arguments=_FLAT, accountant="vrdp"),
    "adamw-flat": Method(arguments=_FLAT),
    "auto-flat": Method("auto", rate=1e-3, arguments=_FLAT),
    "prodigy-flat": Method("prodigy", rate=1.0, arguments=_FLAT),
    "d-adaptation-flat": Method("d-adaptation", rate=1.0, arguments=_FLAT),
    "dog-flat": Method("dog", rate=1.0, arguments=_FLAT),
    "auto": Method("auto", rate=1e-3, arguments={"lr_control": False, "ema_decay": None}),
    "opacus-adaptive": Method(engine="opacus"),
    "dp-adam-ac": Method(),
    "dp-adam-ac+": Method("dp-adamw", rate=0.006, averaged=True),
    "dp-adam-ac+ without adaptive C": Method("dp-adamw", rate=0.006, averaged=True, arguments={"clipping": "flat"}),
    "dp-adam-ac+ without EMA": Method("dp-adamw", rate=0.006),
    "dp-adam-ac+ without learning-rate control": Method(
        "dp-adamw", rate=0.006, averaged=True, arguments={"lr_control": False}
    ),
    "dp-adam-ac+ without noise correction": Method(averaged=True),
    "dp-adam-ac growing": Method(growth=1.5),
    "paper-raw": Method(
        bound=3.0, beta1=0.9, arguments={"preset": "paper", "clip_policy": "raw_percentile"}, averaged=True
    ),
    "non-private": Method(beta1=0.9, engine="none"),
}
