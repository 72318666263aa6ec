"""Settings, records and trainers of TRL of a size for tests."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig
from tiny_chat import byte_tokenizer, chat_model
from tiny_trainer import privacy
from trl import DPOConfig, SFTConfig

from opacus_ac.integrations import PrivateDPOTrainer, PrivateSFTTrainer

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ("tea", "a red boat", "rain on Sunday", "no", "the old oak tree", "seven", "snow", "a letter to Ann")


def text(index: int, salt: int = 0) -> str:
    """One of many texts of different lengths."""
    return f"{WORDS[(index + salt) % len(WORDS)]} {index * 7 + salt}"


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def dialogues(count: int, salt: int = 0) -> list[dict]:
    return [{"messages": [said("user", text(i, salt)), said("assistant", text(3 * i, salt + 1))]} for i in range(count)]


def completions(count: int, salt: int = 0) -> list[dict]:
    return [{"prompt": text(i, salt), "completion": " is " + text(3 * i, salt + 1)} for i in range(count)]


def prompted(count: int, salt: int = 0) -> list[dict]:
    return [
        {"prompt": [said("user", text(i, salt))], "completion": [said("assistant", text(3 * i, salt + 1))]}
        for i in range(count)
    ]


def pairs(count: int, salt: int = 0) -> list[dict]:
    """Preference pairs as dialogues."""
    return [
        {
            "prompt": [said("user", text(i, salt))],
            "chosen": [said("assistant", text(3 * i, salt + 1))],
            "rejected": [said("assistant", text(5 * i, salt + 2) + "!")],
        }
        for i in range(count)
    ]


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes})  # fmt: skip


def moved(model):
    """The model with adapters that do something, as after some steps."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 4
    return model


def arguments(folder, config=SFTConfig, **changes):
    """Three steps of 16 records in physical batches of 4, on the processor, in float32."""
    defaults = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "learning_rate": 1e-3, "max_length": 64, "gradient_checkpointing": False,
    }  # fmt: skip
    return config(output_dir=str(folder), **{**defaults, **changes})


def sft(
    folder, *, data=None, settings=None, tokenizer=None, model=None, options=None, cls=PrivateSFTTrainer, **changes
):
    data = dialogues(64) if data is None else data
    tokenizer = tokenizer or byte_tokenizer(MARKED)
    made = privacy(**({"dataset_size": len(data)} | (settings or {})))
    return cls(
        chat_model(tokenizer) if model is None else model,
        arguments(folder, **changes),
        privacy=made,
        train_dataset=data,
        processing_class=tokenizer,
        **(options or {}),
    )


def dpo(
    folder, *, data=None, settings=None, tokenizer=None, model=None, options=None, cls=PrivateDPOTrainer, **changes
):
    data = pairs(64) if data is None else data
    tokenizer = tokenizer or byte_tokenizer(MARKED)
    made = privacy(**({"dataset_size": len(data)} | (settings or {})))
    reference = {} if changes.get("precompute_ref_log_probs") else {"peft_config": lora()}
    return cls(
        chat_model(tokenizer) if model is None else model,
        args=arguments(folder, DPOConfig, **changes),
        privacy=made,
        train_dataset=data,
        processing_class=tokenizer,
        **{**reference, **(options or {})},
    )


def copied(records):
    return copy.deepcopy(records)
