"""Models of images."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

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
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "swin": {"image_size": SIZE, **_STAGES},
    "swinv2": {"image_size": SIZE, **_STAGES},
    "vit": _PATCHES,
}


def _model(model_type: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForImageClassification

    changes = dict(TYPES[model_type])
    cls = config_class(model_type)
    if part := changes.pop("vision_config", None):
        changes["vision_config"] = tiny_config(cls.sub_configs["vision_config"], **part)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(6, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    rows = [{"pixel_values": image, "labels": torch.tensor(i % CLASSES)} for i, image in enumerate(images)]
    return built(AutoModelForImageClassification, tiny_config(cls, num_labels=CLASSES, **changes)), rows


def cases() -> Iterator[Case]:
    """Yield a case per type of models, with the head for classes of images."""
    for model_type in TYPES:
        yield Case(model_type, partial(_model, model_type))
