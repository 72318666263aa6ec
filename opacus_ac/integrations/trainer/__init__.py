"""The ``Trainer`` of transformers with differential privacy."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PrivacyArguments": "arguments",
        "PrivateTrainer": "trainer",
    },
)
