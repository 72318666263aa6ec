"""One run of the study: a model, private data, a method, an epsilon and a seed; what comes out is one row of results."""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from itertools import islice
from typing import Any

import torch
from common.results import AUTO_ADAM
from common.tone_dialogues import TONES, tone_score, train_and_heldout
from small_model import public
from small_model.methods import METHODS, OPTIMIZERS, Method
from small_model.public import LENGTH, PAD, Row
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.loss import per_record_causal_lm_loss
from opacus_ac.optimizer import AutoAdam
from opacus_ac.optimizer.momentum import planned_beta1

VERSION = 3  # of what a row means: results of other versions are not mixed with these
RECORDS, HELD_OUT = 10_000, 250
DELTA = 1e-5
PHYSICAL = 128
UNACCOUNTED = 0.6207  # noise multiplier of about epsilon 4 at the default size, for the rule that has no epsilon
REPLIES, REPLY_TOKENS = 50, 20
OUTLIERS, SHORT = 0.05, 0.15  # of heavy-tailed data: records of random tokens, and replies cut to one word
OPACUS_ACCOUNTANTS = {"vrdp": "rdp", "vpld": "prv"}
Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One point of a grid.

    Args:
        method: name in ``METHODS``.
        model: "llama" or "bitnet".
        tone: tone of the private dialogues.
        epsilon: privacy target at ``DELTA``; None for the methods without one.
        seed: of the data, the draws and the noise.
        rate: learning rate; None for that of the method.
        bound: C0; None for that of the method.
        beta1: momentum of the inner optimizer; None for that of the method.
        accountant: of the epsilon; None for that of the method.
        lora: rank of LoRA adapters in all linear layers but the head; 0 to train all weights.
        data: "easy", or "heavy" with outliers and one-word replies.
        steps: number of steps.
        batch: expected batch size.
    """

    method: str
    model: str = "llama"
    tone: str = "loving"
    epsilon: float | None = 4.0
    seed: int = 0
    rate: float | None = None
    bound: float | None = None
    data: str = "easy"
    steps: int = 30
    batch: int = 200
    beta1: float | None = None
    lora: int = 0
    accountant: str | None = None

    def key(self) -> str:
        """Short name of the cell and of all that its result depends on. Settings at their defaults do not enter."""
        method, study = self.resolved(), public.study_root().name
        values = [VERSION, _set(self), _set(method), study, *([AUTO_ADAM] if method.optimizer == "auto" else [])]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def resolved(self) -> Method:
        """Return the method with this cell's own settings; momentum that nobody set is that of the planned steps.

        Raises:
            ValueError: no such method.
        """
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(METHODS)}")
        names = ("rate", "bound", "beta1", "accountant")
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        method = replace(METHODS[self.method], **own)
        return method if method.beta1 is not None else replace(method, beta1=planned_beta1(self.steps))


def _set(settings: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that differ from their defaults."""
    fresh = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(settings)}
    return {name: value for name, value in asdict(settings).items() if value != fresh[name]}


# ---------------------------------------------------------------- data


@cache
def private_rows(tone: str, seed: int, data: str) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Return the private records and the public held-out ones; the latter are never made heavy-tailed."""
    train, held_out = train_and_heldout(tone, RECORDS, HELD_OUT, seed)
    rows = [public.encode(d) for d in train]
    if data == "heavy":
        rng = random.Random(seed)
        rows = [_heavier(row, rng) for row in rows]
    elif data != "easy":
        raise ValueError(f"unknown data {data!r}: easy or heavy")
    return tuple(rows), tuple(public.encode(d) for d in held_out)


def _heavier(row: Row, rng: random.Random) -> Row:
    luck = rng.random()
    if luck >= OUTLIERS + SHORT:
        return row
    labels = row["labels"].clone()
    known = (labels != -100).nonzero().flatten()
    if luck < OUTLIERS:
        labels[known] = torch.tensor([rng.randrange(4, public.VOCAB) for _ in known])
    else:
        labels[known[2:]] = -100
    return {**row, "labels": labels}


def stack(rows: list[Row]) -> Row:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


# ---------------------------------------------------------------- measures


@torch.no_grad()
def loss_of(model: nn.Module, rows: tuple[Row, ...]) -> float:
    """Mean over the records of each record's mean loss on its reply tokens."""
    was_training = model.training
    model.eval()
    losses = []
    for start in range(0, len(rows), PHYSICAL):
        batch = stack(list(rows[start : start + PHYSICAL]))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses.append(per_record_causal_lm_loss(logits, batch["labels"]))
    model.train(was_training)
    return torch.cat(losses).mean().item()


