"""All causal language models of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from opacus_ac.testing.coverage.case import Case
from opacus_ac.testing.coverage.tiny import built, config_class, text_rows, tiny_config


def _model(model_type: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    return built(AutoModelForCausalLM, tiny_config(config_class(model_type))), text_rows()


def cases() -> Iterator[Case]:
    """Yield a case per type of models that has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    for model_type in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        yield Case(model_type, partial(_model, model_type))
