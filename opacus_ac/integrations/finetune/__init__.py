"""Fine-tunes a chat model on private chat files: the command ``opacus-ac finetune``."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ChatDataset": "chat_data",
        "PadCollate": "chat_data",
        "UserCollate": "chat_users",
        "UserDataset": "chat_users",
    },
)
