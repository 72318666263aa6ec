"""What a step refuses before it begins: gradients that no release covers, records that nothing tells apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from opacus_ac.grad_sample.source import GradientSource
from opacus_ac.optimizer.model_watch import ModelWatch
from opacus_ac.sampling.delivery import Delivery, Draw
from opacus_ac.sampling.plan import SamplingPlan


def check_outside(groups: Sequence[Mapping[str, Any]], moved: Iterable[nn.Parameter], watch: ModelWatch | None) -> None:
    """Refuse what would move weights without a release: gradients, parameters and changes that no sum knows."""
    known = {id(p) for p in moved}
    for number, group in enumerate(groups):
        for parameter in group["params"]:
            if parameter.requires_grad == (id(parameter) in known) and (
                parameter.requires_grad or parameter.grad is None
            ):
                continue
            if not parameter.requires_grad and parameter.grad is None:
                continue  # frozen since
            what = "has a gradient that was not clipped" if parameter.grad is not None else "is trained now"
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} in group {number} of the "
                f"optimizer{_name_of(parameter, watch)} {what}, and is not among those that the private step trains, "
                "so that no release covers it. Freeze it and clear its gradient, or call engine.detach(model) and "
                "make_private again with all that is to be trained"
            )
    if watch is not None:
        watch.check()


def _name_of(parameter: nn.Parameter, watch: ModelWatch | None) -> str:
    name = None if watch is None else watch.name_of(parameter)
    return "" if name is None else f" ({name})"


def check_none_frozen(params: Iterable[nn.Parameter]) -> None:
    """Refuse parameters that were frozen later, where Opacus's hooks give the gradients.

    Raises:
        ValueError: If a parameter is frozen.
    """
    if not all(p.requires_grad for p in params):
        raise ValueError(
            "parameters were frozen after make_private, which Opacus's hooks do not follow: use "
            "grad_sample_mode='bk', where layers may take turns, or call engine.detach(model) and make_private again"
        )


def refuse_later_part() -> NoReturn:
    """Refuse a physical batch whose logical batch has lost those before it.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        "the physical batches before this one are not in the sums of their logical batch any more: a step failed, or a "
        "batch was left out. Nothing of it was released; go on with the next batch of the loader, until a new logical "
        "batch begins"
    )


def check_records(
    plan: SamplingPlan | None, source: GradientSource, draw: Draw | None, norms: Tensor, too_few: str, too_many: str
) -> None:
    """Check that there is one measurement for each record of the batch that the loader handed out.

    Args:
        plan: the sampling plan; None for batches by hand.
        source: what measured the records.
        draw: the draw of the batch in hand; None for a batch of unknown origin.
        norms: the norms of the measured records, ``[B]``.
        too_few: what to say where there are fewer.
        too_many: what to say where there are more.

    Raises:
        ValueError: If it is, or if nothing tells whether a record was measured twice.
    """
    if plan is None or draw is None:
        if source.merged_passes:
            raise ValueError(
                "several forward passes of the model went into one backward pass, and without a batch of the "
                "private loader nothing tells whether their records are the same. Call backward() after each "
                "forward pass, or take the batches from the loader that make_private returned"
            )
        if plan is not None and source.backward_passes > 1:
            raise ValueError(
                "several backward passes went into one step, and without a batch of the private loader nothing tells "
                "whether a record is in them twice. Take one step for every backward pass"
            )
        return
    if draw.records and norms.shape[0] > draw.records:
        if source.backward_passes > 1:
            raise ValueError(
                "several backward passes went into one step, and a record of the batch is in more than one of them: "
                "add up the losses of the batch and call backward() once"
            )
        raise ValueError(too_many)
    if draw.records and norms.shape[0] < draw.records:
        raise ValueError(too_few)


def more_follow(plan: SamplingPlan | None, delivery: Delivery | None, signalled: bool) -> bool:
    """Return whether more physical batches of the logical one follow, as the draw says, or Opacus's signals.

    Raises:
        ValueError: the signals would join batches that were drawn each for itself.
    """
    if delivery is None or plan is None:
        if signalled and plan is not None:
            raise ValueError(
                "a part of a logical batch is of unknown origin, so nothing tells whether a record is in it twice. "
                "Take the batches from the loader that make_private returned, or from BatchMemoryManager around it, "
                "each once"
            )
        return signalled
    if signalled and delivery.draw.last and not delivery.split:
        raise ValueError(
            "signal_skip_step() would join this batch with the next one, which is drawn for itself: a record in both "
            "would count twice. Choose the batch_size of the loader, and max_physical_batch_size in make_private"
        )
    return not delivery.draw.last
