"""What was right stays right: models, layers, loops and adapters beside a loop over single records, without a refusal or a warning.

Each row takes two noiseless steps of flat clipping over all of its records, about half of which are clipped.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import tiny_models
import torch
import torch.nn.functional as F
import transformers
from helpers import Rows
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from opacus.layers.dp_multihead_attention import SequenceBias
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate

from opacus_ac import PrivacyEngine

RECORDS, STEPS = 5, 2
KNOWN = ("Full backward hook is firing", "Secure RNG turned off")
"""Warnings of torch's and Opacus's that have nothing to do with a guard."""
TEXT = tiny_models._SHAPE | {"pad_token_id": 0}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@dataclass
class Case:
    """What is trained, on which rows, and how."""

    build: Callable[[], nn.Module]
    rows: Callable[[], list[Any]]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    loop: Callable[..., None] | None = None
    modes: tuple[str, ...] = ("bk",)
    tolerance: float = 1e-8
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    workers: int = 0


def plain(model, optimizer, loader, loss):
    for batch in loader:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()


def gradients_alone(model, rows, loss):
    """Gradients of each record alone, as one vector each ``[B, P]``."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for row in rows:
        model.zero_grad()
        loss(model, default_collate([row])).backward()
        found.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained]))
    model.zero_grad()
    return torch.stack(found)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def by_loop(model, rows, loss, rates=(1.0,) * STEPS):
    """Train with clipped means of the records' gradients, and return (C, the weights after each step)."""
    bound, after = None, []
    for rate in rates:
        gradients = gradients_alone(model, rows, loss)
        norms = gradients.norm(dim=1)
        if bound is None:
            bound = float(norms.median())
            assert (norms > bound).any()
            assert (norms > 0).all()
        update = (gradients * (bound / norms).clamp(max=1)[:, None]).mean(0)
        weights = flat(model) - rate * update
        after.append(weights)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p, new in zip(trained, weights.split([p.numel() for p in trained]), strict=True):
                p.copy_(new.view_as(p))
    return bound, after


def check(case: Case, mode: str) -> None:
    torch.manual_seed(0)
    model, rows = case.build().to(case.dtype).train(), case.rows()
    start = flat(model)
    bound, want = by_loop(copy.deepcopy(model), rows, case.loss)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trained = [p for p in model.parameters() if p.requires_grad]
        wrapped, optimizer, loader = PrivacyEngine().make_private(
            module=model, optimizer=torch.optim.SGD(trained, lr=1.0), grad_sample_mode=mode, noise_multiplier=0.0,
            data_loader=DataLoader(Rows(rows), batch_size=len(rows), num_workers=case.workers), max_grad_norm=bound,
            clipping="flat", ema_decay=None, **case.options,
        )  # fmt: skip
        found = []
        for _ in range(STEPS):
            (case.loop or plain)(wrapped, optimizer, loader, case.loss)
            found.append(flat(model))
    for got, expected in zip(found, want, strict=True):
        error = (got - expected).norm() / (expected - start).norm()
        assert error < case.tolerance, error
    told = [str(w.message) for w in seen if issubclass(w.category, UserWarning)]
    assert not [words for words in told if not words.startswith(KNOWN)]


# Models


def tokens(count=RECORDS, length=7):
    """Records of different lengths, padded; the labels leave out padding and one more position."""
    batch = tiny_models.token_batch(count, length)
    batch["labels"][1, 2] = -100
    return [{name: values[i] for name, values in batch.items()} for i in range(count)]


def labelled(count=RECORDS, padding=0, **labels):
    """Padded records with labels of their own; ``padding`` more than the longest of them needs."""
    rows = [{k: F.pad(v, (0, padding)) for k, v in row.items() if k != "labels"} for row in tokens(count)]
    return [row | {name: torch.tensor(of(i)) for name, of in labels.items()} for i, row in enumerate(rows)]


def pictures():
    generator = torch.Generator().manual_seed(2)
    return [
        {"pixel_values": (1 + i) * torch.randn(3, 8, 8, generator=generator, dtype=torch.float64), "labels": torch.tensor(i % 3)}
        for i in range(RECORDS)
    ]  # fmt: skip


def own_loss(model, batch):
    return model(**batch).loss


def causal(name, **changes):
    config = getattr(transformers, f"{name}Config")(**(TEXT | changes))
    return getattr(transformers, f"{name}ForCausalLM")(config)


def encoder(name, head, **changes):
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 40}
    config = getattr(transformers, f"{name}Config")(**(TEXT | quiet | changes))
    return getattr(transformers, f"{name}For{head}")(config)


def text(build, **changes):
    return Case(
        build, tokens, **({"loss": own_loss, "tolerance": 1e-6} | changes)
    )  # the library computes losses in float32


