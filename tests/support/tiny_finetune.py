"""``opacus-ac finetune`` with options of a size for tests."""

STEPS = 10


SMALL = {
    "target_epsilon": 8, "target_delta": 1e-3, "dataset_size": 60, "max_steps": STEPS, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 3, "save_steps": 4, "max_length": 120, "lora_layers": 1, "use_cpu": True,
}  # fmt: skip


def command(place, out, **changes):
    options = {"train_file": place / "chats.jsonl", "model_name_or_path": place / "model", "output_dir": out, **SMALL}
    options.update(changes)
    return ["finetune", *(word for k, v in options.items() if v is not None for word in (f"--{k}", str(v)))]
