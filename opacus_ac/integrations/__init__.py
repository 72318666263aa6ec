"""Private training in the Trainers of other libraries. Each library is imported only where it is used."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "PrivacyArguments": "trainer.arguments",
        "PrivateDPOTrainer": "trl.dpo",
        "PrivateSFTTrainer": "trl.sft",
        "PrivateTrainer": "trainer.trainer",
    },
)