sequence_rows = functools.partial(labelled, labels=lambda i: i % 3)
# Padding gets a part of the answers' probabilities in the library's loss: a length that is fixed is no record's doing.
answer_rows = functools.partial(labelled, padding=2, start_positions=lambda i: i % 2, end_positions=lambda i: 1 + i % 2)
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
       "patch_size": 4, "num_labels": 3}  # fmt: skip
BOTH = ("bk", "hooks")
MODELS = {
    "gpt2": text(tiny_models.gpt2),
    "gpt_neox": text(lambda: causal("GPTNeoX")),
    "opt": text(tiny_models.opt),
    "llama": text(tiny_models.llama),
    "mistral": text(lambda: causal("Mistral", sliding_window=4)),
    "qwen2": text(tiny_models.qwen2),
    "qwen3": text(tiny_models.qwen3),
    "gemma2": text(lambda: causal("Gemma2", head_dim=8, sliding_window=8)),
    "phi3": text(lambda: causal("Phi3")),
    "olmo2": text(lambda: causal("Olmo2")),
    "bitnet": text(tiny_models.bitnet, tolerance=1e-6),
    "bert": Case(lambda: encoder("Bert", "SequenceClassification", num_labels=3), sequence_rows, own_loss),
    "roberta answers": Case(lambda: encoder("Roberta", "QuestionAnswering"), answer_rows, own_loss),
    "vit": Case(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VIT)), pictures, own_loss),
}


# Layers


class Own(nn.Module):
    """A module by a function of its parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.function = function

    def forward(self, x):
        return self.function(self.parts, x)


def numbers(*shape, count=RECORDS):
    generator = torch.Generator().manual_seed(4)
    scales = torch.linspace(0.5, 1.5, count, dtype=torch.float64)
    return [
        (s * torch.randn(*shape, generator=generator, dtype=torch.float64), torch.tensor(i))
        for i, s in enumerate(scales)
    ]


def ids(length=5, count=RECORDS):
    """Token ids, padded by zeros."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(1, 9, (length,), generator=generator) for _ in range(count)]
    return [(row * (torch.arange(length) < 2 + i % 4), torch.tensor(i)) for i, row in enumerate(rows)]


def squares(model, batch):
    """Mean over records of squared distances to a target of each."""
    x, y = batch
    out = model(x)
    return (out.flatten(1) - 0.1 * y[:, None]).square().mean(1).mean()


def layer(build, *shape, rows=None, **changes):
    return Case(build, rows or functools.partial(numbers, *shape), squares, **({"modes": BOTH} | changes))


class Tied(nn.Module):
    """Ids through an embedding, and back through its weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.middle(self.embed(x)).tanh())


def bit_linear():
    from transformers.integrations.bitnet import AutoBitLinear

    made = AutoBitLinear(6, 4, bias=False, online_quant=True)
    return nn.Sequential(nn.Linear(6, 6), made)


LAYERS = {
    "Linear": layer(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 4),
    "Linear on sequences": layer(lambda: nn.Linear(4, 3), 5, 4),
    "Embedding": layer(lambda: nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 2)), rows=ids),
    "LayerNorm": layer(lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), 5, 4),
    "GroupNorm": layer(lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 1)), 4, 5),
    "InstanceNorm": layer(lambda: nn.Sequential(nn.InstanceNorm1d(4, affine=True), nn.Conv1d(4, 2, 1)), 4, 5),
    "RMSNorm": layer(lambda: nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 2)), 5, 4),
    "Conv1d": layer(lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), 4, 7),
    "Conv2d": layer(lambda: nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 2, 2)), 2, 7, 7),
    "Conv3d": layer(lambda: nn.Conv3d(2, 3, 2, dilation=2), 2, 4, 4, 4),
    "DPLSTM": layer(lambda: Own(lambda p, x: p["m"](x)[0], m=DPLSTM(4, 3, batch_first=True, bidirectional=True)), 5, 4),
    "DPGRU": layer(lambda: Own(lambda p, x: p["m"](x)[0], m=DPGRU(4, 3, batch_first=True, num_layers=2)), 5, 4),
    "DPMultiheadAttention": layer(
        lambda: Own(lambda p, x: p["m"](x, x, x)[0], m=DPMultiheadAttention(4, 2, batch_first=True)), 5, 4
    ),
    "SequenceBias": layer(lambda: nn.Sequential(nn.Linear(4, 4), SequenceBias(4, batch_first=True)), 5, 4),
    "tied": layer(Tied, rows=ids, modes=("bk",)),
    "transformers' Conv1D": layer(lambda: nn.Sequential(transformers.pytorch_utils.Conv1D(3, 4), nn.Tanh()), 5, 4),
    "BitLinear": layer(bit_linear, 5, 6, modes=("bk",), tolerance=1e-6),
}


# Loops


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def zero_grad_after(model, optimizer, loader, loss):
    for batch in loader:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def zero_grad_between(model, optimizer, loader, loss):
    for batch in loader:
        value = loss(model, batch)
        optimizer.zero_grad(set_to_none=False)
        value.backward()
        optimizer.step()


def in_physical_batches(model, optimizer, loader, loss):
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as batches:
        plain(model, optimizer, batches, loss)


def with_closure(model, optimizer, loader, loss):
    for batch in loader:

        def closure(batch=batch):
            optimizer.zero_grad()
            value = loss(model, batch)
            value.backward()
            return value

        optimizer.step(closure)


def with_scheduler(model, optimizer, loader, loss):
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    plain(model, optimizer, loader, loss)
    scheduler.step()


def looked_at_between(model, optimizer, loader, loss):
    """An evaluation without gradients before and after, as loops have it."""
    for batch in loader:
        model.eval()
        with torch.no_grad():
            loss(model, batch)
        model.train()
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        model.eval()
        with torch.no_grad():
            loss(model, batch)
        model.train()


def pair(model, batch):
    x, y = batch
    first, second = model(x), model(x.flip(1))
    distance = (first - second).square().sum(1)
    return torch.where(y % 2 == 0, distance, F.relu(1 - distance)).mean()


def critic(model, batch):
    """Real minus made ones, by a generator that is frozen."""
    x, _ = batch
    made = torch.tanh(x @ torch.linspace(-1, 1, 16, dtype=x.dtype).view(4, 4))
    return (model(made).sum(1).square() - model(x).sum(1)).mean()


class Distilled(nn.Module):
    """A student beside a frozen teacher inside of the model."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = net(), net()
        self.teacher.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            target = self.teacher(x).softmax(-1)
        return F.kl_div(self.student(x).log_softmax(-1), target, reduction="none").sum(-1)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(checkpoint(self.first, x, use_reentrant=False).tanh())


class LossInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, y):
        return (self.net(x) - 0.1 * y[:, None]).square().mean(1)


def in_bfloat16(model, batch):
    x, y = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    return (out.float() - 0.1 * y[:, None]).square().mean(1).mean()


def preferences():
    """Chosen and rejected answers, padded."""
    chosen, rejected = tokens(), [{k: v.flip(0) if k == "input_ids" else v for k, v in row.items()} for row in tokens()]
    return [{"chosen": a, "rejected": b} for a, b in zip(chosen, rejected, strict=True)]


def log_likelihoods(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    return -F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)


def without_adapters(model):
    inner = getattr(model, "_module", model)
    return inner.disable_adapter()


def direct_preference(model, batch):
    """The reference is the model itself with its adapters off."""
    with torch.no_grad(), without_adapters(model):
        reference = log_likelihoods(model, batch["chosen"]) - log_likelihoods(model, batch["rejected"])
    margin = log_likelihoods(model, batch["chosen"]) - log_likelihoods(model, batch["rejected"])
    return -F.logsigmoid(0.5 * (margin - reference)).mean()


def loop(of=None, build=net, loss=squares, rows=None, **changes):
    return Case(build, rows or functools.partial(numbers, 4), loss, of, **({"modes": BOTH} | changes))


def adapted(base="qwen2-untied", config=None, **options):
    """The base with adapters, every trained weight moved off its start."""
    named = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(
        base() if callable(base) else tiny_models.build(base), config or peft.LoraConfig(**(named | options))
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


LOOPS = {
    "plain": loop(),
    "zero_grad after the step": loop(zero_grad_after),
    "zero_grad between the passes": loop(zero_grad_between, modes=("bk",)),
    "physical batches": loop(in_physical_batches),
    "physical batches of the engine": loop(options={"max_physical_batch_size": 2}),
    "workers": loop(in_physical_batches, workers=1, modes=("bk",)),
    "checkpointing": loop(build=Checkpointed, modes=("bk",)),
    "checkpointing of transformers": text(
        lambda: (m := tiny_models.llama(), m.gradient_checkpointing_enable({"use_reentrant": False}))[0]
    ),
    "bfloat16 autocast": loop(loss=in_bfloat16, dtype=torch.float32, tolerance=2e-2, modes=("bk",),
                              rows=lambda: [(x.float(), y) for x, y in numbers(4)]),
    "closure": loop(with_closure),
    "scheduler": loop(with_scheduler),
    "evaluation between": loop(looked_at_between, modes=("bk",)),
    "siamese": loop(loss=pair),
    "critic": loop(loss=critic),
    "distillation": loop(build=Distilled, loss=lambda model, batch: model(batch[0]).mean()),
    "loss inside": loop(build=LossInside, loss=lambda model, batch: model(*batch).mean()),
    "preferences": loop(build=adapted, rows=preferences, loss=direct_preference, modes=("bk",), tolerance=1e-6),
}  # fmt: skip


# Adapters


def frozen_a(**options):
    from opacus_ac.models.peft import freeze_a

    model = adapted(**options)
    freeze_a(model)
    return model


def classifier(**options):
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False, **options
    )
    return peft.get_peft_model(encoder("Bert", "SequenceClassification", num_labels=3), config)


