"""Who chooses the clipping norm C."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "AutomaticPolicy": "policy",
        "ClipPolicy": "policy",
        "GeometricPolicy": "policy",
        "POLICIES": "table",
        "PercentilePolicy": "percentile",
        "RawPercentilePolicy": "paper",
        "build_policy": "table",
        "paper_policy": "paper",
    },
)
