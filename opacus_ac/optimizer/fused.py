"""An inner optimizer's step in the gradient memory of one parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from opacus_ac.optimizer.dp_adamw import DPAdamW

ONE_BY_ONE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, DPAdamW)
"""Inner optimizers whose update of a parameter depends on nothing but this parameter, its gradient and its state."""


class FusedStep:
    """Applies gradients with an inner optimizer as many at a time as fit into memory for the largest of them.

    Many small ones at a time, because the noise of each would have to wait until the threads of the matrix products and
    of the optimizer, which work in between, leave the processor's cores.

    Args:
        inner: the optimizer, one of :data:`ONE_BY_ONE`.
        parameters: the parameters that will come, for the size of the memory.
        noise: releases the sums of parameters in place, before they are applied.
    """

    def __init__(
        self,
        inner: Optimizer,
        parameters: list[torch.nn.Parameter],
        noise: Callable[[list[torch.nn.Parameter], list[Tensor]], None],
    ) -> None:
        self._inner, self._noise = inner, noise
        self._owners = {id(p): group for group in inner.param_groups for p in group["params"]}
        largest = max(parameters, key=lambda p: p.numel())
        self._buffer = torch.empty(largest.numel(), dtype=largest.dtype, device=largest.device)
        self._used = 0
        self._waiting: list[tuple[torch.nn.Parameter, Tensor]] = []

    def place(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """Return memory for the sum of ``parameter``, or None where it has to find its own."""
        if (parameter.dtype, parameter.device) != (self._buffer.dtype, self._buffer.device):
            return None
        if self._used + parameter.numel() > self._buffer.numel():
            self.flush()
        first, self._used = self._used, self._used + parameter.numel()
        return self._buffer[first : self._used].view(parameter.shape)

    def add(self, parameter: torch.nn.Parameter, total: Tensor | None) -> None:
        """Take a sum; None is zero."""
        self._waiting.append((parameter, torch.zeros_like(parameter) if total is None else total))

    def flush(self) -> None:
        """Release the sums and apply them: the optimizer's own step on these parameters alone."""
        waiting, self._waiting, self._used = self._waiting, [], 0
        if not waiting:
            return
        self._noise([parameter for parameter, _ in waiting], [total for _, total in waiting])
        groups = self._inner.param_groups
        try:
            for parameter, total in waiting:
                parameter.grad = total.to(parameter.dtype).view_as(
                    parameter
                )  # a float64 sum is rounded after the noise
            self._inner.param_groups = [
                {**group, "params": [p for p, _ in waiting if self._owners[id(p)] is group]} for group in groups
            ]
            self._inner.step()
        finally:
            self._inner.param_groups = groups
            for parameter, _ in waiting:
                parameter.grad = None