@torch.no_grad()
def replies(model: nn.Module, rows: tuple[Row, ...]) -> list[str]:
    """Sample a reply to the first prompt of each record, with a public seed."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    width = LENGTH - REPLY_TOKENS
    prompts = torch.full((len(rows), width), PAD)
    for i, row in enumerate(rows):
        ids = row["input_ids"].tolist()
        prompt = ids[: ids.index(public.REPLY) + 1]
        prompts[i, width - len(prompt) :] = torch.tensor(prompt)
    ids = prompts
    for _ in range(REPLY_TOKENS):
        logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits[:, -1]
        logits[:, :3] = -math.inf
        drawn = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
    model.train(was_training)
    texts = []
    for row in ids[:, width:].tolist():
        texts.append(public.tokenizer().decode(row[: row.index(public.END)] if public.END in row else row))
    return texts


def tone_accuracy(texts: list[str], tone: str) -> float:
    """Return the share of texts with more words of ``tone`` than of the other one (lexicon of ``tone_dialogues``)."""
    other = next(t for t in TONES if t != tone)
    return sum(tone_score(text, tone) > tone_score(text, other) for text in texts) / len(texts)


# ---------------------------------------------------------------- training


def run(cell: Cell) -> Result:
    """Train once and return what came out, JSON-ready."""
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)  # for Opacus, whose sampler draws from the global generator
    warnings.filterwarnings("ignore", category=NotPrivateWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    start = time.perf_counter()
    method = cell.resolved()
    rows, held_out = private_rows(cell.tone, cell.seed, cell.data)
    other = private_rows(next(t for t in TONES if t != cell.tone), cell.seed, "easy")[1]
    model = public.public_model(cell.model)
    model = with_adapters(model, cell) if cell.lora else model
    before = {"loss_before": loss_of(model, held_out)}
    course = ENGINES[method.engine](cell, method, model, list(rows))
    after = {
        "loss": loss_of(model, held_out),
        "other_tone": loss_of(model, other),
        "general": loss_of(model, public.general_rows()),
        "tone_accuracy": tone_accuracy(replies(model, held_out[:REPLIES]), cell.tone),
    }
    seconds = round(time.perf_counter() - start, 1)
    return {"key": cell.key(), **asdict(cell), **before, **after, **course, "seconds": seconds}


def with_adapters(model: nn.Module, cell: Cell) -> nn.Module:
    """Return the model with trainable LoRA adapters, which start from the cell's seed, and frozen weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(cell.seed)
    settings = LoraConfig(r=cell.lora, lora_alpha=2 * cell.lora, target_modules="all-linear")
    adapted: nn.Module = get_peft_model(model, settings)  # type: ignore[arg-type]
    return adapted


def schedule(cell: Cell, growth: float) -> list[float]:
    """Return an expected batch size per step, in a geometric course, with as many records in all as constant ones.

    >>> [round(size) for size in schedule(Cell("dp-adam-ac", steps=3, batch=70), 0.25)]
    [120, 60, 30]
    """
    course = [growth ** (step / (cell.steps - 1)) for step in range(cell.steps)]
    return [cell.batch * cell.steps * size / sum(course) for size in course]


def _inner(cell: Cell, method: Method, model: nn.Module) -> Optimizer:
    assert method.beta1 is not None
    return OPTIMIZERS[method.optimizer](model.parameters(), method.rate, method.beta1, cell.steps)


