"""Private fine-tuning with forward passes only: DP-ZO, DPZero, DP-ZOSO, DP-ZOPO and DP-AggZO.

Names are imported on first use.

References:
    arXiv 2310.09639 (DPZero), 2401.04343 (DP-ZO), 2402.07818 (DP-ZOSO, DP-ZOPO), USENIX Security 2025 (DP-AggZO).
"""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PRESETS": "settings",
        "Pruning": "settings",
        "Stages": "settings",
        "ZerothOrderDPOptimizer": "optimizer",
        "ZerothOrderSettings": "settings",
        "preset": "settings",
        "record_losses": "losses",
    },
)
