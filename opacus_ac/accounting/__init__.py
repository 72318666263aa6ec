"""Privacy accounting: what a step costs, what a run has spent, and how much noise a budget needs.

Importing this package registers nothing and loads neither torch nor opacus; only the accountants do, on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from opacus_ac.accounting.attacks import (
    FALSE_POSITIVE_RATES,
    AttackBounds,
    attack_bounds,
    attack_bounds_from_curve,
    attack_bounds_of_pair,
    attack_sentences,
)
from opacus_ac.accounting.calibration import calibrate_noise_multiplier, plan_epsilon
from opacus_ac.accounting.divergence import rdp_event
from opacus_ac.accounting.events import ADJACENCY, Event, common_adjacency
from opacus_ac.accounting.filters import RenyiFilter, best_order, roomiest_order
from opacus_ac.accounting.pld import pld_epsilon
from opacus_ac.accounting.rdp import DEFAULT_ORDERS, epsilon_from_rdp, rdp_poisson_gaussian
from opacus_ac.accounting.rdp_table import RDPTable
from opacus_ac.accounting.shuffled import ShuffledEpochs

if TYPE_CHECKING:
    from opacus_ac.accounting.pld_accountant import VariableRatePLDAccountant
    from opacus_ac.accounting.pure_accountant import PureDPAccountant
    from opacus_ac.accounting.rdp_accountant import VariableRateRDPAccountant
    from opacus_ac.accounting.registration import register

__all__ = [
    "ADJACENCY",
    "DEFAULT_ORDERS",
    "FALSE_POSITIVE_RATES",
    "AttackBounds",
    "Event",
    "PureDPAccountant",
    "RDPTable",
    "RenyiFilter",
    "ShuffledEpochs",
    "VariableRatePLDAccountant",
    "VariableRateRDPAccountant",
    "attack_bounds",
    "attack_bounds_from_curve",
    "attack_bounds_of_pair",
    "attack_sentences",
    "best_order",
    "calibrate_noise_multiplier",
    "common_adjacency",
    "epsilon_from_rdp",
    "plan_epsilon",
    "pld_epsilon",
    "rdp_event",
    "rdp_poisson_gaussian",
    "register",
    "roomiest_order",
]

_LAZY = {
    "VariableRateRDPAccountant": "rdp_accountant",
    "PureDPAccountant": "pure_accountant",
    "VariableRatePLDAccountant": "pld_accountant",
    "register": "registration",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"opacus_ac.accounting.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'opacus_ac.accounting' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
