"""Models of sound."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from opacus_ac.testing.coverage.case import Case
from opacus_ac.testing.coverage.seq2seq import spectrograms, whisper_config
from opacus_ac.testing.coverage.tiny import VOCABULARY, built, config_class, tiny_config

SAMPLES, CLASSES = 200, 3
#: Convolutions with which a record of ``SAMPLES`` samples becomes a few positions.
_CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 4), "num_feat_extract_layers": 2}
_POSITIONS = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": VOCABULARY}
#: Layer normalisation instead of a group normalisation over all samples, padding included.
_LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}


def _waves(records: int = 6) -> torch.Tensor:
    return torch.randn(records, SAMPLES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _classes(model_type: str, changes: dict[str, Any]) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForAudioClassification

    config = tiny_config(config_class(model_type), **_CONVOLUTIONS, **_POSITIONS, num_labels=CLASSES, **changes)
    rows = [{"input_values": wave, "labels": torch.tensor(i % CLASSES)} for i, wave in enumerate(_waves())]
    return built(AutoModelForAudioClassification, config), rows


def _letters(model_type: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCTC

    config = tiny_config(config_class(model_type), **_CONVOLUTIONS, **_POSITIONS, **_LAYER_NORM)
    config.ctc_loss_reduction = "mean"
    rows = [{"input_values": wave, "labels": torch.tensor([3 + i, 9, 12 - i])} for i, wave in enumerate(_waves())]
    return built(AutoModelForCTC, config), rows


def _whisper() -> tuple[nn.Module, Any]:
    from transformers import AutoModelForAudioClassification

    config = whisper_config()
    config.num_labels = CLASSES
    rows = [{"input_features": heard, "labels": torch.tensor(i % CLASSES)} for i, heard in enumerate(spectrograms())]
    return built(AutoModelForAudioClassification, config), rows


def cases() -> Iterator[Case]:
    """Yield a case per type of models and head."""
    for model_type in ("hubert", "wav2vec2"):
        yield Case(f"{model_type}: classification", partial(_classes, model_type, {}))
        yield Case(f"{model_type}, layer norm: classification", partial(_classes, model_type, _LAYER_NORM))
        yield Case(f"{model_type}: CTC", partial(_letters, model_type))
    yield Case("whisper: classification", _whisper)
