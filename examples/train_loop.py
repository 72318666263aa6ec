"""The loop of README.md on a tiny language model and invented sentences: seconds on a CPU, nothing is fetched."""

import itertools
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Qwen2Config, Qwen2ForCausalLM

from opacus_ac import PrivacyEngine

LENGTH = 48  # a public number of tokens, not a quantile of the data
PEOPLE = ("sister", "brother", "mother", "father", "friend", "neighbour", "teacher", "boss")
EVENTS = ("exam", "move", "wedding", "trip", "party", "job", "garden", "race")
DAYS = ("today", "tomorrow", "on Monday", "on Friday", "this week", "next week", "soon", "again")


def encode(text: str) -> dict[str, torch.Tensor]:
    """Return a sentence as bytes, padded with zeros that have no label."""
    codes = list(text.encode())[:LENGTH]
    ids = torch.tensor(codes + [0] * (LENGTH - len(codes)))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


sentences = [f"The {event} of my {who} is {day}." for who, event, day in itertools.product(PEOPLE, EVENTS, DAYS)]
rows: Any = [encode(sentence) for sentence in sentences]
torch.manual_seed(0)  # for the first weights only; noise and batches come from the operating system
model = Qwen2ForCausalLM(
    Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH, use_cache=False,
    )
).train()  # fmt: skip

# From here on the lines are those of README.md.
engine = PrivacyEngine()
model, optimizer, loader = engine.make_private_with_epsilon(
    module=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
    data_loader=DataLoader(rows, batch_size=50),
    target_epsilon=8.0,
    target_delta=1e-4,
    epochs=3,
)
for _ in range(3):
    for batch in loader:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
print(engine.privacy_report())