def _ours(cell: Cell, method: Method, model: nn.Module, rows: list[Row]) -> Result:
    engine = PrivacyEngine(accountant=method.accountant)
    inner = _inner(cell, method, model)
    settings: dict[str, Any] = {
        "module": model,
        "optimizer": inner,
        "data_loader": DataLoader(rows, batch_size=cell.batch, shuffle=True),  # type: ignore[arg-type]
        "max_grad_norm": method.bound,
        "max_physical_batch_size": PHYSICAL,
        "noise_generator": torch.Generator().manual_seed(cell.seed),
        "batch_size_schedule": schedule(cell, method.growth) if method.growth != 1 else None,
        **method.arguments,
    }
    if cell.epsilon is None:
        private, optimizer, loader = engine.make_private(noise_multiplier=UNACCOUNTED, **settings)
    else:
        private, optimizer, loader = engine.make_private_with_epsilon(
            target_epsilon=cell.epsilon, target_delta=DELTA, steps=cell.steps, **settings
        )
    course: Result = {"C": [], "clip_rate": [], "lr_multiplier": []}
    batches = _forever(loader)
    while optimizer.steps_taken < cell.steps:
        taken = optimizer.steps_taken
        optimizer.zero_grad()
        private(**next(batches)).loss.backward()
        optimizer.step()
        if optimizer.steps_taken > taken and (released := optimizer.released) is not None:
            course["C"].append(released.max_grad_norm)
            course["clip_rate"].append(released.clip_rate)
            course["lr_multiplier"].append(released.lr_multiplier)
            if isinstance(inner, AutoAdam):
                course.setdefault("found_rate", []).append(inner.learning_rates[0])
    if optimizer.ema is not None:
        with optimizer.ema_weights():
            course["loss_averaged"] = loss_of(model, private_rows(cell.tone, cell.seed, cell.data)[1])
    if method.averaged:
        _keep_the_average(optimizer, model)
    engine.detach(private)
    spent = engine.get_epsilon(DELTA) if cell.epsilon is not None else None
    return {**course, "noise_multiplier": optimizer.noise_multiplier, "spent": spent}


def _keep_the_average(optimizer: Any, model: nn.Module) -> None:
    with optimizer.ema_weights():
        kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)


def _forever(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def _without_privacy(cell: Cell, method: Method, model: nn.Module, rows: list[Row]) -> Result:
    """Ordinary training on batches of the same size."""
    optimizer = _inner(cell, method, model)
    generator = torch.Generator().manual_seed(cell.seed)
    for _ in range(cell.steps):
        chosen = torch.randperm(len(rows), generator=generator)[: cell.batch]
        batch = stack([rows[int(i)] for i in chosen])
        labels = batch.pop("labels")
        optimizer.zero_grad()
        per_record_causal_lm_loss(model(**batch).logits, labels).mean().backward()
        optimizer.step()
    return {"spent": None}


def _opacus(cell: Cell, method: Method, model: nn.Module, rows: list[Row]) -> Result:
    """Opacus's own engine and its adaptive clipping (1905.03871), with this package's rules for norms."""
    import opacus

    from opacus_ac.grad_sample import register_rules

    def collate(batch: list[Row]) -> Row:
        return stack(batch)

    register_rules(model)
    accountant = OPACUS_ACCOUNTANTS[method.accountant]
    engine = opacus.PrivacyEngine(accountant=accountant)
    assert cell.epsilon is not None
    multiplier = opacus.accountants.utils.get_noise_multiplier(
        target_epsilon=cell.epsilon,
        target_delta=DELTA,
        sample_rate=cell.batch / len(rows),
        steps=cell.steps,
        accountant=accountant,
    )
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=_inner(cell, method, model),
        data_loader=DataLoader(rows, batch_size=cell.batch, collate_fn=collate),  # type: ignore[arg-type]
        noise_multiplier=multiplier,
        max_grad_norm=method.bound,
        clipping="adaptive",
        target_unclipped_quantile=0.5,  # this and the next two as in the experiments of 1905.03871
        clipbound_learning_rate=0.2,
        unclipped_num_std=cell.batch / 20,
        max_clipbound=1e8,
        min_clipbound=1e-8,
        noise_generator=torch.Generator().manual_seed(cell.seed),
        **method.arguments,
    )
    bounds = []
    for batch in islice(_forever(loader), cell.steps):
        labels = batch.pop("labels")
        optimizer.zero_grad()
        per_record_causal_lm_loss(private(**batch).logits, labels).mean().backward()
        optimizer.step()
        bounds.append(float(optimizer.max_grad_norm))
    private.remove_hooks()
    return {"C": bounds, "noise_multiplier": multiplier, "spent": engine.get_epsilon(DELTA)}


ENGINES = {"opacus_ac": _ours, "opacus": _opacus, "none": _without_privacy}
