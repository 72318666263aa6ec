"""Linear layers with ternary weights and eight-bit inputs, written in the ways in which people write them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def ternary(w: Tensor) -> Tensor:
    scale = 1 / w.abs().mean().clamp(min=1e-5)
    return (w * scale).round().clamp(-1, 1) / scale


def int8(x: Tensor) -> Tensor:
    scale = 127 / x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    return (x * scale).round().clamp(-128, 127) / scale


class DetachBitLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        return F.linear(x + (int8(x) - x).detach(), w + (ternary(w) - w).detach(), self.bias)
