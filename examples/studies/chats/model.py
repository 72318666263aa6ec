"""A small Llama that has read public sentences, and its private fine-tuning on records of several rows."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from chats.data import END, IGNORE, PAD, Records, Row, public_sentences, public_tokenizer, row, turn_ids
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from opacus_ac import PrivacyEngine
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.integrations.finetune import UserCollate
from opacus_ac.loss import per_record_causal_lm_loss, per_user_loss
from opacus_ac.optimizer.momentum import planned_beta1


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on beside the run's own name."""

    hidden: int = 64
    layers: int = 2
    vocab: int = 1024
    length: int = 32  # T, tokens of a row
    most: int = 3  # K, rows of a record
    public_steps: int = 1000
    public_batch: int = 64
    public_lr: float = 4e-3
    batch: int = 128  # expected records
    steps: int = 20
    lr: float = 0.004
    heldout: int = 200  # at most so many held-out records
    physical: int = 16
    version: int = 2  # of what a row means; 1 was Renyi accounting, and momentum of 0.9 whatever the number of steps

    def key(self) -> str:
        """Short name of these settings: results of others are never mixed with theirs."""
        return digest(asdict(self))

    def public_key(self) -> str:
        """Short name of what the public model depends on."""
        shape = ("hidden", "layers", "vocab", "length")
        return digest({k: v for k, v in asdict(self).items() if k in shape or k.startswith("public_")})


def digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- public model


def new_model(settings: Settings) -> nn.Module:
    """Return the untrained model, the same at every call."""
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).train()


def public_model(settings: Settings, cache_folder: Path) -> nn.Module:
    """Return the model after training, without privacy, on the public sentences; train it if that was not done before."""
    model = new_model(settings)
    path = cache_folder / f"public-{settings.public_key()}.pt"
    if not path.is_file():
        encode = public_tokenizer(settings.vocab, cache_folder)
        loss = _pretrain(
            model, [row(turn_ids(text, encode)[: settings.length]) for text in public_sentences()], settings
        )
        print(f"public model: mean loss {loss:.3f} in its last 50 steps -> {path}", file=sys.stderr, flush=True)
        partial = path.with_suffix(".partial")
        torch.save(model.state_dict(), partial)
        partial.replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _pretrain(model: nn.Module, rows: list[Row], settings: Settings) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.public_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.public_lr, total_steps=settings.public_steps
    )
    collate, generator = collate_of(settings), torch.Generator().manual_seed(0)
    last = []
    for _ in range(settings.public_steps):
        chosen = torch.randint(len(rows), (settings.public_batch,), generator=generator).tolist()
        loss = model(**collate([rows[i] for i in chosen])).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        last = [*last[-49:], loss.item()]
    return statistics.fmean(last)


def collate_of(settings: Settings) -> UserCollate:
    return UserCollate(PAD, settings.length)


# ---------------------------------------------------------------- losses


def record_losses(model: nn.Module, records: Sequence[list[Row]], settings: Settings) -> Tensor:
    """Return the loss of each record ``[U]``: the mean over its rows that have targets."""
    batch = collate_of(settings)(records)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    has_labels = (batch["labels"][:, 1:] != IGNORE).any(1)
    return per_user_loss(per_record_causal_lm_loss(logits, batch["labels"]), has_labels, len(records))


@torch.no_grad()
def heldout_loss(model: nn.Module, records: Sequence[list[Row]], settings: Settings) -> float:
    was_training = model.training
    model.eval()
    losses = [record_losses(model, records[i : i + 32], settings) for i in range(0, len(records), 32)]
    model.train(was_training)
    return torch.cat(losses).mean().item()


# ---------------------------------------------------------------- private fine-tuning


def adamw(model: nn.Module, rate: float, steps: int) -> torch.optim.AdamW:
    """Return AdamW over all weights, with the momentum of the planned steps."""
    betas = (planned_beta1(steps), 0.999)
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, weight_decay=0.0)


def fine_tune(
    model: nn.Module,
    train: Records,
    settings: Any,
    arguments: dict[str, Any],
    delta: float,
    seed: int,
    held: Sequence[list[Row]] = (),
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[dict[str, list[float | None]], float, float]:
    """Train ``model`` in place, with ``optimizer``, or with AdamW at the rate of the settings.

    Returns:
        What was released per step, epsilon, and the held-out loss at the averaged weights (NaN without held-out records).
    """
    engine, inner = PrivacyEngine(), optimizer or adamw(model, settings.lr, settings.steps)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=NotPrivateWarning)
        private, stepper, loader = engine.make_private(
            module=model,
            optimizer=inner,
            data_loader=DataLoader(train, batch_size=settings.batch, shuffle=True, collate_fn=collate_of(settings)),
            max_physical_batch_size=settings.physical,
            max_rows_per_user=train.max_rows_per_user,
            noise_generator=torch.Generator().manual_seed(seed),
            **arguments,
        )
        course: dict[str, list[float | None]] = {"C": [], "clip_rate": []}
        batches = _forever(loader)
        while stepper.steps_taken < settings.steps:
            taken = stepper.steps_taken
            stepper.zero_grad()
            private(**next(batches)).loss.backward()
            stepper.step()
            if stepper.steps_taken > taken and stepper.released is not None:
                course["C"].append(stepper.released.max_grad_norm)
                course["clip_rate"].append(stepper.released.clip_rate)
        averaged = math.nan
        if held:
            with stepper.ema_weights():
                averaged = heldout_loss(model, held, settings)
        epsilon = engine.get_epsilon(delta)
    engine.detach(private)
    return course, epsilon, averaged


def _forever(loader: Iterable[Row]) -> Iterator[Row]:
    while True:
        yield from loader
