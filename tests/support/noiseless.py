"""A private optimizer without noise, batches given by hand, and what it would release of them."""

import torch
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine

BOUND = 0.5


def engine_for(model, records, mode="bk", **kwargs):
    """Make ``model`` private without noise; batches are given by hand."""
    arguments = {"noise_multiplier": 0.0, "clip_policy": "fixed", "ema_decay": None, "lr_control": False, **kwargs}
    wrapped, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=DataLoader(list(range(records)), batch_size=records),
        max_grad_norm=BOUND,
        grad_sample_mode=mode,
        **arguments,
    )
    optimizer.plan = None
    return wrapped, optimizer


def released(optimizer, losses):
    """Run backward and return what one step would release of these records without noise, in units of C. ``[n]``"""
    if losses.numel():
        losses.mean().backward()
    if optimizer.statistics.loss_bound is not None:
        optimizer.record_losses(losses)
    optimizer.clip_and_accumulate()
    parts = zip(optimizer.params, optimizer.source.sums(), strict=True)
    sums = [torch.zeros_like(p) if total is None else total for p, total in parts]
    statistics = torch.from_numpy(optimizer.statistics.vector())
    optimizer.statistics.finish()
    optimizer.zero_grad()
    return torch.cat([*(s.reshape(-1).double() / BOUND for s in sums), statistics])
