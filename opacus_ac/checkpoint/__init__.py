"""A private run in a file, and back."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "load_checkpoint": "many_processes",
        "save_checkpoint": "many_processes",
    },
)
