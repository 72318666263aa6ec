"""What the rooms of this package expect of each other's objects."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Part": "part",
    },
)
