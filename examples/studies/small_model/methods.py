"""The optimizers that the study compares: each a row of a table.

All see the same private batches at the same epsilon and number of steps. ``dp-adam-ac`` is the package's default around
``torch.optim.AdamW``; ``dp-adam-ac+`` has every part that the package offers (noise-corrected Adam, averaged weights with a
short memory); the rows below it take one part away each. ``paper-raw`` is the published rule on un-noised norms with the noise
of epsilon 4: no epsilon holds for it. ``tighter`` and ``everything`` buy less noise at the same epsilon by accounting with the privacy
loss distribution; of dp-adam-ac both have less momentum, and ``everything`` has batches that end 1.5 times as large as they
start, at as many records in all.

Learning rates were chosen once, for ``llama``, the loving tone and a seed that no table contains, among 0.008 and 0.012 (AdamW),
0.003 and 0.006 (noise-corrected), 0.3 and 0.6 (SGD) at epsilon 4; the tuning grid varies them.
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


OPTIMIZERS: dict[str, Callable[[Parameters, float, float], Optimizer]] = {
    "adamw": lambda parameters, rate, beta1: torch.optim.AdamW(
        parameters, lr=rate, betas=(beta1, 0.999), weight_decay=0.0
    ),
    "dp-adamw": lambda parameters, rate, beta1: DPAdamW(parameters, lr=rate, betas=(beta1, 0.999), weight_decay=0.0),
    "auto": lambda parameters, rate, beta1: AutoAdam(parameters, lr=rate, beta1=beta1),
    "prodigy": lambda parameters, rate, beta1: _package("prodigy").Prodigy(
        parameters, lr=rate, betas=(beta1, 0.999), weight_decay=0.0
    ),
    "d-adaptation": lambda parameters, rate, beta1: _package("d-adaptation").DAdaptAdam(
        parameters, lr=rate, betas=(beta1, 0.999), log_every=0
    ),
    "dog": lambda parameters, rate, beta1: _package("dog").LDoG(parameters, lr=rate),
    "sgd": lambda parameters, rate, beta1: torch.optim.SGD(parameters, lr=rate, momentum=beta1),
}


@dataclass(frozen=True)
class Method:
    """How a row of the study trains.

    Args:
        optimizer: inner optimizer, by name.
        rate: learning rate, unless the cell names one.
        bound: clipping norm C0, unless the cell names one.
        beta1: momentum, unless the cell names one.
        arguments: of ``make_private``.
        averaged: whether the averaged weights are the result.
        engine: "opacus_ac", "opacus" (Opacus's own), or "none" (no privacy).
        accountant: of the epsilon; Renyi accounting unless it says otherwise, the same for all rows of a table.
        growth: expected batch size of the last step over that of the first, geometric between, as many records in all.
    """

    optimizer: str = "adamw"
    rate: float = 0.008
    bound: float = 1.0
    beta1: float = 0.9
    arguments: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False
    engine: str = "opacus_ac"
    accountant: str = "vrdp"
    growth: float = 1.0


_FLAT: dict[str, Any] = {"clipping": "flat", "lr_control": False, "ema_decay": None}

METHODS: dict[str, Method] = {
    "dp-sgd": Method("sgd", rate=0.3, arguments=_FLAT),
    "adamw-flat": Method(arguments=_FLAT),
    "auto-flat": Method("auto", rate=1e-3, beta1=0.5, arguments=_FLAT),
    "prodigy-flat": Method("prodigy", rate=1.0, beta1=0.5, arguments=_FLAT),
    "d-adaptation-flat": Method("d-adaptation", rate=1.0, beta1=0.5, arguments=_FLAT),
    "dog-flat": Method("dog", rate=1.0, arguments=_FLAT),
    "auto": Method("auto", rate=1e-3, beta1=0.5, arguments={"lr_control": False, "ema_decay": None}),
    "opacus-adaptive": Method(engine="opacus"),
    "dp-adam-ac": Method(),
    "dp-adam-ac+": Method("dp-adamw", rate=0.003, averaged=True),
    "dp-adam-ac+ without adaptive C": Method("dp-adamw", rate=0.003, averaged=True, arguments={"clipping": "flat"}),
    "dp-adam-ac+ without EMA": Method("dp-adamw", rate=0.003),
    "dp-adam-ac+ without learning-rate control": Method(
        "dp-adamw", rate=0.003, averaged=True, arguments={"lr_control": False}
    ),
    "dp-adam-ac+ without noise correction": Method(averaged=True),
    "adamw-flat tighter": Method(arguments=_FLAT, accountant="vpld"),
    "dp-adam-ac tighter": Method(beta1=0.5, accountant="vpld"),
    "dp-adam-ac everything": Method(beta1=0.5, growth=1.5, accountant="vpld"),
    "paper-raw": Method(bound=3.0, arguments={"preset": "paper", "clip_policy": "raw_percentile"}, averaged=True),
    "non-private": Method(engine="none"),
}
