"""The same private step on several processes: reducers, the draw that all ranks share, checkpoints, costs.

Names are imported on first use: the optimizer needs the reducers, and the checkpoints need the engine.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "LOCAL": "reducers",
    "LocalReducer": "reducers",
    "Reducer": "reducers",
    "ReplicatedReducer": "reducers",
    "ShardedReducer": "sharded",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}

__all__ = [
    "LOCAL",
    "LocalReducer",
    "Reducer",
    "ReplicatedReducer",
    "ShardedReducer",
    "load_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"opacus_ac.distributed.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'opacus_ac.distributed' has no attribute {name!r}")
