"""Losses computed per record, so that no record's gradient depends on which others share its batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class LossTape:
    """Hands the records' losses of a physical batch from the loss function to the optimizer. Private values."""

    def __init__(self) -> None:
        self._losses: list[torch.Tensor] = []

    def record(self, losses: torch.Tensor) -> None:
        """Keep the losses ``[B]`` of the records of one forward pass."""
        if losses.dim() != 1:
            raise ValueError(f"record_losses takes one loss per record, shape [B], got shape {tuple(losses.shape)}")
        self._losses.append(losses.detach())

    def take(self) -> torch.Tensor | None:
        """Return and forget what was recorded since the last call, or None."""
        taken, self._losses = self._losses, []
        return torch.cat(taken) if taken else None


def per_record_token_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Return the mean cross entropy over each record's own labelled positions.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``; positions equal to ``ignore_index`` do not count.
        ignore_index: label of the positions to skip.

    Returns:
        ``[B]`` in float32 or better; a record without labelled positions has loss 0.

    >>> loss = per_record_token_loss(torch.zeros(2, 3, 4), torch.tensor([[1, 2, -100], [-100, -100, -100]]))
    >>> [round(x, 4) for x in loss.tolist()]
    [1.3863, 0.0]
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"expected logits [B, T, V] and labels [B, T], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # Flat rows: several times faster on CPU than the [B, V, T] layout.
    losses = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), labels.reshape(-1), ignore_index=ignore_index, reduction="none"
    )
    counts = (labels != ignore_index).sum(1).clamp(min=1)
    return losses.view(labels.shape).sum(1) / counts


def per_record_causal_lm_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Return the next-token loss of each record: position t predicts label t + 1.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, not shifted; ``ignore_index`` positions are not predicted.
        ignore_index: label of the positions to skip.

    Returns:
        ``[B]``, the mean over each record's own predicted tokens (0 for a record without any).

    Guarantees:
        Entry i depends on record i alone. The usual mean over all tokens of the batch does not have this property:
        there a record's gradient changes when another, longer record joins the batch.

    >>> round(per_record_causal_lm_loss(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]])).item(), 4)
    0.6931
    """
    return per_record_token_loss(logits[:, :-1], labels[:, 1:], ignore_index)
