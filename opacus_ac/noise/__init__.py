"""Secret random streams, and Gaussian noise from them."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "RandomStream": "streams",
        "SecretStream": "streams",
        "SeededStream": "streams",
        "SharedStream": "streams",
    },
)
