"""The losses of transformers' heads, entry by entry.

The loss of each record and the loss that the library computes both follow from the entries. transformers averages the
entries of a batch that are not ignored. A record's own loss averages the entries of the record. Both are computed here
from the same entries, so that the record losses replace the library's loss only where the model really has this loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opacus_ac.loss import next_tokens, token_losses

IGNORE = -100


@dataclass(frozen=True)
class Entries:
    """Losses of the entries of a batch.

    Attributes:
        losses: ``[B, n]``, 0 where an entry does not count.
        counted: ``[B, n]`` booleans.
    """

    losses: Tensor
    counted: Tensor

    def per_record(self) -> Tensor:
        """Return ``[B]``: the mean over a record's own entries, 0 without any."""
        return self.losses.sum(1) / self.counted.sum(1).clamp(min=1)

    def of_the_library(self, items: Any = None) -> float:
        """Return the mean over all entries of the batch, or their sum over ``items``; NaN without any."""
        count = float(self.counted.sum()) if items is None else float(items)
        return float(self.losses.detach().double().sum()) / count if count else math.nan


@dataclass(frozen=True)
class Head:
    """A kind of head: where its logits are, and what its loss is.

    Attributes:
        logits: names of its logits in the output; in a tuple they follow the loss in this order.
        labels: names of its labels among the arguments of forward.
        entries: from logits, labels and the model's config to the parts whose mean is the loss; several where models of
            this name differ. The first that gives the library's loss is the one.
        of_tokens: whether a record has as many entries as labelled tokens.
    """

    logits: tuple[str, ...]
    labels: tuple[str, ...]
    entries: tuple[Callable[[list[Tensor], list[Tensor], Any], list[Entries]], ...]
    of_tokens: bool = False


def _tokens(logits: list[Tensor], labels: list[Tensor], _config: Any) -> list[Entries]:
    """Cross entropy of each labelled position."""
    return [Entries(token_losses(logits[0], labels[0]), labels[0] != IGNORE)]


def _next_tokens(logits: list[Tensor], labels: list[Tensor], config: Any) -> list[Entries]:
    return _tokens(logits, [next_tokens(labels[0], IGNORE)], config)


def _classes(logits: Tensor, labels: Tensor, ignored: int) -> Entries:
    """Cross entropy of one class per record, from logits ``[B, C]`` and labels ``[B]``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels, ignore_index=ignored, reduction="none")
    return Entries(losses[:, None], (labels != ignored)[:, None])


def _rows(logits: list[Tensor], labels: list[Tensor], config: Any) -> list[Entries]:
    """Classification or regression of whole records, as ``problem_type`` says."""
    scores, wanted = logits[0], labels[0]
    if scores.dim() != 2:
        raise ValueError(f"logits [B, C] were expected, not {tuple(scores.shape)}")
    problem = getattr(config, "problem_type", None) or "single_label_classification"
    if problem == "single_label_classification":
        return [_classes(scores, wanted.view(-1), IGNORE)]
    wanted = wanted.reshape(len(scores), -1)
    if wanted.shape != scores.shape:
        raise ValueError(f"labels {tuple(wanted.shape)} do not fit logits {tuple(scores.shape)}")
    single = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    wide = torch.promote_types(torch.promote_types(scores.dtype, wanted.dtype), torch.float32)
    losses = single(scores.to(wide), wanted.to(wide), reduction="none")
    return [Entries(losses, torch.ones_like(losses, dtype=torch.bool))]


def _spans(logits: list[Tensor], labels: list[Tensor], _config: Any) -> list[Entries]:
    """First and last token of an answer; a place outside of the record's tokens is ignored, as the library does."""
    length = logits[0].shape[1]
    places = [place.reshape(len(scores), -1) for scores, place in zip(logits, labels, strict=True)]
    if any(place.shape[1] != 1 for place in places):
        raise ValueError("one start and one end per record were expected")
    return [
        _classes(scores, place[:, 0].clamp(0, length), length) for scores, place in zip(logits, places, strict=True)
    ]


_LABELS, _LOGITS = ("labels",), ("logits",)
_TOKEN_HEAD, _ROW_HEAD = Head(_LOGITS, _LABELS, (_tokens,), of_tokens=True), Head(_LOGITS, _LABELS, (_rows,))
_SPAN_HEAD = Head(("start_logits", "end_logits"), ("start_positions", "end_positions"), (_spans,))
# Decoders of translation models (BART's family) take labels that are shifted already.
_CAUSAL_HEAD = Head(_LOGITS, _LABELS, (_next_tokens, _tokens), of_tokens=True)
# Part of the class name, and the head: the first that fits. Losses that the library's ``loss_function`` shifts are not
# here: a model that uses it gets the loss per record in its place.
HEADS: tuple[tuple[str, Head], ...] = (
    ("ForSequenceClassification", _ROW_HEAD),
    ("ForMultipleChoice", _ROW_HEAD),
    ("ForNextSentencePrediction", _ROW_HEAD),
    ("ForImageClassification", _ROW_HEAD),
    ("ForVideoClassification", _ROW_HEAD),
    ("ForAudioClassification", _ROW_HEAD),
    ("ForTokenClassification", _TOKEN_HEAD),
    ("ForMaskedLM", _TOKEN_HEAD),
    ("ForConditionalGeneration", _TOKEN_HEAD),  # the decoder is fed the labels shifted
    ("ForQuestionAnswering", _SPAN_HEAD),
    ("ForCausalLM", _CAUSAL_HEAD),
    ("LMHead", _CAUSAL_HEAD),
)


def head_of(model: Any) -> Head | None:
    """Return the head of a transformers model, by the name of its class or of a class that it inherits from."""
    for cls in type(model).__mro__:
        for part, head in HEADS:
            if part in cls.__name__:
                return head
    return None


def logits_in(output: Any, head: Head) -> list[Tensor] | None:
    """Return the logits in an output, a mapping or a tuple that starts with a loss; None where they are not."""
    if isinstance(output, Mapping):
        found = [output.get(name) for name in head.logits]
    else:
        found = list(output[1 : 1 + len(head.logits)])
    tensors = [value for value in found if isinstance(value, Tensor)]
    return tensors if len(tensors) == len(head.logits) else None


def labels_in(arguments: Mapping[str, Any], head: Head) -> list[Tensor] | None:
    """Return the labels among the arguments of a forward pass; None where one is missing."""
    found = [value for name in head.labels if isinstance(value := arguments.get(name), Tensor)]
    return found if len(found) == len(head.labels) else None


def agrees(loss: Tensor, parts: list[Entries], items: Any = None, *, narrow: bool = False) -> bool:
    """Return whether ``loss`` is what the library computes from these entries.

    A loss that is not finite is not compared.

    Args:
        loss: scalar.
        parts: entries of each part of it.
        items: number of labels that the caller named; some models divide by it, some do not.
        narrow: whether the library may have computed in half precision, though the loss is wide.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        return True
    # Losses are sums of terms >= 0, so that rounding is relative.
    tolerance = 1e-2 if narrow or torch.finfo(loss.dtype).bits < 32 else 2e-5
    for count in {None, items}:
        expected = sum(part.of_the_library(count) for part in parts) / len(parts)
        if math.isnan(expected) or abs(value - expected) <= tolerance * max(abs(value), abs(expected)):
            return True
    return False
