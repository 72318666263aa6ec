"""What the study may look at without privacy: general text, a tokenizer of it, and small models trained on it.

General text: the 258,145 utterances of ``chitchat-dataset`` 0.9.0 (MIT), real chats, taken as public here. Byte-level BPE and
both models see nothing else before private fine-tuning starts.

* ``llama``: a Llama of two layers with tied embeddings, the small language model;
* ``bitnet``: the same size with ternary weights, transformers' online ``AutoBitLinear`` in BitNet's architecture.
"""

from __future__ import annotations

import json
import os

os.environ.setdefault(
    "TORCHDYNAMO_DISABLE", "1"
)  # before torch is imported: compiling BitNet's quantisers takes half a minute

import random
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common.sentiment_data import download
from common.tone_dialogues import Dialogue
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn

from opacus_ac.models.default_model import cache_root

CHATS = ("chitchat-dataset==0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e")
SPECIAL = ("<pad>", "<user>", "<reply>", "<end>")
PAD, USER, REPLY, END = range(4)
VOCAB, HIDDEN, LAYERS, HEADS = 768, 64, 2, 4
PROMPT, LENGTH = 12, 40  # tokens kept of a prompt (its last ones), and of a record
STEPS, BATCH, RATE = 2000, 48, 4e-3  # of public training
HELD_OUT = 400  # records of general text
MODELS = ("llama", "bitnet")

Row = dict[str, Tensor]


def study_root() -> Path:
    return cache_root() / f"study-{VOCAB}-{HIDDEN}-{LAYERS}-{STEPS}"


@cache
def general_text() -> list[str]:
    """Return two utterances in turn, joined, for each exchange of the public chats, shuffled by a public seed."""
    path = cache_root() / "chitchat-0.9.0.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory() as temporary,
            zipfile.ZipFile(download(*CHATS, False, Path(temporary))) as archive,
        ):
            path.write_bytes(archive.read("chitchat_dataset/dataset.json"))
    chats = json.loads(path.read_text(encoding="utf-8"))
    pairs = []
    for chat in chats.values():
        turns = [" ".join(m["text"] for m in turn) for turn in chat["messages"]]
        pairs += [f"{a}\n{b}" for a, b in zip(turns[::2], turns[1::2], strict=False)]
    random.Random(0).shuffle(pairs)
    return pairs


@cache
def tokenizer() -> ByteLevelBPETokenizer:
    """Return the tokenizer of the public text; train it once."""
    files = [study_root() / name for name in ("vocab.json", "merges.txt")]
    if not all(file.is_file() for file in files):
        made = ByteLevelBPETokenizer()
        made.train_from_iterator(
            general_text()[HELD_OUT:], vocab_size=VOCAB, special_tokens=list(SPECIAL), show_progress=False
        )
        study_root().mkdir(parents=True, exist_ok=True)
        made.save_model(str(study_root()))
    return ByteLevelBPETokenizer(*map(str, files))


def row(ids: list[int], labels: list[int]) -> Row:
    """Cut or pad one record to ``LENGTH`` tokens."""
    length = min(len(ids), LENGTH)
    padding = LENGTH - length
    return {
        "input_ids": torch.tensor(ids[:length] + [PAD] * padding),
        "attention_mask": torch.tensor([1] * length + [0] * padding),
        "labels": torch.tensor(labels[:length] + [-100] * padding),
    }


def encode(dialogue: Dialogue) -> Row:
    """One dialogue as one record; only replies carry labels. Of a prompt the last ``PROMPT`` tokens are kept."""
    ids: list[int] = []
    labels: list[int] = []
    for message in dialogue["messages"]:
        text = tokenizer().encode(message["content"]).ids
        if message["role"] == "user":
            ids += [USER, *text[-PROMPT:], REPLY]
            labels = labels + [-100] * (len(ids) - len(labels))
        else:
            ids += [*text, END]
            labels += [*text, END]
    return row(ids, labels)


def encode_text(text: str) -> Row:
    """One exchange of general text in the same form."""
    first, _, second = text.partition("\n")
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
    return encode({"messages": messages})


def new_model(name: str) -> nn.Module:
    """Return the untrained model, the same at every call.

    Raises:
        ValueError: no such model.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 3 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 2 * LENGTH,
        "tie_word_embeddings": True,
        "use_cache": False,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": END,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return (_llama(shape) if name == "llama" else _bitnet(shape)).train()


def _llama(shape: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**shape))


def _bitnet(shape: dict[str, Any]) -> nn.Module:
    from transformers import BitNetConfig, BitNetForCausalLM, BitNetQuantConfig
    from transformers.integrations.bitnet import AutoBitLinear, replace_with_bitnet_linear

    model = BitNetForCausalLM(BitNetConfig(**shape))
    latent = {name: m.weight.data for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    settings = BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    replace_with_bitnet_linear(model, modules_to_not_convert=["lm_head"], quantization_config=settings)
    for name, module in model.named_modules():
        if isinstance(module, AutoBitLinear):  # the replacement starts from fresh random weights
            module.weight.data.copy_(latent[name])
            module.requires_grad_(True)
    return model


def public_model(name: str) -> nn.Module:
    """Return the model after public training; train it if that was not done before."""
    model = new_model(name)
    path = study_root() / f"{name}.pt"
    if not path.is_file():
        _train(model, path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _train(model: nn.Module, path: Path) -> None:
    rows = [encode_text(text) for text in general_text()[HELD_OUT : HELD_OUT + 40_000]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        chosen = [rows[int(i)] for i in torch.randint(len(rows), (BATCH,), generator=generator)]
        loss = model(**{key: torch.stack([r[key] for r in chosen]) for key in chosen[0]}).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == STEPS - 1:
            print(f"{path.stem}: public training, step {step}, loss {loss.item():.3f}", file=sys.stderr, flush=True)
    partial = path.with_suffix(".partial")
    torch.save(model.state_dict(), partial)
    partial.replace(path)


@cache
def general_rows() -> tuple[Row, ...]:
    """Held-out general text, for what a model forgets."""
    return tuple(encode_text(text) for text in general_text()[:HELD_OUT])
