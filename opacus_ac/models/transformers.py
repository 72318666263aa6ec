"""Makes the loss of a transformers model a mean over records, so that it can be clipped per record.

Every loss that leaves a model was computed here, per record, or is refused. This holds however the model was called,
wherever its labels stood and whatever its output is.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.loss import per_record_causal_lm_loss, per_record_token_loss
from opacus_ac.models.loss_entries import Call, Entries
from opacus_ac.models.loss_heads import Head, agrees, folds_choices, heads_of, labels_in, logits_in
from opacus_ac.models.record_mean import RecordMean, is_ours, refuse_backward
from opacus_ac.optimizer.loss_tape import LossTape
from opacus_ac.sampling.users import UserRows

# Losses of transformers that average over all tokens of the batch, and what replaces them.
_TOKEN_LOSSES: dict[str | None, Callable[..., Tensor]] = {
    "ForCausalLM": per_record_causal_lm_loss,
    "ForConditionalGeneration": per_record_causal_lm_loss,
    "ForMaskedLM": per_record_token_loss,
    "ForTokenClassification": per_record_token_loss,
}


def _models_in(module: nn.Module) -> list[Any]:
    """Return the transformers models inside ``module``, none if the library is not loaded."""
    transformers = sys.modules.get("transformers")
    return [] if transformers is None else [m for m in module.modules() if isinstance(m, transformers.PreTrainedModel)]


def has_record_losses(module: nn.Module) -> bool | None:
    """Return whether the transformers models inside ``module`` have known losses of single records.

    Returns:
        None where no model inside has a loss of its own.
    """
    models = _models_in(module)
    if any(heads_of(model) for model in models):
        return True
    return (
        False if any(getattr(model, "loss_type", None) or "For" in type(model).__name__ for model in models) else None
    )


def averages_tokens(module: nn.Module) -> bool:
    """Return whether a transformers model inside ``module`` has a library loss that averages over a batch's tokens."""
    return any(head.of_tokens for model in _models_in(module) for head in heads_of(model))


def choice_models(module: nn.Module) -> list[nn.Module]:
    """Return the transformers models inside ``module`` that run each record as several rows, one for each choice."""
    return [model for model in _models_in(module) if folds_choices(model)]


def check_choices(models: Iterable[nn.Module], mode: str) -> None:
    """Refuse models of which some layers get a row for each choice and others a record with all of its choices.

    Raises:
        ValueError: If there is one, and ``mode`` is not "bk". Opacus's hooks add up what tied layers get row by row.
    """
    for model in models:
        if mode != "bk" and len(heads_of(model)) > 1:
            raise ValueError(
                f"{type(model).__name__} has layers that get a row for each choice, and others that get the choices of "
                f'a record together. grad_sample_mode="{mode}" cannot tell them apart: use "bk"'
            )


def classes_among(module: nn.Module) -> int | None:
    """Return the number of classes among which the transformers models inside ``module`` choose, by their labels.

    Returns:
        None for models of words, places and numbers.
    """
    found = [head.classes(model) for model in _models_in(module) for head in heads_of(model)]
    numbers = [number for number in found if number is not None]
    return max(numbers) if numbers and len(numbers) == len(found) else None


def _token_loss(model: Any) -> Callable[..., Tensor] | None:
    """Return what replaces the library's ``loss_function`` of a model, None where that is not a mean over tokens."""
    kind = getattr(model, "loss_type", None)
    if kind is None:  # then transformers falls back to the causal loss
        heads = heads_of(model)
        kind = "ForCausalLM" if not heads or heads[0].of_tokens else kind
    return _TOKEN_LOSSES.get(kind)


