"""What models of other libraries need: losses per record, adapters, the default chat model."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "RandomProjection": "projection",
    },
)
