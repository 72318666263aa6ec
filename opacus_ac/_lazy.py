"""Packages whose names are imported on first use, so that importing one loads neither torch nor opacus."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, str]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: the package's ``__name__``.
        names: public name -> the module that defines it, relative to the package unless it begins with ``opacus_ac.``.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = names[name]
        return getattr(
            importlib.import_module(module if module.startswith("opacus_ac.") else f"{package}.{module}"), name
        )

    return sorted(names), __getattr__, lambda: sorted(names)
