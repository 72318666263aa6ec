"""Rows, arguments and trainers of a size for tests."""

from __future__ import annotations

import tiny_models
import torch
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from opacus_ac.integrations import PrivacyArguments, PrivateTrainer


def rows(count: int, length: int = 9, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    """Token rows of different lengths, padded to one."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        ids = torch.randint(3, tiny_models.VOCAB, (length,), generator=generator)
        mask = (torch.arange(length) < 4 + i % (length - 3)).long()
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def batch(records: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in records]) for key in records[0]}


def arguments(folder, **changes) -> TrainingArguments:
    """Three steps of 16 records in physical batches of 4, on the processor."""
    defaults = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **changes})


def privacy(**changes) -> PrivacyArguments:
    defaults = {"target_delta": 1e-3, "dataset_size": 64}
    if "target_epsilon" not in changes:
        defaults["noise_multiplier"] = 1.0
    return PrivacyArguments(**{**defaults, **changes})


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trainer(folder, *, model="qwen2-tied", data=None, settings=None, cls=PrivateTrainer, options=None, **changes):
    """A trainer on 64 rows; ``changes`` are of the TrainingArguments, ``settings`` of the PrivacyArguments."""
    if isinstance(model, str):
        model = tiny_models.build(model).float()
    data = rows(64) if data is None else data
    made = privacy(**({"dataset_size": len(data)} | (settings or {})))
    return cls(model, arguments(folder, **changes), privacy=made, train_dataset=data, **(options or {}))


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        yield from rows(3)
