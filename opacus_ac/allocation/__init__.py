"""How noise is spread over groups of parameters (arXiv 2512.06711)."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GroupWeights": "weights",
        "NoiseAllocation": "settings",
        "optimal_weights": "rule",
        "public_weights": "public_data",
    },
)
