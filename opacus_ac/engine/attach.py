"""The only code that touches the user's model, and how it is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from opacus import GradSampleModule
from opacus.grad_sample import GradSampleHooks
from torch import nn

from opacus_ac.grad_sample import check_model, expand_broadcast_embeddings, register_rules
from opacus_ac.grad_sample.alone.records import RecordsAlone
from opacus_ac.grad_sample.checks.coupled import check_records_apart
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.grad_sample.opacus_hooks import PerSampleSource
from opacus_ac.models.peft import check_peft
from opacus_ac.models.transformers import use_record_loss
from opacus_ac.optimizer.model_watch import ModelWatch
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.parameters import named_parameters
from opacus_ac.sampling.users import UserRows
from opacus_ac.zeroth_order.optimizer import ZerothOrderDPOptimizer

Undo = Callable[[], None]


def attach(
    module: nn.Module,
    optimizer: AdaptiveClipDPOptimizer,
    *,
    mode: str,
    batch_first: bool,
    loss_reduction: str,
    wrap_model: bool,
    users: UserRows | None = None,
) -> tuple[Any, Undo]:
    """Attach loss, broadcast and gradient hooks to the model.

    Returns:
        The model itself in mode "bk", what Opacus returns in its modes, and a function that takes everything off again.

    Raises:
        ValueError: a layer whose per-sample gradients cannot be exact; nothing stays attached.
    """
    undo: list[Undo] = []

    def take_off() -> None:
        while undo:
            undo.pop()()

    try:
        check_peft(module)
        check_records_apart(module)
        register_rules(module)
        check_model(module, mode=mode)
        undo.append(use_record_loss(module, optimizer.tape, loss_reduction, users))
        undo.append(expand_broadcast_embeddings(module).remove)
        undo.append(lambda: _remove_opacus_hooks(module))
        if isinstance(optimizer.source, BookKeepingSource):
            undo.append(optimizer.source.attach())
            wrapped: Any = module
            pause: Callable[[], AbstractContextManager[None]] = optimizer.source.paused
        else:
            wrapped = (GradSampleModule if wrap_model else GradSampleHooks)(
                module,
                batch_first=batch_first,
                loss_reduction=loss_reduction,
                strict=False,  # check_model has refused every buffer that is not a constant of a layer with a rule
                force_functorch=mode == "functorch",
            )
            assert isinstance(optimizer.source, PerSampleSource)
            optimizer.source.attach(module)
            pause = partial(_hooks_off, wrapped)
        undo.append(observe(module, optimizer, named_parameters(module, optimizer.original_optimizer)[0]))
        undo.append(lambda: optimizer.source.clear(sums=True))
        # The last hooks: what they see is what the model returns.
        optimizer.alone = RecordsAlone(
            module,
            *named_parameters(module, optimizer.original_optimizer),
            lambda: optimizer.steps_taken,
            optimizer.tape,
            mean=loss_reduction == "mean",
            batch_first=batch_first,
            users=users,
            pause=pause,
            keeps_length=lambda tensors: optimizer.plan is not None and optimizer.plan.keeps_length(tensors),
        )
        assert optimizer.watch is not None
        optimizer.alone.as_before = optimizer.watch.as_before
        undo.append(optimizer.alone.remove)
    except BaseException:
        take_off()
        raise
    return wrapped, take_off


class _Eyes:
    """The hooks by which the optimizer sees every forward pass of exactly this model object; copies of the model have none."""

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


def observe(module: nn.Module, optimizer: AdaptiveClipDPOptimizer, trained: Sequence[nn.Parameter]) -> Undo:
    """Have the optimizer see which batch goes into the model, and whether the model changes; return what undoes it."""
    optimizer.watch = ModelWatch(module, trained, moves=isinstance(optimizer, ZerothOrderDPOptimizer))
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
