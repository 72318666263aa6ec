"""The only code that touches the user's model, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn

from opacus_ac.engine.parts import Job
from opacus_ac.grad_sample import check_model, expand_broadcast_embeddings, register_rules
from opacus_ac.grad_sample.alone.records import RecordsAlone
from opacus_ac.grad_sample.checks.coupled import check_records_apart
from opacus_ac.grad_sample.folded_rows import FoldedRows
from opacus_ac.grad_sample.hooked_model import HookedModel, ModelHooks
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.grad_sample.opacus_hooks import PerSampleSource
from opacus_ac.models.peft import check_peft
from opacus_ac.models.transformers import check_choices, choice_models, use_record_loss
from opacus_ac.optimizer.model_watch import ModelWatch
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.parameters import named_parameters
from opacus_ac.sampling.users import UserRows

Undo = Callable[[], None]
Pause = Callable[[], AbstractContextManager[None]]


def attach(job: Job, optimizer: AdaptiveClipDPOptimizer, users: UserRows | None) -> tuple[Any, Undo]:
    """Attach what the optimizer needs to the model.

    Args:
        job: the arguments of ``make_private``.
        optimizer: the private optimizer.
        users: the rows of users; None where a record is a row.

    Returns:
        What the loop calls (the model itself, or what Opacus returns in its modes), and a function that takes
        everything off again.

    Raises:
        ValueError: If the per-sample gradients of a layer cannot be exact. Nothing stays attached then.
    """
    undo: list[Undo] = []
    wrapped: Any = job.module

    def take_off() -> None:
        while undo:
            undo.pop()()

    try:
        if optimizer.forward_only:
            undo.append(_observe(job.module, optimizer))
            return wrapped, take_off
        wrapped, pause = _attach_source(job, optimizer, users, undo)
        undo.append(_observe(job.module, optimizer))
        undo.append(lambda: optimizer.source.clear(sums=True))
        undo.append(_compare_alone(job, optimizer, users, pause))
    except BaseException:
        take_off()
        raise
    return wrapped, take_off


def _attach_source(
    job: Job, optimizer: AdaptiveClipDPOptimizer, users: UserRows | None, undo: list[Undo]
) -> tuple[Any, Pause]:
    """Attach losses of records, broadcast and gradient hooks; return what the loop calls, and what pauses the hooks."""
    module = job.module
    check_records_apart(module)
    folded = FoldedRows(choices := choice_models(module))
    check_choices(choices, job.grad_sample_mode)
    register_rules(module)
    check_peft(module, mode=job.grad_sample_mode)
    check_model(module, mode=job.grad_sample_mode)
    undo.append(use_record_loss(module, optimizer.tape, job.loss_reduction, users))
    undo.append(folded.attach())
    undo.append(lambda: _remove_opacus_hooks(module))
    if isinstance(optimizer.source, BookKeepingSource):  # which tells what all records share
        undo.append(optimizer.source.attach(folded))
        return module, optimizer.source.paused
    undo.append(expand_broadcast_embeddings(module, folded).remove)
    wrapped = (HookedModel if job.wrap_model else ModelHooks)(
        module,
        batch_first=job.batch_first,
        loss_reduction=job.loss_reduction,
        strict=False,  # check_model has refused every buffer that is not a constant of a layer with a rule
        force_functorch=job.grad_sample_mode == "functorch",
    )
    assert isinstance(optimizer.source, PerSampleSource)
    optimizer.source.attach(module, folded)
    if optimizer.plan is not None and optimizer.plan.sampling != "shuffled":
        wrapped.forbid_grad_accumulation()
    return wrapped, partial(_hooks_off, wrapped)


def _compare_alone(job: Job, optimizer: AdaptiveClipDPOptimizer, users: UserRows | None, pause: Pause) -> Undo:
    """Have some records run by themselves. These are the last hooks: what they see is what the model returns."""
    alone = optimizer.alone = RecordsAlone(
        job.module,
        *named_parameters(job.module, optimizer.original_optimizer),
        lambda: optimizer.steps_taken,
        optimizer.tape,
        mean=job.loss_reduction == "mean",
        batch_first=job.batch_first,
        users=users,
        pause=pause,
        keeps_length=lambda tensors: optimizer.plan is not None and optimizer.plan.keeps_length(tensors),
        key=None if (seeded := job.noise_generator) is None else f"masks {seeded.initial_seed()}".encode(),
    )
    assert optimizer.watch is not None
    alone.as_before = optimizer.watch.as_before
    return alone.remove


class _Eyes:
    """The hooks by which the optimizer sees every forward pass of one model object. Copies of the model have none."""

    def __init__(self, module: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> None:
        self._module, self._optimizer = id(module), optimizer

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook before the forward pass."""
        if id(module) == self._module:
            self._optimizer.see(module, args, kwargs)

    def after(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Hook after it, also where it failed."""
        if id(module) == self._module:
            self._optimizer.seen(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Eyes:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Blind, ()


class _Blind:
    """What the hooks become in a pickled model."""

    def before(self, *_: Any) -> None: ...

    def after(self, *_: Any) -> None: ...


def _observe(module: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> Undo:
    """Have the optimizer see which batch goes into the model, and whether the model changes; return what undoes it."""
    trained, _ = named_parameters(module, optimizer.original_optimizer)
    optimizer.watch = ModelWatch(module, trained, moves=optimizer.forward_only)
    eyes = _Eyes(module, optimizer)
    handles = [
        module.register_forward_pre_hook(eyes.before, prepend=True, with_kwargs=True),
        module.register_forward_hook(eyes.after, always_call=True),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


@contextmanager
def _hooks_off(wrapped: Any) -> Iterator[None]:
    """Switch Opacus's hooks off for a while."""
    before, wrapped.hooks_enabled = wrapped.hooks_enabled, False
    try:
        yield
    finally:
        wrapped.hooks_enabled = before


def _remove_opacus_hooks(module: nn.Module) -> None:
    """Remove what Opacus attached, complete or not."""
    for handle in getattr(module, "autograd_grad_sample_hooks", []):
        handle.remove()
    if hasattr(module, "autograd_grad_sample_hooks"):
        del module.autograd_grad_sample_hooks
    for inner in module.modules():
        if not inner._backward_hooks:
            inner._is_full_backward_hook = None
        for name in ("ft_compute_sample_grad", "activations", "max_batch_len"):
            if name in inner.__dict__:
                delattr(inner, name)
    for parameter in module.parameters():
        for name in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
            if hasattr(parameter, name):
                delattr(parameter, name)
