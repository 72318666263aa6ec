"""Privacy accounting: what a step costs, what a run has spent, and how much noise a budget needs.

Importing this package registers nothing and loads neither torch nor opacus; only the accountant itself does, on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from opacus_ac.accounting.calibration import calibrate_noise_multiplier, plan_epsilon
from opacus_ac.accounting.events import ADJACENCY, Event
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, epsilon_from_rdp, rdp_poisson_gaussian
from opacus_ac.accounting.shuffled import ShuffledEpochs
from opacus_ac.accounting.table import RDPTable

if TYPE_CHECKING:
    from opacus_ac.accounting.accountant import VariableRateRDPAccountant, register

__all__ = [
    "ADJACENCY",
    "DEFAULT_ORDERS",
    "Event",
    "RDPTable",
    "ShuffledEpochs",
    "VariableRateRDPAccountant",
    "calibrate_noise_multiplier",
    "epsilon_from_rdp",
    "plan_epsilon",
    "rdp_poisson_gaussian",
    "register",
]

_LAZY = ("VariableRateRDPAccountant", "register")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module("opacus_ac.accounting.accountant"), name)
    raise AttributeError(f"module 'opacus_ac.accounting' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
