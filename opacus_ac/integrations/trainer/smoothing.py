"""Label smoothing whose loss is a mean over records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from opacus_ac.models.loss_entries import IGNORE, Entries
from opacus_ac.models.record_mean import RecordMean
from opacus_ac.optimizer.loss_tape import LossTape

if TYPE_CHECKING:
    from opacus_ac.integrations.trainer.trainer import PrivateTrainer


class RecordSmoother(LabelSmoother):
    """Replaces the Trainer's smoother, which averages over all labels of a batch.

    Args:
        trainer: the Trainer, whose optimizer gets the losses of the records.
        epsilon: ``label_smoothing_factor``.

    Guarantees:
        The loss of a record is the mean over its own labels, as transformers has it for a batch of this record alone.

    References:
        arXiv 1512.00567, section 7.
    """

    def __init__(self, trainer: PrivateTrainer, epsilon: float) -> None:
        super().__init__(epsilon=epsilon)
        self.trainer = trainer

    def __call__(
        self, model_output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss of a batch.

        Args:
            model_output: what the model returned without labels.
            labels: ``[B, T]``, or ``[B]`` for classes of whole records.
            shift_labels: whether a position predicts the label of the next.
            num_items_in_batch: ignored, because a number of labels would couple the records of the batch.
        """
        logits = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        entries = self._entries(logits, labels.to(logits.device))
        optimizer, loader = self.trainer.private_optimizer, self.trainer._private_loader
        tape = LossTape() if optimizer is None else optimizer.tape
        records = RecordMean(tape, "mean", None if loader is None else loader.users)
        return records.reduce(entries.per_record(), entries.counted.any(1), self.trainer.model.training)

    def _entries(self, logits: Tensor, labels: Tensor) -> Entries:
        """Return the cross entropies with smoothed labels, from logits ``[B, ..., C]`` and labels ``[B, ...]``."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        losses = F.cross_entropy(
            wide, labels.flatten(), ignore_index=IGNORE, reduction="none", label_smoothing=self.epsilon
        )
        return Entries(losses.reshape(len(labels), -1), (labels != IGNORE).reshape(len(labels), -1))
