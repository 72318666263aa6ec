"""Optional integrations; each is imported only where it is used."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "PrivacyArguments": "opacus_ac.integrations.trainer_arguments",
    "PrivateTrainer": "opacus_ac.integrations.trainer",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'opacus_ac.integrations' has no attribute {name!r}")
