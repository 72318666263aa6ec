"""Tiny randomly initialised transformers models for tests, and the helpers that compare gradients on them."""

from __future__ import annotations

import os

# Read when torch._dynamo is first imported; compiling BitNet's quantisers would take half a minute.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleHooks, GradSampleModule
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from opacus_ac.grad_sample import expand_broadcast_embeddings

VOCAB = 61
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "use_cache": False,
}


def qwen2(tied: bool = True, **changes: Any) -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**{**_SHAPE, "tie_word_embeddings": tied, **changes}))


def llama(tied: bool = False, **changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, "tie_word_embeddings": tied, **changes}))


def bitnet(tied: bool = True, mode: str = "online", use_rms_norm: bool = False, **changes: Any) -> nn.Module:
    from transformers import BitNetConfig, BitNetForCausalLM, BitNetQuantConfig
    from transformers.integrations.bitnet import AutoBitLinear, replace_with_bitnet_linear

    model = BitNetForCausalLM(BitNetConfig(**{**_SHAPE, "tie_word_embeddings": tied, **changes}))
    old = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantisation = BitNetQuantConfig(
        linear_class="autobitlinear", quantization_mode=mode, use_rms_norm=use_rms_norm, rms_norm_eps=1e-6
    )
    replace_with_bitnet_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantisation)
    for name, module in model.named_modules():
        if isinstance(module, AutoBitLinear):  # the replacement starts from fresh random weights
            module.weight.data.copy_(old[name].weight)
            module.requires_grad_(True)
            if module.rms_norm is not None:  # ... and leaves the inner norm on the meta device
                module.rms_norm.weight = nn.Parameter(torch.ones(module.in_features))
    return model


def gpt2(tied: bool = True, **changes: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "use_cache": False}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        **{**shape, **no_dropout, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": tied, **changes}
    )
    return GPT2LMHeadModel(config)


def gemma3(tied: bool = True, **changes: Any) -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {**_SHAPE, "head_dim": 8, "sliding_window": 8, "pad_token_id": 0, "tie_word_embeddings": tied, **changes}
    return Gemma3ForCausalLM(Gemma3TextConfig(**shape))


#: Name -> builder, the rows of every table-driven model test.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "qwen2-tied": qwen2,
    "qwen2-untied": lambda: qwen2(tied=False),
    "llama": llama,
    "bitnet-tied": bitnet,
    "bitnet-untied": lambda: bitnet(tied=False),
    "bitnet-rms-norm": lambda: bitnet(use_rms_norm=True),
    "gpt2": gpt2,
    "gemma3": gemma3,
}


def build(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The named model in training mode, its one-dimensional parameters moved off their ones and zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]().to(dtype)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def token_batch(batch: int = 4, length: int = 7, *, padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids with attention mask and labels; ``padded`` gives the records different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    ids[:, 1] = ids[:, 0]  # a token that occurs twice in a record
    lengths = torch.tensor([max(3, length - i) if padded else length for i in range(batch)]).unsqueeze(1)
    mask = (torch.arange(length).unsqueeze(0) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def record_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Next-token cross entropy of each record, the mean over its own labelled positions, ``[B]``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over records of :func:`record_losses`."""
    return record_losses(model, batch).mean()


@contextlib.contextmanager
def opacus_table_restored() -> Iterator[None]:
    """Undo every registration of grad and norm samplers made inside."""
    tables = [GradSampleHooks.GRAD_SAMPLERS, GradSampleHooksFastGradientClipping.NORM_SAMPLERS]
    saved = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, saved, strict=True):
            table.clear()
            table.update(entries)


def hooks_gradients(
    model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor], *, strict: bool = True
) -> dict[str, Tensor]:
    """Per-sample gradients as Opacus's hooks leave them on a copy of the model, with positions expanded."""
    model = copy.deepcopy(model)
    with expand_broadcast_embeddings(model):
        wrapped = GradSampleModule(model, strict=strict)
        loss_fn(wrapped, batch).backward()
    return {n: p.grad_sample for n, p in model.named_parameters() if p.requires_grad}


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> tuple[float, str]:
    """The largest error relative to its parameter's largest entry, and the parameter."""
    assert got.keys() == want.keys()
    errors = []
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        scale = expected.abs().max().clamp_min(1e-30)
        errors.append((float((got[name] - expected).abs().max() / scale), name))
    return max(errors)
