"""The privacy of a run in TensorBoard: what is written (:class:`PrivacyDashboard`) and the Privacy tab that shows it.

The tab's side (``loader``, ``plugin``, ``tags``) imports neither torch nor opacus: TensorBoard loads it for every user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opacus_ac.tensorboard.dashboard import PrivacyDashboard

__all__ = ["PrivacyDashboard"]


def __getattr__(name: str) -> Any:
    if name == "PrivacyDashboard":
        from opacus_ac.tensorboard.dashboard import PrivacyDashboard

        return PrivacyDashboard
    raise AttributeError(f"module 'opacus_ac.tensorboard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