class RecordLoss:
    """Loss function for transformers models: mean (or sum) over records of each record's mean token loss.

    Where records are users, a user's loss is the mean over those of the user's rows that predict a token. In
    evaluation, where batches are not drawn, each row counts for itself.

    Guarantees:
        A record's gradient does not depend on the other records of its batch. The number of labelled tokens of the
        batch (``num_items_in_batch``) is ignored: it would couple the records.
    """

    def __init__(self, per_record: Callable[..., Tensor], records: RecordMean, model: nn.Module) -> None:
        self.per_record, self.records, self.model = per_record, records, model
        self.called = False

    def __call__(
        self, logits: Tensor, labels: Tensor | None = None, *args: Any, ignore_index: int = -100, **kwargs: Any
    ) -> Tensor:
        """Return the loss of a batch from logits ``[B, T, V]`` and labels ``[B, T]``."""
        if labels is None or kwargs.get("shift_labels") is not None:
            raise ValueError(f"{type(self.model).__name__} needs labels=, unshifted, to compute its loss per record")
        self.called = True
        losses = self.per_record(logits, labels.to(logits.device), ignore_index)
        predicted = labels[:, 1:] if self.per_record is per_record_causal_lm_loss else labels
        return self.records.reduce(losses, (predicted != ignore_index).any(1), self.model.training)


def use_record_loss(
    module: nn.Module, tape: LossTape, reduction: str = "mean", users: UserRows | None = None
) -> Callable[[], None]:
    """Make ``model(**batch, labels=...).loss`` of every transformers model inside ``module`` a mean over records.

    A model that computes its loss by itself, not with its ``loss_function``, gets it computed again from the logits and
    labels, per record. That needs a known head, and a library loss that is what the head computes from them. Any other
    loss is refused: at the forward pass in training mode, else when its gradient is asked for.

    Args:
        module: any module; those without a transformers model inside are left alone.
        tape: receives the per-record losses of each training forward.
        reduction: "mean" or "sum" over the records.
        users: counts the users of a batch, where a record is a user of several rows.

    Returns:
        A function that puts the old losses back.

    Raises:
        ValueError: If the model adds a loss over the whole batch (router load balancing). The first training forward
            raises it too, if its loss is not known to be a mean over records.
    """
    models = _models_in(module)
    for model in models:
        if getattr(model.config, "output_router_logits", False):
            raise ValueError(
                f"{type(model).__name__} adds a router loss over the whole batch (config.output_router_logits), "
                "which couples records: set it to False"
            )
    records = RecordMean(tape, reduction, users)
    undoes = [_replace_loss(model, records) for model in models]
    peft = sys.modules.get("peft")
    if peft is not None and models:  # some of them compute losses of their own
        undoes += [_Watch(m, records, None).attach() for m in module.modules() if isinstance(m, peft.PeftModel)]

    def undo() -> None:
        for step in undoes:
            step()

    return undo


def _replace_loss(model: Any, records: RecordMean) -> Callable[[], None]:
    """Replace the loss of one model and watch every loss that leaves it."""
    before = model.__dict__.get("_loss_function")
    per_record = _token_loss(model) if before is None else None  # a loss of the user's own is looked at, not replaced
    record = None if per_record is None else RecordLoss(per_record, records, model)
    if record is not None:
        model.loss_function = record
    detach = _Watch(model, records, record).attach()

    def undo() -> None:
        detach()
        if record is not None and model.__dict__.get("_loss_function") is record:
            del model._loss_function

    return undo


