"""Small models of every architecture of transformers, from one recipe for configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

#: Models with more parameters are not run: their configs do not follow the recipe.
MOST_PARAMETERS = 20_000_000
VOCABULARY = 64
#: Attributes of configs, under all their names, and small values of them.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "encoder_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mlp_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(
        (
            "v_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_head_dim",
            "state_size",
            "mamba_d_state",
        ),
        8,
    ),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_chunk_size", "chunk_size", "d_kv", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "bos_token_id"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("mask_time_prob", "mask_feature_prob"), 0.0),
    **dict.fromkeys(("use_cache", "apply_spec_augment", "output_router_logits"), False),
    "qk_head_dim": 16,
    "sliding_window": 16,
    "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 8,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SHARED_ATTENTION = {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "layer_types": None}
_TWO_ROPES = {"rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE}}
#: What the recipe cannot know, by model type.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_expand": 2, "mamba_n_groups": 1, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], **_TWO_ROPES},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_top_k": 2},  # of one expert, the router would get no gradient
    },
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "led": {"attention_window": [8, 8]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 1},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": None},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 32,
        "split_ngram_parts": 1,
        "hc_lowrank": 4,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_embds": False,
        "feed_forward_size": 24,
    },
    "xlnet": {"max_position_embeddings": None, "d_inner": 24},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, **_SHARED_ATTENTION},
    "zamba2": {"num_hidden_layers": 3, **_SHARED_ATTENTION},
    "zaya": {"num_experts_per_tok": 1},
}


def config_class(model_type: str) -> Any:
    """Return the class of the configs of a type of models."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def tiny_config(cls: Any, **changes: Any) -> Any:
    """Return a small config of a class, without dropout.

    Args:
        cls: a class of configs.
        changes: attributes that shall have these values.

    Raises:
        Exception: If the recipe does not fit; whatever the class raises.
    """
    base = cls()
    kind = getattr(cls, "model_type", "")
    values = {name: value for name, value in SMALL.items() if _has(cls, base, name)}
    values.update({name: 0.0 for name, value in vars(base).items() if _is_random(name, value)})
    if isinstance(types := getattr(base, "layer_types", None), list) and _can_be_set(cls, "layer_types"):
        values["layer_types"] = two_kinds(types)
    for name in getattr(cls, "sub_configs", {}):
        if (part := getattr(base, name, None)) is not None and type(part).__name__ != "PreTrainedConfig":
            values[name] = tiny_config(type(part))
    values |= {**OWN.get(kind, {}), **changes}
    return cls(**{name: value for name, value in values.items() if value is not None})


def two_kinds(types: list[str]) -> list[str]:
    """Return two layers, of different kinds where there are several; the last is one with attention if any is."""
    kinds = list(dict.fromkeys(types))
    if len(kinds) == 1:
        return kinds * 2
    last = next((kind for kind in kinds[1:] if "attention" in kind and "linear" not in kind), kinds[1])
    return [kinds[0], last]


def _has(cls: Any, base: Any, name: str) -> bool:
    try:
        known = hasattr(base, name) or name in getattr(cls, "attribute_map", {})
        listed = isinstance(getattr(base, name, None), list | tuple)  # one value per stage
    except Exception:  # it is there, and differs between layers
        known, listed = True, False
    return known and not listed and _can_be_set(cls, name)


def _can_be_set(cls: Any, name: str) -> bool:
    found = getattr(cls, getattr(cls, "attribute_map", {}).get(name, name), None)
    return not isinstance(found, property) or found.fset is not None


def _is_random(name: str, value: Any) -> bool:
    drawn = "drop" in name or name.endswith("pdrop") or name == "router_jitter_noise"
    return drawn and isinstance(value, float)


def built(auto: Any, config: Any) -> nn.Module:
    """Return a model of an auto class, in float64, with no parameter that is zero.

    Args:
        auto: one of transformers' auto classes.
        config: as :func:`tiny_config` makes it.

    Raises:
        ValueError: If it is too large to be called small.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters: the recipe for small configs does not fit")
    return prepared(auto.from_config(config, attn_implementation="eager", experts_implementation="eager"))


def prepared(model: nn.Module) -> nn.Module:
    """Return a model in float64 and training mode, without dropout; parameters that are zero are moved."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not bool(parameter.any()):
                parameter.normal_(0, 0.02)
    return model.double().train()


def text_rows(records: int = 6, length: int = 9) -> list[dict[str, torch.Tensor]]:
    """Return padded records of random tokens, with labels that leave out padding and the beginning of some."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(records):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask = (torch.arange(length) < length - number % 4).long()
        ids = ids * mask
        labels = ids.masked_fill(mask == 0, -100)
        labels[: number % 3] = -100
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def stacked(rows: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the batch of some records."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
