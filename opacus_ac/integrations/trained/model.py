"""Loads the model of a run: the adapters on their base, or all weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opacus_ac.integrations.trained.base import base_name, base_source
from opacus_ac.integrations.trained.folder import RunError, RunFolder, is_adapter
from opacus_ac.models.default_model import ModelUnavailableError
from opacus_ac.models.peft import frozen_dtype


@dataclass
class RunModel:
    """The model of a run, ready to write replies.

    Attributes:
        run: its folder.
        folder: where the weights were: the folder itself, or a checkpoint in it.
        model: the model, in evaluation mode, with a key-value cache.
        tokenizer: its tokenizer.
        base_given: folder or hub name of the base model, where the user has said it.
    """

    run: RunFolder
    folder: Path
    model: Any
    tokenizer: Any
    base_given: str | None = None
    _base: Any = field(default=None, repr=False)

    @property
    def has_adapters(self) -> bool:
        """Whether the run trained adapters, and the base model is inside of :attr:`model`."""
        return hasattr(self.model, "peft_config")

    @contextmanager
    def base(self) -> Iterator[Any]:
        """Return a context that gives the base model, as it was before the run.

        Raises:
            RunError: If it cannot be loaded.
        """
        if self.has_adapters:
            with self.model.disable_adapter():
                yield self.model
            return
        if self._base is None:
            self._base = _load(base_source(self.run, self.base_given), torch.float32, "base model")
        yield self._base


def load_run(path: str | Path, *, base: str | None = None, dtype: torch.dtype | None = None) -> RunModel:
    """Load what a run has trained.

    Args:
        path: folder of a run of ``opacus-ac finetune``, ``PrivateTrainer`` or the examples. Of an unfinished run the
            newest checkpoint is loaded.
        base: folder or hub name of the base model, where the run does not know it.
        dtype: type of the weights. The default is that of training: float32 for all weights; a base of adapters is in
            bfloat16 where the processor multiplies in it.

    Returns:
        The model in evaluation mode, on the GPU where there is one, with its tokenizer.

    Raises:
        RunError: If nothing was saved, the base model is not at hand, or it is no causal language model.
    """
    run = RunFolder.at(path)
    folder = run.model_folder()
    if is_adapter(folder):
        source = base_source(run, base)
        model = _with_adapters(_load(source, dtype or frozen_dtype(), f"base model {base_name(run)}"), folder)
    else:
        source = str(folder)
        model = _load(source, dtype or torch.float32, "model")
    return RunModel(run, folder, model, _tokenizer(folder, source), base)


def _load(source: str, dtype: torch.dtype, what: str) -> Any:
    """Return a causal language model.

    Raises:
        RunError: If there is none.
    """
    try:
        kinds = AutoConfig.from_pretrained(source).architectures or []
        if kinds and not any("CausalLM" in kind or "LMHead" in kind for kind in kinds):
            raise RunError(
                f"{source} holds a {kinds[0]}, which writes no text: load it with transformers, and evaluate it with "
                "PrivateTrainer.evaluate"
            )
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ModelUnavailableError) as error:
        raise RunError(f"the {what} cannot be loaded from {source}: {error}") from error
    model.config.use_cache = True
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _with_adapters(model: Any, folder: Path) -> Any:
    """Return the model with the adapters of a folder."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"the adapters of {folder} do not fit the base model: name the one that was trained with --base ({reason})"
        ) from error


def _tokenizer(folder: Path, source: str) -> Any:
    """Return the tokenizer that was saved with the weights, otherwise that of the base model."""
    for place in (str(folder), source):
        try:
            tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError):
            continue
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer
    raise RunError(
        f"{folder} has no tokenizer, and neither has its base model: pass processing_class=tokenizer to "
        f"PrivateTrainer, or save one there with tokenizer.save_pretrained({str(folder)!r})"
    )
