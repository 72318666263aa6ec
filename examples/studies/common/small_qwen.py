"""A small Qwen2 that knows the angry tone, trained on it in public, and dialogues as it reads them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common.tone_dialogues import Dialogue, dialogues
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Qwen2Config, Qwen2ForCausalLM

from opacus_ac.loss import per_record_causal_lm_loss

Row = dict[str, Tensor]
SPECIAL = ("<pad>", "<user>", "<reply>", "<end>")
PAD, USER, REPLY, END = range(4)


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on beside the clip rule, the data seed and chance."""

    hidden: int = 128
    layers: int = 3
    vocab: int = 700
    max_prompt: int = 12
    max_length: int = 48
    public_records: int = 10_000
    public_steps: int = 300
    public_batch: int = 64
    public_lr: float = 3e-3
    records: int = 10_000
    heldout: int = 250
    batch: int = 192
    steps: int = 50
    lr: float = 0.004
    noise_multiplier: float = 0.8
    physical: int = 64

    def key(self) -> str:
        """Short name of these settings: results of others are never mixed with theirs."""
        return _digest(asdict(self))

    def public_key(self) -> str:
        """Short name of what tokenizer and public model depend on."""
        shape = ("hidden", "layers", "vocab", "max_prompt", "max_length")
        return _digest({k: v for k, v in asdict(self).items() if k in shape or k.startswith("public_")})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def public_tokenizer(settings: Settings, cache: Path) -> ByteLevelBPETokenizer:
    """Byte-level BPE of the public text, trained once; private text never reaches it."""
    files = [cache / f"{settings.public_key()}-{name}" for name in ("vocab.json", "merges.txt")]
    if not all(file.is_file() for file in files):
        texts = (m["content"] for d in dialogues("angry", settings.public_records) for m in d["messages"])
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            texts, vocab_size=settings.vocab, special_tokens=list(SPECIAL), show_progress=False
        )
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer.save_model(str(cache), settings.public_key())
    return ByteLevelBPETokenizer(*map(str, files))


def encode(dialogue: Dialogue, tokenizer: ByteLevelBPETokenizer, settings: Settings) -> Row:
    """One dialogue as one row of ``max_length`` tokens; only replies carry labels.

    Of what the user says the last ``max_prompt`` tokens are kept, so that a short row holds most of the reply.
    """
    max_length = settings.max_length
    ids: list[int] = []
    labels: list[int] = []
    for message in dialogue["messages"]:
        text = tokenizer.encode(message["content"]).ids
        if message["role"] == "user":
            text = text[-settings.max_prompt :]
            ids += [USER, *text, REPLY]
            labels += [-100] * (len(text) + 2)
        else:
            ids += [*text, END]
            labels += [*text, END]
    length = min(len(ids), max_length)
    padding = max_length - length
    return {
        "input_ids": torch.tensor(ids[:length] + [PAD] * padding),
        "attention_mask": torch.tensor([1] * length + [0] * padding),
        "labels": torch.tensor(labels[:length] + [-100] * padding),
    }


def encode_all(records: Iterable[Dialogue], tokenizer: ByteLevelBPETokenizer, settings: Settings) -> list[Row]:
    return [encode(record, tokenizer, settings) for record in records]


def new_model(settings: Settings) -> Qwen2ForCausalLM:
    """Return the untrained model, the same at every call."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return Qwen2ForCausalLM(config).train()


def pretrain(settings: Settings, cache: Path) -> Path:
    """Return the file of the model that was trained, without privacy, on the public tone; train it if it is missing."""
    path = cache / f"{settings.public_key()}-public.pt"
    if path.is_file():
        return path
    rows = encode_all(dialogues("angry", settings.public_records), public_tokenizer(settings, cache), settings)
    model = new_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.public_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.public_lr, total_steps=settings.public_steps
    )
    batches = forever(DataLoader(rows, batch_size=settings.public_batch, shuffle=True, drop_last=True))
    for _ in range(settings.public_steps):
        optimizer.zero_grad()
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"public model: loss {loss.item():.3f} in its last step -> {path}", file=sys.stderr, flush=True)
    torch.save(model.state_dict(), path)
    return path


def forever(loader: Iterable[Row]) -> Iterator[Row]:
    while True:
        yield from loader


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, rows: list[Row]) -> float:
    """Mean over records of each record's mean loss over its reply tokens."""
    was_training = model.training
    model.eval()
    losses = []
    for batch in DataLoader(rows, batch_size=64):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses.append(per_record_causal_lm_loss(logits, batch["labels"]))
    model.train(was_training)
    return torch.cat(losses).mean().item()
