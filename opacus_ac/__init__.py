"""DP-Adam-AC for Opacus: adaptive clipping whose every statistic is part of the accounted release.

Names are imported on first use, so that ``import opacus_ac`` itself loads neither torch nor opacus.

References: arXiv 2510.05288.
"""

from __future__ import annotations

import importlib
from typing import Any

from opacus_ac._version import __version__

_EXPORTS = {
    "PrivacyEngine": "opacus_ac.engine",
    "PrivacyReport": "opacus_ac.report",
    "AdaptiveClipDPOptimizer": "opacus_ac.optimizer",
    "PrivacyBudgetExceeded": "opacus_ac.errors",
    "StepRelease": "opacus_ac.mechanism",
    "NoiseAllocation": "opacus_ac.allocation",
    "DPAdamW": "opacus_ac.dp_adam",
    "RandomProjection": "opacus_ac.projection",
    "ZerothOrderSettings": "opacus_ac.zeroth_order",
    "VariableRateRDPAccountant": "opacus_ac.accounting",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'opacus_ac' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
