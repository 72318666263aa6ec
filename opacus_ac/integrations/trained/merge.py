"""Merges the adapters of a run into its base model: one folder that needs neither peft nor the base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from opacus_ac.integrations.trained.card import model_card
from opacus_ac.integrations.trained.folder import (
    CARD,
    PRIVACY_REPORT,
    SETTINGS,
    RunError,
    RunFolder,
    is_adapter,
    read_object,
    write_object,
)
from opacus_ac.integrations.trained.model import load_run

_TOLERANCE = 1e-3
"""Largest difference of a logit, over the largest logit, that rounding may make in float32."""


def merge_run(
    path: str | Path, out: str | Path, *, base: str | None = None, dtype: torch.dtype = torch.float32
) -> Path:
    """Write a model whose weights have the adapters of a run in them.

    Args:
        path: folder of the run.
        out: new folder.
        base: folder or hub name of the base model, where the run does not know it.
        dtype: type of the written weights.

    Returns:
        The folder.

    Raises:
        RunError: If the run has no adapters that can be merged, ``out`` has files, or the merged model computes
            something else. Nothing is written then.
    """
    run, out = RunFolder.at(path), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not an empty folder: name a new one")
    folder = run.model_folder()
    if not is_adapter(folder):
        raise RunError(f"{folder} holds all weights already: there are no adapters to merge")
    loaded = load_run(path, base=base, dtype=torch.float32)
    merged = _merged(loaded.model).to(dtype)
    out.mkdir(parents=True, exist_ok=True)
    merged.save_pretrained(out)
    loaded.tokenizer.save_pretrained(out)
    settings = RunFolder(folder).settings
    if settings:
        write_object(out / SETTINGS, {**settings, "adapters": False})
    if (folder / PRIVACY_REPORT).is_file():
        shutil.copyfile(folder / PRIVACY_REPORT, out / PRIVACY_REPORT)
        report = read_object(folder / PRIVACY_REPORT)
        (out / CARD).write_text(model_card(settings, report, merged=True), encoding="utf-8")
    return out


@torch.no_grad()
def _merged(model: Any) -> Any:
    """Return the model without adapter layers, after a comparison of its logits with those of the adapters."""
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise RunError("these adapters are prompts, which are no part of the weights: they cannot be merged")
    vocabulary = int(model.config.vocab_size)
    ids = torch.arange(16, device=model.device)[None] * 7919 % vocabulary
    wanted = model(input_ids=ids, use_cache=False).logits
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (ValueError, AttributeError, NotImplementedError) as error:
        raise RunError(f"these adapters cannot be merged: {' '.join(str(error).split())}") from error
    found = merged(input_ids=ids, use_cache=False).logits
    if not bool(((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max().clamp(min=1)).item()):
        raise RunError("the merged model computes something else than the adapters: keep them apart from the base")
    return merged
