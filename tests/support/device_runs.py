"""Private runs with seeded noise, which are to be the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny_models
import tiny_trainer
import torch
from helpers import loader
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.loss import per_record_causal_lm_loss

CPU = torch.device("cpu")


def moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {name: values.to(device) for name, values in batch.items()}
    return [values.to(device) for values in batch]


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, **options)


def private(
    model: nn.Module, optimizer: Callable[[nn.Module], Any] = adamw, data: Any = None, **settings: Any
) -> tuple[Any, ...]:
    """Return (engine, model, optimizer, loader) with seeded noise, drawn on the processor for every device."""
    torch.manual_seed(5)
    arguments = {"noise_multiplier": 0.7, "max_grad_norm": 0.5, "ema_decay": 0.9, **settings}
    engine = PrivacyEngine()
    made = engine.make_private(
        module=model, optimizer=optimizer(model), data_loader=loader(64, 16) if data is None else data,
        noise_generator=torch.Generator().manual_seed(3), **arguments,
    )  # fmt: skip
    return engine, *made


def outcome(model: nn.Module, optimizer: Any) -> Tensor:
    """Weights, averaged weights, C and the learning-rate multiplier; shards are put together."""
    values = [p.detach() for p in model.parameters()]
    if optimizer.ema is not None:
        values += optimizer.ema._average
    values = [getattr(v, "full_tensor", lambda v=v: v)().reshape(-1) for v in values]
    numbers = torch.tensor([optimizer.max_grad_norm, optimizer.released.lr_multiplier])
    return torch.cat([v.double().cpu() for v in values] + [numbers.double()])


def lm_run(
    name: str,
    device: torch.device,
    loss: Callable[..., Tensor] = per_record_causal_lm_loss,
    *,
    dtype: torch.dtype = torch.float64,
    prepare: Callable[[nn.Module], object] = lambda model: None,
    optimizer: Callable[[nn.Module], Any] = lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    autocast: bool = False,
    **settings: Any,
) -> Tensor:
    """Return the outcome of four noisy steps of a language model, which ``prepare`` may change before they begin."""
    model = tiny_models.build(name, dtype=dtype).to(device)
    prepare(model)
    rows = DataLoader(tiny_trainer.rows(64), batch_size=16)
    _, model, private_optimizer, batches = private(model, optimizer, rows, **settings)
    for batch in batches:
        private_optimizer.zero_grad()
        batch = moved(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            losses = loss(logits, batch["labels"])
        losses.mean().backward()
        private_optimizer.step()
    return outcome(model, private_optimizer)
