"""Small models, data and hand-made per-sample gradients that several test files share."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.testing.policies import optimizer_by_hand
from opacus_ac.testing.policies import released_vector as release_vector


def classifier(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def dataset(records: int = 64, dtype: torch.dtype = torch.float64, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(records, 4, generator=generator, dtype=torch.float64).to(dtype)
    return TensorDataset(inputs, torch.randint(0, 3, (records,), generator=generator))


def loader(records: int = 64, batch_size: int = 16, **kwargs) -> DataLoader:
    return DataLoader(dataset(records), batch_size=batch_size, **kwargs)


class Rows(Dataset):
    """A dataset that is a list."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


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
    optimizer = optimizer_by_hand(gradients, losses=losses, **kwargs)
    return optimizer, torch.cat([p.reshape(-1) for p in optimizer.params])


__all__ = ["Rows", "by_hand", "classifier", "dataset", "loader", "loss_of", "release_vector", "train"]


FORWARD_ONLY = {"zeroth_order": "aggzo", "clipping": "adaptive", "clip_policy": "fixed", "ema_decay": None}
"""Settings of training without gradients, with a fixed C."""


def private(model, rows, *, mode="bk", batch_size=None, collate=None, **options):
    """Make a model private without noise; return the engine, and what ``make_private`` returns."""
    engine = PrivacyEngine()
    settings = {
        "noise_multiplier": 0.0, "max_grad_norm": 0.1, "clipping": "flat", "lr_control": False, "ema_decay": None, **options
    }  # fmt: skip
    trained = [p for p in model.parameters() if p.requires_grad]
    return engine, *engine.make_private(
        module=model, optimizer=torch.optim.SGD(trained, lr=0.1), grad_sample_mode=mode, **settings,
        data_loader=DataLoader(rows, batch_size=batch_size or len(rows), collate_fn=collate),
    )  # fmt: skip
