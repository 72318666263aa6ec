"""Nodes of autograd's graph: they hold tensors as any node does, and tell of gradients as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Keep(torch.autograd.Function):
    """Saves tensors as any node of the graph does, with saved-tensor hooks and version checks."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return token.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(ctx.saved_tensors))


class _AskForGradient(torch.autograd.Function):
    """Connects an output that needs no gradient to the graph, so that its gradient is computed nevertheless."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, output: Tensor) -> Tensor:
        # A new tensor with the same memory. The layers that follow could not change a view in place.
        return output.new_empty(0).set_(
            output.untyped_storage(), output.storage_offset(), output.size(), output.stride()
        )

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[None, None]:
        return None, None


class _Pass(torch.autograd.Function):
    """Returns a view. Autograd refuses to change it in place, which would bypass its hooks."""

    @staticmethod
    def forward(ctx: Any, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _PassSeveral(torch.autograd.Function):
    """Hands several outputs on, and has ``arrive`` called with the gradients at them, None where there is none."""

    @staticmethod
    def forward(
        ctx: Any, arrive: Callable[[tuple[Tensor | None, ...]], None], token: Tensor, *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.arrive = arrive
        ctx.set_materialize_grads(False)
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if any(gradient is not None for gradient in gradients):
            ctx.arrive(gradients)
        return None, None, *gradients


keep = _Keep.apply
"""From a token and tensors to an output whose node holds the tensors."""

ask_for_gradient = _AskForGradient.apply
pass_on = _Pass.apply
pass_several = _PassSeveral.apply

Arrive = Callable[[Tensor], None]


def pass_on_watched(token: Tensor, value: Tensor, arrive: Arrive) -> Tensor:
    """Return a view of ``value``, and let ``arrive`` be called with the gradient at it."""
    passed: Tensor = pass_on(value) if value.requires_grad else ask_for_gradient(token, value)
    passed.register_hook(arrive)
    return passed


def watch_output(token: Tensor, output: Tensor, arrive: Arrive) -> Tensor | None:
    """Let ``arrive`` be called with the gradient at ``output``.

    Returns:
        A tensor that replaces the output; None if the output stays.
    """
    # If a view is changed in place, its hooks are never called, but those of its base are.
    base = output._base
    if not output.requires_grad:
        return pass_on_watched(token, output, arrive)
    if base is None:
        output.register_hook(arrive)
        return None
    shape = output.shape
    if base.requires_grad and base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous():
        base.register_hook(lambda gradient: arrive(gradient.reshape(shape)))
        return None
    return pass_on_watched(token, output, arrive)
