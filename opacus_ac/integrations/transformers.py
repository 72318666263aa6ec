"""Makes the loss of a transformers model a mean over records, so that it can be clipped per record."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.loss import LossTape, per_record_causal_lm_loss, per_record_token_loss, per_user_loss
from opacus_ac.users import UserRows

# Losses of transformers that average over all tokens of the batch, and what replaces them.
_TOKEN_LOSSES = {
    "ForCausalLM": per_record_causal_lm_loss,
    "ForConditionalGeneration": per_record_causal_lm_loss,
    "ForMaskedLM": per_record_token_loss,
    "ForTokenClassification": per_record_token_loss,
}
# Losses that are a mean over rows already.
_RECORD_LOSSES = {"ForSequenceClassification", "ForMultipleChoice", "ForImageClassification", "ForVideoClassification"}


def __getattr__(name: str) -> Any:
    # On first use, because the Trainer imports the engine, and the engine this module.
    if name in ("PrivacyArguments", "PrivateTrainer"):
        return getattr(importlib.import_module("opacus_ac.integrations"), name)
    raise AttributeError(f"module 'opacus_ac.integrations.transformers' has no attribute {name!r}")


def has_record_losses(module: nn.Module) -> bool | None:
    """Say whether the losses of single records are known of the transformers models inside ``module``; None without any."""
    transformers = sys.modules.get("transformers")
    models = (
        [] if transformers is None else [m for m in module.modules() if isinstance(m, transformers.PreTrainedModel)]
    )
    return not any(getattr(m, "loss_type", None) in _RECORD_LOSSES for m in models) if models else None


class RecordLoss:
    """Loss function for transformers models: mean (or sum) over records of each record's mean token loss.

    Where records are users, a user's loss is the mean over those of the user's rows that predict a token. In evaluation, whose
    batches are not drawn, each row counts for itself.

    Guarantees:
        A record's gradient does not depend on the other records of its batch. The number of labelled tokens of the
        batch (``num_items_in_batch``) is ignored: it would couple the records.
    """

    def __init__(
        self,
        per_record: Callable[..., Tensor],
        tape: LossTape,
        reduction: str,
        model: nn.Module,
        name: str,
        users: UserRows | None = None,
    ) -> None:
        self.per_record, self.tape, self.reduction = per_record, tape, reduction
        self.model, self.name, self.users = model, name, users
        self.called = False

    def __call__(
        self, logits: Tensor, labels: Tensor | None = None, *args: Any, ignore_index: int = -100, **kwargs: Any
    ) -> Tensor:
        """Return the loss of a batch from logits ``[B, T, V]`` and labels ``[B, T]``."""
        if labels is None or kwargs.get("shift_labels") is not None:
            raise ValueError(f"{self.name} needs labels=, unshifted, to compute its loss per record")
        self.called = True
        losses = self.per_record(logits, labels.to(logits.device), ignore_index)
        trains = self.model.training and torch.is_grad_enabled()
        if self.users is not None and (trains or self.users.supposed):
            predicted = labels[:, 1:] if self.per_record is per_record_causal_lm_loss else labels
            losses = per_user_loss(losses, (predicted != ignore_index).any(1), self.users.count(len(losses)))
        if trains:
            self.tape.record(losses)
        return losses.mean() if self.reduction == "mean" else losses.sum()


def use_record_loss(
    module: nn.Module, tape: LossTape, reduction: str = "mean", users: UserRows | None = None
) -> Callable[[], None]:
    """Make ``model(**batch, labels=...).loss`` of every transformers model inside ``module`` a mean over records.

    Args:
        module: any module; those without a transformers model inside are left alone.
        tape: receives the per-record losses of each training forward.
        reduction: "mean" or "sum" over the records.
        users: counts the users of a batch, where a record is a user of several rows.

    Returns:
        A function that puts the old losses back.

    Raises:
        ValueError: the model adds a loss over the whole batch (router load balancing). At the first training
            forward with labels: a loss that is not known to be a mean over records.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None:  # then no such model can exist
        return lambda: None
    models = [m for m in module.modules() if isinstance(m, transformers.PreTrainedModel)]
    for model in models:
        if getattr(model.config, "output_router_logits", False):
            raise ValueError(
                f"{type(model).__name__} adds a router loss over the whole batch (config.output_router_logits), "
                "which couples records: set it to False"
            )
    undoes = [_replace_loss(model, tape, reduction, users) for model in models]

    def undo() -> None:
        for step in undoes:
            step()

    return undo


def _replace_loss(model: Any, tape: LossTape, reduction: str, users: UserRows | None) -> Callable[[], None]:
    """Replace the loss of one model and watch that it is the one that runs."""
    # Without a loss type transformers falls back to the causal loss.
    kind = getattr(model, "loss_type", None) or "ForCausalLM"
    if kind in _RECORD_LOSSES and users is None:  # a mean over rows, of which it does not know whose they are
        return lambda: None
    name = type(model).__name__
    before = model.__dict__.get("_loss_function")
    known = kind in _TOKEN_LOSSES
    record = RecordLoss(_TOKEN_LOSSES[kind], tape, reduction, model, name, users) if known else None
    if record is not None:
        model.loss_function = record

    def watch(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        called = record is not None and record.called
        if record is not None:
            record.called = False
        trains = model.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
        if trains and not called and getattr(output, "loss", None) is not None:
            raise ValueError(
                f"the {kind} loss that {name} computed is not known to be a mean over records: call the model "
                "without labels, compute a per-record loss from the logits, and call backward() on its mean"
            )

    handle = model.register_forward_hook(watch, with_kwargs=True)

    def undo() -> None:
        handle.remove()
        if before is not None:
            model.loss_function = before
        elif record is not None:
            del model._loss_function

    return undo
