"""What a training run leaves in its folder, and what can be done with it: chat, generate, merge, evaluate, report."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "RunError": "folder",
        "RunFolder": "folder",
        "load_run": "model",
    },
)
