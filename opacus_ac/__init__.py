"""DP-Adam-AC for Opacus: adaptive clipping whose every statistic is part of the accounted release.

Names are imported on first use, so that ``import opacus_ac`` itself loads neither torch nor opacus.

References: arXiv 2510.05288.
"""

from opacus_ac._lazy import lazy_names
from opacus_ac._version import __version__

_names, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PrivacyEngine": "engine.privacy_engine",
        "PrivacyReport": "engine.report",
        "AdaptiveClipDPOptimizer": "optimizer.optimizer",
        "PrivacyBudgetExceeded": "errors",
        "StepRelease": "release.values",
        "NoiseAllocation": "allocation.settings",
        "AutoAdam": "optimizer.auto_adam",
        "DPAdamW": "optimizer.dp_adamw",
        "RandomProjection": "models.projection",
        "ZerothOrderSettings": "zeroth_order.settings",
        "VariableRateRDPAccountant": "accounting.rdp_accountant",
    },
)
__all__ = ["__version__", *_names]
