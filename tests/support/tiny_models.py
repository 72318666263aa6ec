"""Tiny randomly initialised transformers models for tests, and the helpers that compare gradients on them."""

from __future__ import annotations

import importlib.util
import os

# Read when torch._dynamo is first imported; compiling BitNet's quantisers would take half a minute.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_ac.testing import hooks_gradients, one_backward, opacus_table_restored, worst_error

__all__ = ["hooks_gradients", "one_backward", "opacus_table_restored", "worst_error"]  # used from here by many tests

#: Where models and batches of the batteries live: ``OPACUS_AC_TEST_DEVICE=cuda`` runs them on a GPU.
DEVICE = torch.device(os.environ.get("OPACUS_AC_TEST_DEVICE", "cpu"))
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


def qwen3(tied: bool = True, **changes: Any) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**{**_SHAPE, "head_dim": 8, "tie_word_embeddings": tied, **changes}))


def opt(tied: bool = True, **changes: Any) -> nn.Module:
    """Positions are an embedding whose forward takes the attention mask and makes its ids itself."""
    from transformers import OPTConfig, OPTForCausalLM

    shape = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "max_position_embeddings": 32, "use_cache": False}
    config = {**shape, **quiet, "pad_token_id": 0, "word_embed_proj_dim": 32, "tie_word_embeddings": tied, **changes}
    return OPTForCausalLM(OPTConfig(**config))


def roberta(tied: bool = True, **changes: Any) -> nn.Module:
    """Its head holds a bias that is the bias of a layer inside it."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_attention_heads": 4}
    config = {**shape, **quiet, "max_position_embeddings": 40, "pad_token_id": 0, "tie_word_embeddings": tied}
    return RobertaForMaskedLM(RobertaConfig(**{**config, **changes}))


def mamba(tied: bool = True, **changes: Any) -> nn.Module:
    """Its mixers have parameters of their own and no rule: the fallback answers for them."""
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "conv_kernel": 3}
    return MambaForCausalLM(MambaConfig(**{**shape, "use_cache": False, "tie_word_embeddings": tied, **changes}))


def mixtral(tied: bool = False, **changes: Any) -> nn.Module:
    """Every token goes through two of four experts, whose weights are stacked."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shape = {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return MixtralForCausalLM(MixtralConfig(**{**shape, "tie_word_embeddings": tied, **changes}))


def qwen2_moe(tied: bool = False, **changes: Any) -> nn.Module:
    """A shared expert beside four others."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    shape = {**_SHAPE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    sizes = {"shared_expert_intermediate_size": 16, "experts_implementation": "eager", "tie_word_embeddings": tied}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**{**shape, **sizes, **changes}))


def gpt_oss(tied: bool = False, **changes: Any) -> nn.Module:
    """Experts with biases, stored the other way round, and attention with a parameter per head."""
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = {
        **_SHAPE,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "pad_token_id": 0,
    }
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "experts_implementation": "eager"}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = GptOssForCausalLM(GptOssConfig(**{**shape, **kinds, **rope, "tie_word_embeddings": tied, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith(("_bias", "sinks")):
            parameter.data.normal_(std=0.1)
    return model


def deepseek_v3(tied: bool = False, **changes: Any) -> nn.Module:
    """A layer without experts and one with them, routed by groups, with a constant buffer in the router."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    shape = {
        **_SHAPE,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
    }
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    rest = {"first_k_dense_replace": 1, "num_key_value_heads": 4, "experts_implementation": "eager"}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(**{**shape, **latent, **rest, "tie_word_embeddings": tied, **changes})
    )


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


#: Models that Opacus's hooks cannot take, or not exactly, and mode "bk" can.
MORE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama-tied": lambda: llama(tied=True),
    "qwen3": qwen3,
    "qwen3-untied": lambda: qwen3(tied=False),
    "gpt2-untied": lambda: gpt2(tied=False),
    "gemma3-untied": lambda: gemma3(tied=False),
    "opt": opt,
    "opt-untied": lambda: opt(tied=False),
    "roberta": roberta,
    "roberta-untied": lambda: roberta(tied=False),
    "mamba": mamba,
    "bitnet-offline": lambda: offline(bitnet(mode="offline")),
    "bitnet-untied-rms-norm": lambda: bitnet(tied=False, use_rms_norm=True),
}
#: Mixtures of experts, where transformers keeps the weights of experts in stacks.
EXPERTS: dict[str, Callable[[], nn.Module]] = {
    "mixtral": mixtral,
    "qwen2-moe": qwen2_moe,
    "gpt-oss": gpt_oss,
    "deepseek-v3": deepseek_v3,
}
# Without transformers, which a machine with a GPU may lack, the tests that need none still run.
if importlib.util.find_spec("transformers") and importlib.util.find_spec("transformers.integrations.moe"):
    MORE_MODELS |= EXPERTS


def offline(model: nn.Module) -> nn.Module:
    """Give the output scales of offline layers values other than one."""
    for name, buffer in model.named_buffers():
        if name.endswith("weight_scale"):
            buffer.fill_(0.37)
    return model


def build(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """The named model in training mode, its one-dimensional parameters moved off their ones and zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (MODELS | MORE_MODELS)[name]().to(dtype)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(DEVICE).train()


def token_batch(batch: int = 4, length: int = 7, *, padded: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """Random token ids with attention mask and labels; ``padded`` gives the records different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    ids[:, 1] = ids[:, 0]  # a token that occurs twice in a record
    lengths = torch.tensor([max(3, length - i) if padded else length for i in range(batch)]).unsqueeze(1)
    mask = (torch.arange(length).unsqueeze(0) < lengths).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: values.to(DEVICE) for name, values in batch.items()}


def record_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Next-token cross entropy of each record, the mean over its own labelled positions, ``[B]``."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over records of :func:`record_losses`."""
    return record_losses(model, batch).mean()


def rows(count: int = 40) -> list[dict[str, torch.Tensor]]:
    """Records of eight random tokens, as a transformers model takes them."""
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB, (count, 8))]
