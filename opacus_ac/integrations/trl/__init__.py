"""The trainers of TRL with differential privacy: the same settings and data, on the core of ``PrivateTrainer``."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, {"PrivateDPOTrainer": "dpo", "PrivateSFTTrainer": "sft"})
