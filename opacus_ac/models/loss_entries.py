"""The losses of transformers' heads, entry by entry.

The loss of each record and the loss that the library computes both follow from the entries. transformers averages the
entries of a batch that are not ignored. A record's own loss averages the entries of the record. Both are computed here
from the same entries, so that the record losses replace the library's loss only where the model really has this loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        added: whether the library adds the entries of a batch up, instead of averaging them.
    """

    losses: Tensor
    counted: Tensor
    added: bool = False

    def per_record(self) -> Tensor:
        """Return ``[B]``: the mean over a record's own entries, 0 without any."""
        return self.losses.sum(1) / self.counted.sum(1).clamp(min=1)

    def of_the_library(self, items: Any = None) -> float:
        """Return the mean over all entries of the batch, or their sum over ``items``; NaN without any."""
        count = float(self.counted.sum()) if items is None else float(items)
        total = float(self.losses.detach().double().sum())
        return total if self.added else total / count if count else math.nan


@dataclass(frozen=True)
class Call:
    """What a loss depends on beside logits and labels.

    Attributes:
        model: the model that was called.
        given: the arguments of its forward, by name.
    """

    model: Any
    given: Mapping[str, Any]

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config


def tokens(logits: list[Tensor], labels: list[Tensor], _call: Call) -> list[Entries]:
    """Cross entropy of each labelled position; several sequences of a record, ``[B, K, T]``, are one."""
    scores, wanted = logits[0], labels[0]
    losses = token_losses(scores.reshape(-1, *scores.shape[-2:]), wanted.reshape(-1, wanted.shape[-1]))
    return [Entries(losses.reshape(len(wanted), -1), (wanted != IGNORE).reshape(len(wanted), -1))]


def next_token_entries(logits: list[Tensor], labels: list[Tensor], call: Call) -> list[Entries]:
    """Cross entropy of each labelled position, which the position before it predicts."""
    wanted = labels[0]
    shifted = next_tokens(wanted.reshape(-1, wanted.shape[-1]), IGNORE)
    return tokens(logits, [shifted.reshape(wanted.shape)], call)


def several_next_tokens(logits: list[Tensor], labels: list[Tensor], call: Call) -> list[Entries]:
    """Cross entropy of each labelled position by ProphetNet, from several streams of logits, smoothed by ``eps``.

    Args:
        logits: ``[B, T, V]`` of the first stream, and ``[B, n - 1, T, V]`` of the others if there are any.
        labels: ``[B, T]``, which every stream predicts.
        call: of a model that may count its first stream alone (``disable_ngram_loss``).
    """
    first, wanted, eps = logits[0][:, None], labels[0], call.config.eps
    further = [] if call.model.disable_ngram_loss else logits[1:]
    streams = torch.cat([first, *further], 1).float()  # the library has float32 here, whatever the model has
    expected = wanted[:, None].expand(streams.shape[:3]).flatten(0, 1)
    counted = expected != IGNORE
    losses = token_losses(streams.flatten(0, 1), expected)
    if eps > 0:
        uniform = -F.log_softmax(streams.flatten(0, 1), -1).mean(-1)
        losses = (1 - eps) * losses + eps * torch.where(counted, uniform, 0)
    return [Entries(losses.reshape(len(wanted), -1), counted.reshape(len(wanted), -1))]


