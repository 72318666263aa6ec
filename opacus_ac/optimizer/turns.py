"""The release of gradients in turns, in the memory of one parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_ac.optimizer.released import Apply


class Turns:
    """Noises sums as many at a time as fit into memory for the largest of them, and gives them on.

    Many small ones at a time, because the noise of each would have to wait until the threads of the matrix products and
    of the optimizer, which work in between, leave the processor's cores.

    Args:
        parameters: the parameters that will come, for the size of the memory.
        noise: releases the sums of parameters in place, before they are given on.
        apply: takes parameters and released gradients, whose memory is used again afterwards.
    """

    def __init__(self, parameters: list[nn.Parameter], noise: Apply, apply: Apply) -> None:
        self._noise, self._apply = noise, apply
        largest = max(parameters, key=lambda p: p.numel())
        self._buffer = torch.empty(largest.numel(), dtype=largest.dtype, device=largest.device)
        self._used = 0
        self._waiting: list[tuple[nn.Parameter, Tensor]] = []

    def place(self, parameter: nn.Parameter) -> Tensor | None:
        """Return memory for the sum of ``parameter``, or None where it has to find its own."""
        if (parameter.dtype, parameter.device) != (self._buffer.dtype, self._buffer.device):
            return None
        if self._used + parameter.numel() > self._buffer.numel():
            self.flush()
        first, self._used = self._used, self._used + parameter.numel()
        return self._buffer[first : self._used].view(parameter.shape)

    def add(self, parameter: nn.Parameter, total: Tensor | None) -> None:
        """Take a sum; None is zero."""
        self._waiting.append((parameter, torch.zeros_like(parameter) if total is None else total))

    def flush(self) -> None:
        """Release the sums that wait, and give them on."""
        waiting, self._waiting, self._used = self._waiting, [], 0
        if not waiting:
            return
        parameters, totals = [p for p, _ in waiting], [total for _, total in waiting]
        self._noise(parameters, totals)
        self._apply(parameters, totals)
