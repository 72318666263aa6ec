"""What is used of TRL: its settings, its collators, and its helpers for rows."""

from __future__ import annotations

try:
    import trl  # noqa: F401
except ImportError as missing:
    raise ImportError(
        "PrivateSFTTrainer and PrivateDPOTrainer need the library trl, which is not installed: "
        'pip install "opacus_ac[trl]"'
    ) from missing

from trl import (
    DPOConfig,
    SFTConfig,
    extract_prompt,
    get_training_chat_template,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

__all__ = [
    "DPOConfig", "DataCollatorForLanguageModeling", "DataCollatorForPreference", "SFTConfig", "extract_prompt",
    "get_training_chat_template", "is_conversational", "is_conversational_from_value", "maybe_convert_to_chatml",
]  # fmt: skip
