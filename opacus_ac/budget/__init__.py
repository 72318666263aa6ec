"""What a run has spent, and what it may spend."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PrivacyLedger": "ledger",
    },
)