def classes(logits: Tensor, labels: Tensor, ignored: int = IGNORE) -> Entries:
    """Cross entropy of one class per record, from logits ``[B, C]`` and labels ``[B]``."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide, labels, ignore_index=ignored, reduction="none")
    return Entries(losses[:, None], (labels != ignored)[:, None])


def _numbers(scores: Tensor, wanted: Tensor, single: Any) -> Entries:
    """Losses of ``[B, C]`` numbers, of which none is ignored."""
    wanted = wanted.reshape(len(scores), -1)
    if wanted.shape != scores.shape:
        raise ValueError(f"labels {tuple(wanted.shape)} do not fit logits {tuple(scores.shape)}")
    wide = torch.promote_types(torch.promote_types(scores.dtype, wanted.dtype), torch.float32)
    losses = single(scores.to(wide), wanted.to(wide), reduction="none")
    return Entries(losses, torch.ones_like(losses, dtype=torch.bool))


def rows(logits: list[Tensor], labels: list[Tensor], call: Call) -> list[Entries]:
    """Classification or regression of whole records, as ``problem_type`` says."""
    scores, wanted = logits[0], labels[0]
    if scores.dim() != 2:
        raise ValueError(f"logits [B, C] were expected, not {tuple(scores.shape)}")
    problem = getattr(call.config, "problem_type", None) or "single_label_classification"
    if problem == "single_label_classification":
        return [classes(scores, wanted.view(-1))]
    single = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    return [_numbers(scores, wanted, single)]


def rows_of_deberta(logits: list[Tensor], labels: list[Tensor], call: Call) -> list[Entries]:
    """Classification or regression of whole records by DeBERTa, which has other losses without a ``problem_type``."""
    scores, wanted = logits[0], labels[0]
    if call.config.problem_type is not None:
        return rows(logits, labels, call)
    if call.config.num_labels == 1:  # its logits are flat then
        return [_numbers(scores.reshape(len(wanted), -1), wanted, F.mse_loss)]
    if wanted.dim() == 1:
        return [classes(scores, torch.where(wanted < 0, IGNORE, wanted).long())]
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    losses = -(F.log_softmax(wide, -1) * wanted).sum(-1, keepdim=True)  # labels are probabilities of the classes
    return [Entries(losses, torch.ones_like(losses, dtype=torch.bool))]


def several_labels(logits: list[Tensor], labels: list[Tensor], _call: Call) -> list[Entries]:
    """One yes or no for each of the classes, whatever ``problem_type`` says."""
    return [_numbers(logits[0].flatten(1), labels[0], F.binary_cross_entropy_with_logits)]


def spans(logits: list[Tensor], labels: list[Tensor], _call: Call) -> list[Entries]:
    """First and last token of an answer; a place outside of the record's tokens is ignored, as the library does."""
    length = logits[0].shape[1]
    places = [place.reshape(len(scores), -1) for scores, place in zip(logits, labels, strict=True)]
    if any(place.shape[1] != 1 for place in places):
        raise ValueError("one start and one end per record were expected")
    return [classes(scores, place[:, 0].clamp(0, length), length) for scores, place in zip(logits, places, strict=True)]


def words_and_order(logits: list[Tensor], labels: list[Tensor], call: Call) -> list[Entries]:
    """Masked words, and whether two sentences follow each other."""
    return [*tokens(logits[:1], labels[:1], call), classes(logits[1], labels[1].view(-1))]


def replaced_tokens(logits: list[Tensor], labels: list[Tensor], call: Call) -> list[Entries]:
    """Whether each token was replaced; positions that are not attended to do not count."""
    entries = _numbers(logits[0], labels[0], F.binary_cross_entropy_with_logits)
    mask = call.given.get("attention_mask")
    counted = entries.counted if mask is None else mask.to(entries.losses.device) == 1
    return [Entries(torch.where(counted, entries.losses, 0), counted)]


def pixels(logits: list[Tensor], labels: list[Tensor], call: Call) -> list[Entries]:
    """Cross entropy of each pixel, from logits ``[B, C, h, w]`` of a coarser image."""
    ignored = call.config.semantic_loss_ignore_index
    scores = F.interpolate(logits[0], size=labels[0].shape[-2:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(scores, labels[0], ignore_index=ignored, reduction="none")
    return [Entries(losses.flatten(1), (labels[0] != ignored).flatten(1))]


def transcripts(logits: list[Tensor], labels: list[Tensor], call: Call) -> list[Entries]:
    """Connectionist temporal classification of a transcript ``[B, U]`` from logits ``[B, T, V]``.

    A record whose transcript is empty is silence, and has a loss like any other.
    """
    config, mask = call.config, call.given.get("attention_mask")
    lengths = torch.full((len(logits[0]),), logits[0].shape[1], device=logits[0].device)
    if mask is not None:
        if not hasattr(call.model, "_get_feat_extract_output_lengths"):
            raise ValueError("the number of frames of a record is not known")
        lengths = call.model._get_feat_extract_output_lengths(mask.sum(-1)).to(torch.long)
    named = (labels[0] != IGNORE) & (labels[0] != config.pad_token_id)
    with torch.backends.cudnn.flags(enabled=False):
        losses = F.ctc_loss(
            F.log_softmax(logits[0], dim=-1, dtype=torch.float32).transpose(0, 1),
            labels[0].masked_select(named),
            lengths,
            named.sum(-1),
            blank=config.pad_token_id,
            reduction="none",
            zero_infinity=config.ctc_zero_infinity,
        )
    added = config.ctc_loss_reduction == "sum"
    if not added:
        losses = losses / named.sum(-1).clamp(min=1)
    return [Entries(losses[:, None], torch.ones_like(losses, dtype=torch.bool)[:, None], added)]
