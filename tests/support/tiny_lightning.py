"""A LightningModule of two layers, made private, for tests."""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine


class Classifier(lightning.LightningModule):
    leaks = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def training_step(self, batch, index):
        x, y = batch
        losses = torch.nn.functional.cross_entropy(self.layers(x), y, reduction="none")
        if getattr(self.private, "tape", None) is not None:
            self.private.record_losses(losses)
        loss = losses.mean()
        if self.leaks:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return self.private


def made(model=None, **settings):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(64, 4, generator=generator), torch.randint(0, 2, (64,), generator=generator)
    model, engine = model or Classifier(), PrivacyEngine()
    settings = {"noise_multiplier": 1.0, "noise_generator": torch.Generator().manual_seed(4), **settings}
    _, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(x, y), batch_size=8),
        **settings,
    )
    model.private = optimizer
    return model, engine, optimizer, loader


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])
