"""Models with an encoder and a decoder of text or of speech."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.testing.coverage.case import Case
from opacus_ac.testing.coverage.tiny import VOCABULARY, built, config_class, text_rows, tiny_config

TYPES = (
    "bart", "blenderbot", "blenderbot-small", "led", "longt5", "m2m_100", "marian", "mbart", "mt5", "pegasus", "plbart",
    "prophetnet", "t5", "umt5",
)  # fmt: skip
MEL_BINS, FRAMES = 8, 16


def _text(model_type: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForSeq2SeqLM

    config = tiny_config(config_class(model_type), decoder_start_token_id=1)
    # LED's windows must each see a token that is not padding; otherwise its gradient is not a number.
    return built(AutoModelForSeq2SeqLM, config), text_rows(length=8)


def whisper_config() -> Any:
    """Return a small config of Whisper, for records of ``FRAMES`` frames of ``MEL_BINS`` frequencies."""
    from transformers import WhisperConfig

    tokens = {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    sizes = {"num_mel_bins": MEL_BINS, "max_source_positions": FRAMES // 2, "vocab_size": VOCABULARY}
    return tiny_config(WhisperConfig, **tokens, **sizes)


def spectrograms(records: int = 6) -> Tensor:
    """Return random spectrograms ``[records, MEL_BINS, FRAMES]``."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(records, MEL_BINS, FRAMES, generator=generator, dtype=torch.float64)


def _whisper() -> tuple[nn.Module, Any]:
    from transformers import AutoModelForSpeechSeq2Seq

    rows = [
        {"input_features": heard, "labels": row["labels"]}
        for heard, row in zip(spectrograms(), text_rows(), strict=True)
    ]
    return built(AutoModelForSpeechSeq2Seq, whisper_config()), rows


def cases() -> Iterator[Case]:
    """Yield a case per type of models."""
    for model_type in TYPES:
        yield Case(model_type, partial(_text, model_type))
    yield Case("whisper", _whisper)
