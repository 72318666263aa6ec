"""Small zeroth-order optimizers, closures of known differences, and the direction behind a seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from opacus_ac.noise import SeededStream
from opacus_ac.zeroth_order import ZerothOrderDPOptimizer, ZerothOrderSettings


def weights(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """Return a module that holds nothing but random weights."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Module().eval()
    for i, shape in enumerate(shapes or ((3, 4), (5,))):
        module.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    return module


def by_hand(module: nn.Module | None = None, inner=None, seed: int | None = 0, **kwargs) -> ZerothOrderDPOptimizer:
    """Return an optimizer without engine; settings of zeroth order go in by their names."""
    module = module if module is not None else weights()
    fields = (
        "num_directions",
        "smoothing",
        "direction",
        "mechanism",
        "stages",
        "pruning",
        "direction_seed",
        "ema_decay",
    )
    given = {"num_directions": 4, "direction_seed": 7, **{f: kwargs.pop(f) for f in fields if f in kwargs}}
    arguments = {
        "noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1, "clip_policy": "fixed", "lr_control": False,
        "stream": None if seed is None else SeededStream(torch.Generator().manual_seed(seed)), **kwargs,
    }  # fmt: skip
    inner = inner or torch.optim.SGD(module.parameters(), lr=1.0)
    return ZerothOrderDPOptimizer(inner, module=module, settings=ZerothOrderSettings(**given), **arguments)


class Scripted:
    """A closure whose records have the differences ``deltas [B, K]``, whatever the weights."""

    def __init__(self, deltas: Tensor, smoothing: float, losses: Tensor | None = None) -> None:
        self.deltas, self.smoothing, self.calls = deltas, smoothing, 0
        self.losses = torch.zeros(len(deltas), dtype=torch.float64) if losses is None else losses

    def __call__(self) -> Tensor:
        k, down = divmod(self.calls, 2)
        self.calls += 1
        shift = self.deltas[:, k % self.deltas.shape[1]] * self.smoothing
        return self.losses - shift if down else self.losses + shift


def measured(optimizer: ZerothOrderDPOptimizer, deltas: Tensor, losses: Tensor | None = None) -> None:
    """Measure ``deltas`` and add them to the sums of the logical batch."""
    closure = Scripted(deltas, optimizer.smoothing, losses)
    optimizer.tape.record(optimizer.differences.measure(closure, optimizer.direction_seeds, optimizer.smoothing))
    optimizer.clip_and_accumulate()


def release_vector(optimizer: ZerothOrderDPOptimizer, deltas: Tensor, losses: Tensor | None = None) -> Tensor:
    """Return what a step would release if there were no noise, in units of C. ``[K + statistics]``"""
    measured(optimizer, deltas, losses)
    (summed,) = optimizer.differences.sums()
    summed = torch.zeros(optimizer.settings.num_directions).double() if summed is None else summed
    return torch.cat([summed / optimizer.max_grad_norm, torch.from_numpy(optimizer.statistics.vector())])


def released(optimizer: ZerothOrderDPOptimizer, deltas: Tensor) -> Tensor:
    """Take the releasing half of a step and return its K numbers, before anything is divided by K. ``[K]``"""
    closure = Scripted(deltas, optimizer.smoothing)
    optimizer.tape.record(optimizer.differences.measure(closure, optimizer.direction_seeds, optimizer.smoothing))
    assert optimizer.pre_step()
    values = optimizer.coefficients.grad.clone()
    optimizer.differences.clear(sums=True)
    return values


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def direction(optimizer: ZerothOrderDPOptimizer, seed: int) -> Tensor:
    """Return the direction behind ``seed``, flat; the weights are as before."""
    kept = [p.detach().clone() for p in optimizer.coordinates.parameters]
    with torch.no_grad():
        for p in optimizer.coordinates.parameters:
            p.zero_()
        optimizer.coordinates.move(seed, 1.0)
        found = torch.cat([p.detach().reshape(-1) for p in optimizer.coordinates.parameters])
        for p, before in zip(optimizer.coordinates.parameters, kept, strict=True):
            p.copy_(before)
    return found


def llama(**kwargs):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, **kwargs
    )
    return transformers.LlamaForCausalLM(config).eval()
