"""The private step."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AdaptiveClipDPOptimizer": "optimizer",
        "AutoAdam": "auto_adam",
        "ClipRateControl": "lr_control",
        "DPAdamW": "dp_adamw",
        "WeightEMA": "ema",
    },
)
