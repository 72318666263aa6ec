"""Private fine-tuning with forward passes only: DP-ZO, DPZero, DP-ZOSO, DP-ZOPO and DP-AggZO.

Names are imported on first use.

References: arXiv 2310.09639 (DPZero), 2401.04343 (DP-ZO), 2402.07818 (DP-ZOSO, DP-ZOPO), USENIX Security 2025 (DP-AggZO).
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "PRESETS": "settings",
    "Pruning": "settings",
    "Stages": "settings",
    "ZerothOrderDPOptimizer": "optimizer",
    "ZerothOrderSettings": "settings",
    "preset": "settings",
    "record_losses": "losses",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
