"""The privacy of a run in TensorBoard: what is written (:class:`PrivacyDashboard`) and the Privacy tab that shows it.

The tab's side (``loader``, ``plugin``, ``tags``) imports neither torch nor opacus: TensorBoard loads it for every user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opacus_ac.tensorboard.dashboard import PrivacyDashboard, keep_time_out

__all__ = ["PrivacyDashboard", "keep_time_out"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from opacus_ac.tensorboard import dashboard

        return getattr(dashboard, name)
    raise AttributeError(f"module 'opacus_ac.tensorboard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