def method(cls, **options):
    return cls(**({"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options))


def prompt(**options):
    return peft.PromptTuningConfig(**({"task_type": "CAUSAL_LM", "num_virtual_tokens": 3} | options))


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def in_bfloat16_with_own_loss(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(**batch).loss


ADAPTERS = {
    "gpt2": text(lambda: adapted("gpt2", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "llama": text(lambda: adapted("llama")),
    "qwen2": text(lambda: adapted("qwen2-tied")),
    "opt": text(lambda: adapted("opt")),
    "bert": Case(classifier, sequence_rows, own_loss),
    "rank-stabilised": text(lambda: adapted(use_rslora=True)),
    "pissa": text(lambda: adapted(base=lambda: tiny_models.qwen2(tied=False), init_lora_weights="pissa")),
    "olora": text(lambda: adapted(base=lambda: tiny_models.qwen2(tied=False), init_lora_weights="olora")),
    "all-linear": text(lambda: adapted(target_modules="all-linear")),
    "all biases": text(lambda: adapted(bias="all")),
    "biases of LoRA": text(lambda: adapted(lora_bias=True, bias="lora_only")),
    "head saved": text(lambda: adapted(modules_to_save=["lm_head"])),
    "embedding saved": text(lambda: adapted(modules_to_save=["embed_tokens", "norm"])),
    "first factor frozen": text(frozen_a),
    "prefix": text(
        lambda: adapted(config=peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)), modes=("bk",)
    ),
    "norms": text(
        lambda: adapted(config=peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]))
    ),
    # Layers of peft that compute with the parameters of their parts.
    "DoRA": text(lambda: adapted(use_dora=True)),
    "DoRA, checkpointed": text(lambda: checkpointed(adapted("llama", use_dora=True))),
    "DoRA, physical batches": text(lambda: adapted(use_dora=True), options={"max_physical_batch_size": 2}),
    "DoRA, bfloat16": text(lambda: adapted(use_dora=True), loss=in_bfloat16_with_own_loss, dtype=torch.float32,
                           tolerance=3e-2),
    "DoRA of bert": Case(lambda: classifier(use_dora=True), sequence_rows, own_loss),
    "embedding": text(lambda: adapted("qwen2-tied", target_modules=["q_proj", "embed_tokens"])),
    "tokens": text(lambda: adapted(trainable_token_indices=[*range(3, 30)])),
    "prompt": text(lambda: adapted("gpt2", config=prompt())),
    "prompt, checkpointed": text(lambda: checkpointed(adapted("llama", config=prompt()))),
    "prompt of bert": Case(lambda: peft.get_peft_model(encoder("Bert", "SequenceClassification", num_labels=3),
                                                       prompt(task_type="SEQ_CLS")), sequence_rows, own_loss),
    "VB-LoRA": text(lambda: adapted(config=method(peft.VBLoRAConfig, r=2, num_vectors=4, vector_length=8))),
}  # fmt: skip
TABLES = {"model": MODELS, "layer": LAYERS, "loop": LOOPS, "adapter": ADAPTERS}


@pytest.mark.parametrize(
    ("table", "name", "mode"),
    [(table, name, mode) for table, rows in TABLES.items() for name, case in rows.items() for mode in case.modes],
)
def test_steps_are_those_of_a_loop_over_single_records(table, name, mode):
    check(TABLES[table][name], mode)


DROPOUT = {
    "gpt2": text(lambda: tiny_models.gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)),
    "LoRA": text(lambda: adapted(lora_dropout=0.1)),
    "layers": loop(build=lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 3))),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_runs_and_is_charged(name):
    case = DROPOUT[name]
    model, engine = case.build().double().train(), PrivacyEngine()
    start = flat(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        wrapped, optimizer, loader = engine.make_private(
            module=model, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
            data_loader=DataLoader(Rows(case.rows()), batch_size=RECORDS), noise_multiplier=1.0, clipping="flat",
        )  # fmt: skip
        for _ in range(STEPS):
            plain(wrapped, optimizer, loader, case.loss)
    assert not torch.equal(start, flat(model))
    assert sum(steps for _, _, steps in engine.accountant.history) == STEPS
