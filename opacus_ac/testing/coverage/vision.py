"""Models of images, with the head for classes of images or, where they have none, by their features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opacus_ac.testing.coverage.case import Case
from opacus_ac.testing.coverage.tiny import built, config_class, tiny_config

SIZE, CLASSES = 32, 3
_PATCHES = {"image_size": SIZE, "patch_size": 8}
_STAGES = {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4, "patch_size": 4}
#: Model type -> changes of its config.
TYPES: dict[str, dict[str, Any]] = {
    "beit": _PATCHES,
    "clip": {"vision_config": _PATCHES},
    "convnext": {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2, "image_size": SIZE},
    "deit": {**_PATCHES, "architectures": ["DeiTForImageClassification"]},
    "dinov2": _PATCHES,
    "donut-swin": {"image_size": SIZE, **_STAGES},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "swin": {"image_size": SIZE, **_STAGES},
    "swinv2": {"image_size": SIZE, **_STAGES},
    "vit": _PATCHES,
}
_WINDOWS = {"window_size": 3, "mlp_dim": 24, "output_channels": 8, "global_attn_indexes": [1], **_PATCHES}
#: The same for models without a head.
FEATURES: dict[str, dict[str, Any]] = {
    "maskformer-swin": {"image_size": SIZE, **_STAGES},
    "sam_vision_model": _WINDOWS,
    "swin2sr": {**_STAGES, "image_size": SIZE, "patch_size": 1, "num_channels": 3},
    "vitdet": {"window_size": 3, "window_block_indices": [0], "use_relative_position_embeddings": True, **_PATCHES},
}


def _images() -> Tensor:
    return torch.randn(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _features(model_type: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModel

    config = tiny_config(config_class(model_type), **FEATURES[model_type])
    return built(AutoModel, config), [{"pixel_values": image} for image in _images()]


def _size_of_features(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).last_hidden_state.flatten(1).square().mean(1).mean()


def _model(model_type: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForImageClassification

    changes = dict(TYPES[model_type])
    cls = config_class(model_type)
    if part := changes.pop("vision_config", None):
        changes["vision_config"] = tiny_config(cls.sub_configs["vision_config"], **part)
    rows = [{"pixel_values": image, "labels": torch.tensor(i % CLASSES)} for i, image in enumerate(_images())]
    return built(AutoModelForImageClassification, tiny_config(cls, num_labels=CLASSES, **changes)), rows


def cases() -> Iterator[Case]:
    """Yield a case per type of models."""
    for model_type in TYPES:
        yield Case(model_type, partial(_model, model_type))
    for model_type in FEATURES:
        yield Case(f"{model_type}: features", partial(_features, model_type), _size_of_features)
