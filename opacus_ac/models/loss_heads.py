"""The heads of transformers models: which loss each has, and where its logits and labels are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opacus_ac.models import loss_entries as of
from opacus_ac.models.loss_entries import Call, Entries


@dataclass(frozen=True)
class Head:
    """A kind of head: where its logits are, and what its loss is.

    Attributes:
        logits: names of its logits in the output; in a tuple they follow the losses in this order.
        labels: names of its labels among the arguments of forward.
        entries: from logits, labels and the call to the parts of the loss; several where models of this name differ.
            The first that gives the library's loss is the one.
        of_tokens: whether a record has as many entries as labelled tokens.
        wide: whether the library computes it in float32, whatever the logits are.
        added: whether the loss is the sum of the parts, and not their mean.
        loss: name of its loss in the output.
        few: from the model's config to the number of classes that a label chooses from; None where it does not.
        further: from the model's config to the names of logits that follow only in some models of this kind.
    """

    logits: tuple[str, ...]
    labels: tuple[str, ...]
    entries: tuple[Callable[[list[Tensor], list[Tensor], Call], list[Entries]], ...]
    of_tokens: bool = False
    wide: bool = False
    added: bool = False
    loss: str = "loss"
    few: Callable[[Any], int | None] | None = None
    further: Callable[[Any], tuple[str, ...]] | None = None

    def of(self, model: Any) -> Head:
        """Return the head as this model has it."""
        if self.further is None:
            return self
        return replace(self, logits=(*self.logits, *self.further(model.config)), further=None)

    def classes(self, model: Any) -> int | None:
        """Return the number of classes among which a label chooses; None where they are words, places or numbers."""
        return None if self.few is None else self.few(model.config)

    def joined(self, parts: list[Any]) -> Any:
        """Return the loss of these losses of its parts."""
        total = sum(parts[1:], start=parts[0])
        return total if self.added else total / len(parts)


def _classes_of(config: Any) -> int | None:
    """Return what a head for whole records chooses from: classes, yes and no for each of them, or numbers."""
    problem = getattr(config, "problem_type", None)
    if problem == "regression" or (problem is None and config.num_labels == 1):
        return None
    return 2 if problem == "multi_label_classification" else int(config.num_labels)


_LABELS, _LOGITS = ("labels",), ("logits",)
_TOKENS = Head(_LOGITS, _LABELS, (of.tokens,), of_tokens=True, wide=True)
_TAGS = replace(_TOKENS, few=lambda config: config.num_labels)
_ROWS = Head(_LOGITS, _LABELS, (of.rows,), few=_classes_of)
_ROWS_OF_DEBERTA = replace(_ROWS, entries=(of.rows_of_deberta,))
_CHOICES = Head(_LOGITS, _LABELS, (of.rows,))
_PAIRS = Head(_LOGITS, _LABELS, (of.rows,), few=lambda _config: 2)
_ENTITIES = Head(_LOGITS, _LABELS, (of.rows, of.several_labels), few=lambda config: config.num_labels)
_SPANS = Head(("start_logits", "end_logits"), ("start_positions", "end_positions"), (of.spans,))
# Decoders of translation models (BART's family) take labels that are shifted already.
_CAUSAL = Head(_LOGITS, _LABELS, (of.next_token_entries, of.tokens), of_tokens=True, wide=True)
_WORDS_AND_NEXT = Head(
    ("prediction_logits", "seq_relationship_logits"),
    ("labels", "next_sentence_label"),
    (of.words_and_order,),
    of_tokens=True,
    added=True,
)
_WORDS_AND_ORDER = Head(
    ("prediction_logits", "sop_logits"),
    ("labels", "sentence_order_label"),
    (of.words_and_order,),
    of_tokens=True,
    added=True,
)
_REPLACED = Head(_LOGITS, _LABELS, (of.replaced_tokens,), of_tokens=True, few=lambda _config: 2)
_PIXELS = Head(_LOGITS, _LABELS, (of.pixels,), of_tokens=True, few=lambda config: config.num_labels)
_STREAMS = replace(
    _CAUSAL,
    entries=(of.several_next_tokens,),
    further=lambda config: ("logits_ngram",) if config.ngram > 1 else (),
)
_NEXT_WORDS = Head(_LOGITS, _LABELS, (of.next_token_entries,), of_tokens=True, wide=True)
_CHOICE = Head(("mc_logits",), ("mc_labels",), (of.rows,), loss="mc_loss")
_TRANSCRIPT = Head(_LOGITS, _LABELS, (of.transcripts,))
# Part of the class name, and the heads: the first that fits. A model with several heads returns several losses, which
# the loop adds up. Losses that the library's ``loss_function`` shifts are not here: a model that uses it gets the loss
# per record in its place.
HEADS: tuple[tuple[str, tuple[Head, ...]], ...] = (
    ("DebertaForSequenceClassification", (_ROWS_OF_DEBERTA,)),
    ("DebertaV2ForSequenceClassification", (_ROWS_OF_DEBERTA,)),
    ("ProphetNetFor", (_STREAMS,)),
    *(
        (name, (_ROWS,))
        for name in (
            "ForSequenceClassification",
            "ForImageClassification",
            "ForVideoClassification",
            "ForAudioClassification",
            "ForImagesAndTextClassification",
            "ForImageAndTextRetrieval",
            "ForVisualReasoning",
        )
    ),
    ("ForMultipleChoice", (_CHOICES,)),
    ("ForNextSentencePrediction", (_PAIRS,)),
    ("ForEntityClassification", (_ENTITIES,)),
    ("ForEntityPairClassification", (_ENTITIES,)),
    ("ForTokenClassification", (_TAGS,)),
    ("ForEntitySpanClassification", (_TAGS,)),
    ("ForMaskedLM", (_TOKENS,)),
    # The decoders of these are fed the labels shifted.
    *(
        (name, (_TOKENS,))
        for name in (
            "ForConditionalGeneration",
            "MarianMTModel",
            "EncoderDecoderModel",
            "ForSpeechToText",
            "ForTextToText",
        )
    ),
    ("ForQuestionAnswering", (_SPANS,)),
    ("AlbertForPreTraining", (_WORDS_AND_ORDER,)),
    ("ElectraForPreTraining", (_REPLACED,)),
    ("FunnelForPreTraining", (_REPLACED,)),
    ("ForPreTraining", (_WORDS_AND_NEXT,)),
    ("DoubleHeads", (_NEXT_WORDS, _CHOICE)),
    ("ForSemanticSegmentation", (_PIXELS,)),
    ("ForCTC", (_TRANSCRIPT,)),
    *(
        (name, (_CAUSAL,))
        for name in (
            "ForCausalLM",
            "LMHead",
            "BertGenerationDecoder",
            "ForCausalImageModeling",
            "ForVisionText2Text",
            "ForProteinText2Text",
        )
    ),
)


def heads_of(model: Any) -> tuple[Head, ...]:
    """Return the heads of a transformers model, by the name of its class or of a class that it inherits from."""
    bases = type(model).__mro__
    accepted = {
        name for cls in bases if "forward" in vars(cls) for name in inspect.signature(vars(cls)["forward"]).parameters
    }
    for cls in bases:
        for part, heads in HEADS:
            if part in cls.__name__ and all(name in accepted for head in heads for name in head.labels):
                return tuple(head.of(model) for head in heads)
    return ()


PAIRS = "opacus_ac_runs_pairs"
"""Attribute of a model whose records are pairs of sequences (:func:`opacus_ac.models.pairs.run_pairs`)."""


def folds_choices(model: Any) -> bool:
    """Return whether a record of the model has several sequences ``[K, T]``, which it runs as rows of their own."""
    by_name = any(part in cls.__name__ for cls in type(model).__mro__ for part in ("ForMultipleChoice", "DoubleHeads"))
    return by_name or hasattr(model, PAIRS)


def logits_in(output: Any, head: Head, heads: tuple[Head, ...], losses: int) -> list[Tensor] | None:
    """Return the logits of one head in an output, a mapping or a tuple that starts with ``losses`` losses.

    Returns:
        None where they are not there.
    """
    if isinstance(output, Mapping):
        found = [output.get(name) for name in head.logits]
    else:
        names = [name for other in heads for name in other.logits]
        start = losses + names.index(head.logits[0])
        found = list(output[start : start + len(head.logits)])
    tensors = [value for value in found if isinstance(value, Tensor)]
    return tensors if len(tensors) == len(head.logits) else None


def labels_in(arguments: Mapping[str, Any], head: Head) -> list[Tensor] | None:
    """Return the labels among the arguments of a forward pass; None where one is missing."""
    found = [value for name in head.labels if isinstance(value := arguments.get(name), Tensor)]
    return found if len(found) == len(head.labels) else None


def agrees(loss: Tensor, head: Head, parts: list[Entries], items: Any = None, *, narrow: bool = False) -> bool:
    """Return whether ``loss`` is what the library computes from these entries.

    A loss that is not finite is not compared.

    Args:
        loss: scalar.
        head: the head whose loss it is.
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
        expected = float(head.joined([part.of_the_library(count) for part in parts]))
        if math.isnan(expected) or abs(value - expected) <= tolerance * max(abs(value), abs(expected)):
            return True
    return False
