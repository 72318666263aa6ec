"""``opacus-ac finetune`` with options of a size for tests."""

import shutil

import torch
from common.tone_dialogues import dialogues, write_jsonl
from safetensors.torch import load_file, save_file
from tiny_chat import save_chat_model

STEPS = 10


SMALL = {
    "target_epsilon": 8, "target_delta": 1e-3, "dataset_size": 60, "max_steps": STEPS, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3, "save_steps": 4, "max_length": 120, "lora_layers": 1, "use_cpu": True,
}  # fmt: skip


def command(place, out, **changes):
    options = {"train_file": place / "chats.jsonl", "model_name_or_path": place / "model", "output_dir": out, **SMALL}
    options.update(changes)
    return ["finetune", *(word for k, v in options.items() if v is not None for word in (f"--{k}", str(v)))]


def chat_place(folder):
    """Return the folder, with a model, and with private and public dialogues in it."""
    save_chat_model(folder / "model")
    write_jsonl(folder / "chats.jsonl", dialogues("loving", 60, 0))
    write_jsonl(folder / "public.jsonl", dialogues("loving", 6, 1))
    return folder


def loud_copy(run, folder):
    """Return a copy of a run folder whose adapters change every reply, the same in every test run."""
    shutil.copytree(run, folder)
    path = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=generator) * 3 if "lora_B" in name else value
        for name, value in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return folder
