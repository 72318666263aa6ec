"""Losses of single records, for the closure of a zeroth-order step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opacus_ac.loss import per_record_causal_lm_loss, per_record_token_loss

_TOKENS = {
    "ForCausalLM": per_record_causal_lm_loss,
    "ForMaskedLM": per_record_token_loss,
    "ForTokenClassification": per_record_token_loss,
}


@torch.no_grad()
def record_losses(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss of every record of a batch, for the closure of ``optimizer.step``.

    Args:
        model: transformers model for causal, masked or token-wise language modelling, or for single-label
            classification.
        batch: its inputs, with ``labels``: ``[B, T]`` tokens, or ``[B]`` classes.

    Returns:
        ``[B]``: the mean over a record's own labelled tokens, or its cross entropy.

    Guarantees:
        Entry i depends on record i alone, unless the layers of the model themselves mix the records.

    Raises:
        ValueError: If labels are missing, or no loss of single records is known of this model.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch.get("labels")
    if labels is None:
        raise ValueError("record_losses needs batch['labels']")
    kind = getattr(model, "loss_type", None)
    if kind is None and not hasattr(model, "config"):
        raise ValueError(
            f"no loss of single records is known of {type(model).__name__}: let the closure compute one loss per "
            "record, such as F.cross_entropy(model(x), y, reduction='none')"
        )
    if kind == "ForSequenceClassification":
        return _class_losses(model, model(**inputs).logits, labels)
    if kind not in _TOKENS:
        raise ValueError(
            f"no loss of single records is known of {type(model).__name__} ({kind}): compute it in the closure"
        )
    return _TOKENS[kind](model(**inputs).logits, labels)


def _class_losses(model: Any, logits: Tensor, labels: Tensor) -> Tensor:
    """Return cross entropies ``[B]``."""
    problem = model.config.problem_type
    if problem not in (None, "single_label_classification") or labels.is_floating_point() or logits.shape[-1] < 2:
        raise ValueError(
            f"record_losses knows single-label classification only, not {problem or 'regression'}: compute it in the "
            "closure"
        )
    return F.cross_entropy(logits.float(), labels.view(-1), reduction="none")
