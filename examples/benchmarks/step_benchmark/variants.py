"""The ways to take a step, and one of them on a model, ready to be timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import opacus
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from opacus_ac import AutoAdam, PrivacyEngine
from opacus_ac.grad_sample import register_rules
from opacus_ac.loss import fused_causal_lm_loss
from step_benchmark.memory import MIB, release_memory, reset_peak, resident
from step_benchmark.shapes import Batch, Shape, new_batch, new_model

PLAIN = "plain"
NO_NOISE = "-no-noise"


@dataclass(frozen=True)
class Variant:
    """One way to take a step: ``engine`` is "", "opacus_ac" or "opacus"."""

    engine: str = ""
    mode: str = ""
    noise_multiplier: float = 1.0
    fused_loss: bool = False
    fused_step: bool = False
    onednn: bool = True
    """Whether oneDNN's products may be used where they are faster than torch's own."""
    ema: bool = False
    """Whether the average of the weights is kept, as ``make_private`` does unless it is told otherwise."""
    auto: bool = False
    """Whether the learning rate is found by ``AutoAdam``."""

    def ready(self, shape: Shape, options: Options) -> Any:
        """Return the variant on a model: a :class:`Trial`, or something with its methods."""
        return Trial(shape, self, options)


VARIANTS = {
    PLAIN: Variant(),
    "plain-fused-loss": Variant(fused_loss=True),
    "bk": Variant("opacus_ac", "bk"),
    "bk-defaults": Variant("opacus_ac", "bk", ema=True),
    "bk-auto": Variant("opacus_ac", "bk", auto=True),
    "bk-no-noise": Variant("opacus_ac", "bk", 0.0),
    "bk-without-onednn": Variant("opacus_ac", "bk", onednn=False),
    "bk-fused-loss": Variant("opacus_ac", "bk", fused_loss=True),
    "bk-fused-step": Variant("opacus_ac", "bk", fused_loss=True, fused_step=True),
    "bk-fused-step-no-noise": Variant("opacus_ac", "bk", 0.0, fused_loss=True, fused_step=True),
    "hooks": Variant("opacus_ac", "hooks"),
    "hooks-no-noise": Variant("opacus_ac", "hooks", 0.0),
    "opacus-hooks": Variant("opacus", "hooks"),
    "opacus-ghost": Variant("opacus", "ghost"),
}


def not_applicable(variant: str, shape: Shape) -> str:
    """Why a variant cannot run on a shape by its nature, or ""."""
    if variant == "opacus-ghost" and shape.tied and not shape.lora_rank and not shape.image:
        return "Opacus's ghost mode refuses tied weights"
    return ""


@dataclass(frozen=True)
class Options:
    """What every worker has to know."""

    threads: int = 2
    device: str = "cpu"
    autocast: bool = False
    ema: bool = False
    warmup: int = 4
    rounds: int = 9
    steps_per_round: int = 1
    memory_rounds: int = 3
    apart: bool = True
    """Whether each variant has a process of its own, which it never has on a GPU."""
    halve: bool = False
    """Whether a batch that does not fit into memory is halved, at twice as many parts of a step."""
    count_syncs: bool = False
    """Whether it is counted how often a step waits for the GPU."""
    seconds: float = math.inf
    """Seconds after which no further round begins."""


class Trial:
    """One variant of one shape, ready to take steps."""

    def __init__(self, shape: Shape, variant: Variant, options: Options) -> None:
        self.options = options
        self.before = torch.cuda.memory_allocated() if options.device == "cuda" else 0
        self.batches = [new_batch(shape, options.device, seed) for seed in range(shape.parts)]
        self.batch = self.batches[0]
        self.model: Any = new_model(shape, options.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.counts = (sum(p.numel() for p in self.parameters), sum(p.numel() for p in self.model.parameters()))
        self.optimizer: Any = (
            AutoAdam(self.parameters, lr=1e-6, steps=100)
            if variant.auto
            else torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        )
        self.loss: Callable[[], Any] = (
            self._fused_loss if variant.fused_loss and not shape.image else self._library_loss
        )
        self.private = bool(variant.engine)
        if variant.engine == "opacus_ac":
            self._make_private(shape, variant)
        elif variant.engine == "opacus":
            self._make_private_by_opacus(shape, variant)

    def _library_loss(self) -> Tensor:
        result: Tensor = self.model(**self.batch).loss
        return result

    def _fused_loss(self) -> Tensor:
        logits = self.model(input_ids=self.batch["input_ids"]).logits
        result: Tensor = fused_causal_lm_loss(logits, self.batch["labels"]).mean()
        return result

    def _ghost_loss(self) -> Any:
        if "pixel_values" in self.batch:
            return self.criterion(self.model(pixel_values=self.batch["pixel_values"]).logits, self.batch["labels"])
        logits = self.model(input_ids=self.batch["input_ids"]).logits[:, :-1]
        labels = self.batch["labels"][:, 1:]
        return self.criterion(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), shape=logits.shape)

    def _loader(self, shape: Shape) -> DataLoader[Batch]:
        rows: Any = [{"input_ids": torch.zeros(shape.length, dtype=torch.long)}] * (100 * shape.records)
        return DataLoader(rows, batch_size=shape.records)

    def _make_private(self, shape: Shape, variant: Variant) -> None:
        arguments: dict[str, Any] = {"ema_decay": 0.999 if self.options.ema or variant.ema else None}
        if variant.fused_step:
            arguments["fused_step"] = True
        self.model, self.optimizer, _ = PrivacyEngine().make_private(
            module=self.model,
            optimizer=self.optimizer,
            data_loader=self._loader(shape),
            noise_multiplier=variant.noise_multiplier,
            grad_sample_mode=variant.mode,
            **arguments,
        )
        self.optimizer.plan = None  # steps are taken by hand, without the loader

    def _make_private_by_opacus(self, shape: Shape, variant: Variant) -> None:
        register_rules(self.model)
        made = opacus.PrivacyEngine().make_private(
            module=self.model,
            optimizer=self.optimizer,
            criterion=nn.CrossEntropyLoss(),
            data_loader=self._loader(shape),
            noise_multiplier=variant.noise_multiplier,
            max_grad_norm=1.0,
            grad_sample_mode=variant.mode,
        )
        self.model, self.optimizer = made[:2]
        if variant.mode == "ghost":
            self.criterion = made[2]
            self.loss = self._ghost_loss

    def step(self) -> Any:
        """Take one step, of one batch or several, and free the gradients; return the loss of the first batch."""
        first, parts = None, len(self.batches)
        for number, batch in enumerate(self.batches, start=1):
            self.batch = batch
            if self.private and parts > 1:
                self.optimizer.signal_skip_step(do_skip=number < parts)
            with torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.autocast):
                value = self.loss()
            (value if self.private or parts == 1 else value / parts).backward()
            first = value if first is None else first
            if self.private or number == parts:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        return first

    def synchronize(self) -> None:
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def warm_up(self) -> float:
        """Take the first steps and return the loss before them.

        Raises:
            RuntimeError: the last one left the weights as they were, so that it was no whole step.
        """
        first = float(self.step().item())
        for _ in range(self.options.warmup - 2):
            self.step()
        before = [p.detach().reshape(-1)[:64].clone() for p in self.parameters]
        self.step()
        if all(torch.equal(b, p.detach().reshape(-1)[:64]) for b, p in zip(before, self.parameters, strict=True)):
            raise RuntimeError("the last warm-up step did not move the weights: take more of them (--warmup)")
        self.note_own_memory()
        return first

    def note_own_memory(self) -> None:
        """Note what this variant keeps between steps."""
        if self.options.device == "cuda":
            self.synchronize()
            self.own = (torch.cuda.memory_allocated() - self.before) / MIB

    def time(self, steps: int) -> float:
        """Return the seconds that a step took."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.synchronize()
        return (time.perf_counter() - start) / steps

    def memory(self) -> tuple[float, float]:
        """Return the peak of one step above the level between steps, and that level, in MiB; nan where unknown."""
        release_memory()
        if self.options.device == "cuda":
            self.synchronize()
            torch.cuda.reset_peak_memory_stats()
            level = torch.cuda.memory_allocated()
            self.step()
            self.synchronize()
            return (torch.cuda.max_memory_allocated() - level) / MIB, self.own
        if not reset_peak():
            return math.nan, resident("VmRSS")
        level = resident("VmRSS")
        self.step()
        return resident("VmHWM") - level, level
