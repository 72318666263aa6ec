"""The optimizer that the private one wraps: with momentum for the planned steps, or one that finds its own rate."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from opacus_ac.integrations.trainer.arguments import ADAMW, USUAL_BETA1, PrivacyArguments
from opacus_ac.optimizer.auto_adam import AutoAdam
from opacus_ac.optimizer.momentum import planned_beta1


def refused_inner(args: Any, privacy: PrivacyArguments, optimizers: Any) -> list[str]:
    """Return the reasons why the arguments allow no optimizer that finds its learning rate, each with its remedy."""
    if not privacy.auto_learning_rate:
        return []
    found = []
    if not _is_adamw(args):
        found.append(f"auto_learning_rate with optim={_name(args)!r}: it is an optimizer of its own: leave optim out")
    if optimizers is not None and optimizers[0] is not None:
        found.append("auto_learning_rate with optimizers=: pass opacus_ac.AutoAdam there, or leave one of them out")
    if privacy.fused_step:
        found.append("auto_learning_rate with fused_step: it needs all gradients at once: use fused_step=False")
    return found


def with_planned_momentum(args: Any, privacy: PrivacyArguments, steps: int) -> Any:
    """Return arguments whose ``adam_beta1`` suits a run of so many steps; those of the caller are not changed."""
    if not (privacy.planned_momentum and _is_adamw(args) and args.adam_beta1 == USUAL_BETA1):
        return args
    args = copy.copy(args)
    args.adam_beta1 = planned_beta1(steps)
    return args


def auto_adam(trainer: Any, steps: int) -> AutoAdam:
    """Return the optimizer that finds its learning rate, with the Trainer's groups of weight decay.

    Where nobody has named a learning rate, the optimizer's own hint counts: the Trainer's default suits runs without
    noise.

    Args:
        trainer: the Trainer, which has its model and arguments.
        steps: planned number of steps of the whole run.
    """
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    parts: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parts[name in decayed].append(parameter)
    groups = [
        {"params": parameters, "weight_decay": trainer.args.weight_decay if decays else 0.0}
        for decays, parameters in parts.items()
        if parameters
    ]
    given = trainer.args.adam_beta1 if trainer.args.adam_beta1 != USUAL_BETA1 else None
    hint = {} if trainer.args.learning_rate == _usual_rate(trainer.args) else {"lr": trainer.args.learning_rate}
    return AutoAdam(groups, **hint, steps=steps, beta1=given)


def _usual_rate(args: Any) -> Any:
    """Return the ``learning_rate`` of who has named none. Subclasses of ``TrainingArguments`` have their own."""
    return next(field.default for field in fields(args) if field.name == "learning_rate")


def _is_adamw(args: Any) -> bool:
    return _name(args) in ADAMW


def _name(args: Any) -> str:
    return str(getattr(args.optim, "value", args.optim))
