"""make_private: the entry to the package."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PrivacyEngine": "privacy_engine",
        "PrivacyReport": "report",
        "PrivateOptions": "options",
        "ClippingOptions": "options",
        "ReleaseOptions": "options",
        "SamplingOptions": "options",
        "UpdateOptions": "options",
        "PerformanceOptions": "options",
    },
)
