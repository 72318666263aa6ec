"""What leaves a step: the noised gradient and the noisy statistics in the same release."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GaussianMechanism": "mechanism",
        "NoisyHistogram": "values",
        "NoisyProfile": "values",
        "NormWindow": "values",
        "StepRelease": "values",
        "StepStatistics": "statistics",
        "default_histogram_weight": "statistics",
    },
)
