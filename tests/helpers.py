"""Small models, data and hand-made per-sample gradients that several test files share."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac.allocation import NoiseAllocation
from opacus_ac.optimizer import AdaptiveClipDPOptimizer


def classifier(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def dataset(records: int = 64, dtype: torch.dtype = torch.float64, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(records, 4, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(inputs, torch.randint(0, 3, (records,), generator=generator))


def loader(records: int = 64, batch_size: int = 16, **kwargs) -> DataLoader:
    return DataLoader(dataset(records), batch_size=batch_size, **kwargs)


def loss_of(model: nn.Module, batch, reduction: str = "mean") -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction=reduction)


def train(model: nn.Module, optimizer, batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def by_hand(
    gradients: torch.Tensor, *, losses: torch.Tensor | None = None, **kwargs
) -> tuple[AdaptiveClipDPOptimizer, torch.Tensor]:
    """Return an optimizer over two parameters, with ``gradients`` [B, 5] set as their per-sample gradients."""
    parameters = [
        nn.Parameter(torch.zeros(2, dtype=gradients.dtype)),
        nn.Parameter(torch.zeros(3, dtype=gradients.dtype)),
    ]
    arguments = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1, **kwargs}
    if isinstance(allocation := arguments.get("allocation"), NoiseAllocation):
        arguments["allocation"] = allocation.start(parameters, ["first", "second"])
    optimizer = AdaptiveClipDPOptimizer(torch.optim.SGD(parameters, lr=1.0), **arguments)
    parameters[0].grad_sample = gradients[:, :2].clone()
    parameters[1].grad_sample = gradients[:, 2:].clone()
    if losses is not None:
        optimizer.record_losses(losses)
    return optimizer, torch.cat(parameters)


def release_vector(gradients: torch.Tensor, losses: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """Return what one step would release of these records if there were no noise, in units of C. ``[5 + statistics]``"""
    optimizer, _ = by_hand(gradients, losses=losses, **kwargs)
    optimizer.clip_and_accumulate()
    summed = torch.cat([p.summed_grad.reshape(-1) for p in optimizer.params]) / optimizer.max_grad_norm
    return torch.cat([summed.double(), torch.from_numpy(optimizer.statistics.vector())])
