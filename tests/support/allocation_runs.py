"""Runs of the small classifier with a noise allocation, shared by two test files."""

from __future__ import annotations

import torch
from helpers import classifier, loader

from opacus_ac import PrivacyEngine
from opacus_ac.allocation import NoiseAllocation

MODES = ["bk", "hooks", "functorch"]
HISTORY = NoiseAllocation(warmup=2, decay=0.8)
PAID = NoiseAllocation("paid", decay=0.8)
UNEVEN = NoiseAllocation("constant", weights={"0.weight": 3.0, "2.*": 0.25, "*": 1.0})


def make(allocation, *, mode="bk", seed=3, batch_size=16, lr=0.01, **kwargs):
    """Return (model, optimizer, loader, engine) on the small classifier, with seeded noise."""
    torch.manual_seed(5)
    engine = PrivacyEngine()
    arguments = {"noise_multiplier": 0.7, "max_grad_norm": 0.5, "ema_decay": 0.9, "loss_bound": None, **kwargs}
    made = engine.make_private(
        module=(model := classifier()),
        optimizer=torch.optim.AdamW(model.parameters(), lr=lr),
        data_loader=loader(64, batch_size),
        grad_sample_mode=mode,
        noise_generator=torch.Generator().manual_seed(seed),
        noise_allocation=allocation,
        **arguments,
    )
    return *made, engine


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])