class _Watch:
    """Looks at what leaves a model, replaces a loss that it can compute per record, and refuses any other."""

    of_records = True  # goes with the model where single records are run through it

    def __init__(self, model: Any, records: RecordMean, record: RecordLoss | None) -> None:
        self.model, self.records, self.record = model, records, record
        self.heads = heads_of(model)
        self.entries: dict[str, Any] = {}  # those that gave the library's loss, by its name
        self.signature = inspect.signature(model.forward)

    def attach(self) -> Callable[[], None]:
        """Start; returns a function that ends it."""
        return self.model.register_forward_hook(self, with_kwargs=True).remove

    def __call__(self, _module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output with a loss that is a mean over records.

        Raises:
            ValueError: If it has another.
        """
        given = self._arguments(args, kwargs)
        taped = self.record is not None and self.record.called
        if self.record is not None:
            self.record.called = False
        present = [head for head in self.heads if labels_in(given, head) is not None]
        labels = given.get(present[0].labels[0] if present else "labels")
        rows = len(labels) if isinstance(labels, Tensor) and labels.dim() else None
        for place, head in enumerate(present):
            loss = _loss_in(output, head.loss, place)
            if loss is not None and not is_ours(loss, rows):
                losses = self._per_record(loss, head, given, output, len(present))
                if losses is not None:
                    # Of several losses, the loop decides what becomes of them.
                    tape = not taped and len(present) == 1
                    made = self.records.reduce(*losses, self.model.training, tape=tape)
                    output = _with_loss(output, head.loss, place, made)
        for name, value in _scalars(output):
            if value.requires_grad and not is_ours(value, rows):
                self._refuse(name, value)
        return output

    def _arguments(self, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of forward by name, wherever they stood."""
        try:
            bound = self.signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            return kwargs
        return {**bound, **kwargs}

    def _per_record(
        self, loss: Tensor, head: Head, given: Mapping[str, Any], output: Any, count: int
    ) -> tuple[Tensor, Tensor] | None:
        """Return the losses ``[R]`` of rows and which of them are labelled; None where they are not known.

        Args:
            loss: the library's loss.
            head: the head whose loss it is.
            given: the arguments of forward.
            output: what the model returned.
            count: number of losses in it.
        """
        logits, labels = logits_in(output, head, self.heads, count), labels_in(given, head)
        if logits is None or labels is None:
            return None
        labels = [value.to(logits[0].device) for value in labels]
        traced = torch._C._functorch.peek_interpreter_stack() is not None  # values cannot be looked at
        narrow = not head.wide and any(torch.finfo(scores.dtype).bits < 32 for scores in logits)
        call, agreed = Call(self.model, given), []
        for entries in (self.entries[head.loss],) if head.loss in self.entries else head.entries:
            try:
                parts: list[Entries] = entries(logits, labels, call)
            except (ValueError, IndexError, RuntimeError):  # shapes that the head does not have
                continue
            if traced or agrees(loss, head, parts, given.get("num_items_in_batch"), narrow=narrow):
                agreed.append((entries, parts))
        tells = traced or math.isfinite(float(loss.detach()))  # a loss that is not finite is that of any head
        if not agreed or (tells and len(agreed) > 1):  # of several losses with one value the gradients differ
            return None
        found, parts = agreed[0]
        if tells and not traced:
            self.entries[head.loss] = found
        losses = head.joined([part.per_record() for part in parts])
        return losses, torch.stack([part.counted.any(1) for part in parts]).any(0)

    def _refuse(self, name: str, value: Tensor) -> None:
        what = type(self.model).__name__
        reason = (
            f"{what} returned a loss ({name}) over the whole batch that is not known to be a mean over records: call "
            "the model without what makes it compute that loss (labels, return_loss, output_router_logits), compute a "
            "per-record loss from its other outputs, and call backward() on its mean"
        )
        if self.model.training and "loss" in name:
            raise ValueError(reason)
        refuse_backward(value, reason)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 0


def _loss_in(output: Any, name: str, place: int) -> Tensor | None:
    """Return a loss of an output: of a mapping by its name, of a tuple by its place."""
    if isinstance(output, Mapping):
        found = output.get(name)
    else:
        found = output[place] if isinstance(output, tuple) and place < len(output) else None
    return found if _is_scalar(found) else None


def _with_loss(output: Any, name: str, place: int, loss: Tensor) -> Any:
    if isinstance(output, Mapping):
        output[name] = loss  # type: ignore[index]
        return output
    return (*output[:place], loss, *output[place + 1 :])


def _scalars(output: Any, name: str = "loss") -> Iterator[tuple[str, Tensor]]:
    """Yield what a model has computed from a whole batch: scalars, and anything that is called a loss; by name."""
    if isinstance(output, Tensor):
        if output.is_floating_point() and (output.dim() == 0 or "loss" in name):
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _scalars(value, str(key))
    elif isinstance(output, tuple | list):
        for place, value in enumerate(output):
            yield from _scalars(value, f"place {place}" if not _is_scalar(value) else f"loss in place {place}")


__all__ = ["RecordLoss", "averages_tokens", "has_record_losses", "use_record_loss"]
