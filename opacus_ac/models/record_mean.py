"""The loss of a batch as a mean over its records, and the mark by which it is known."""

from __future__ import annotations

import torch
from torch import Tensor

from opacus_ac.loss import per_user_loss
from opacus_ac.optimizer.loss_tape import LossTape
from opacus_ac.sampling.users import UserRows

_ROWS_MARK = "_opacus_ac_rows"


class RecordMean:
    """Reduces the losses of rows to that of a batch, and knows a loss that it made."""

    def __init__(self, tape: LossTape, reduction: str, users: UserRows | None) -> None:
        self.tape, self.reduction, self.users = tape, reduction, users

    def reduce(self, losses: Tensor, labelled: Tensor, training: bool, *, tape: bool = True) -> Tensor:
        """Return the mean (or sum) over records.

        Args:
            losses: ``[R]``, of rows.
            labelled: ``[R]``: whether a row has anything to learn from.
            training: whether the model is in training mode.
            tape: whether the losses go to the tape.
        """
        rows, trains = len(losses), training and torch.is_grad_enabled()
        by_row = self.users is not None and not (trains or self.users.supposed)
        if self.users is not None and not by_row:
            losses = per_user_loss(losses, labelled, self.users.count(rows))
        if trains and tape:
            self.tape.record(losses)
        loss = losses.mean() if self.reduction == "mean" else losses.sum()
        if by_row and loss.requires_grad:
            refuse_backward(
                loss, "of a model in evaluation mode the loss is a mean over rows, not over users: call model.train()"
            )
        if not loss.is_inference():
            setattr(loss, _ROWS_MARK, (loss._version, rows))
        return loss


def is_ours(loss: Tensor, rows: int | None) -> bool:
    """Say whether ``loss`` was made per record here, from ``rows`` rows if given, and nothing was added to it since."""
    mark = getattr(loss, _ROWS_MARK, None)
    return mark is not None and mark[0] == loss._version and rows in (None, mark[1])


def refuse_backward(value: Tensor, reason: str) -> None:
    """Let a gradient of ``value`` raise ``ValueError``; the value may be looked at."""

    def refuse(_gradient: Tensor) -> None:
        raise ValueError(reason)

    value.register_hook(refuse)
