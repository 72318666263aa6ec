"""One call of a model in a forward pass, with the records of its batch that are run alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from opacus_ac.grad_sample.alone.positions import part_of_output, take_call
from opacus_ac.grad_sample.alone.single import Cut, Paths
from opacus_ac.noise.record_masks import RecordMasks


@dataclass
class Run:
    """One record that was run alone."""

    cut: Cut
    outputs: Paths


@dataclass
class Call:
    """One call of the model, or of a part of it, in a training forward pass."""

    path: str
    module: nn.Module
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    rows: int
    users: int
    cuts: list[Cut]
    runs: list[Run] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    """Inputs of each record that is to be run alone; empty afterwards."""
    padded_inputs: list[Any] = field(default_factory=list)
    """Inputs with padding, of the records whose ``inputs`` are without padding."""
    gradients: Paths = field(default_factory=dict)
    outputs: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    masks: RecordMasks | None = None
    coarse: bool = False
    why: str = ""
    autocast: Any = None

    @property
    def reached(self) -> bool:
        """Whether the output of the call got a gradient."""
        return bool(self.gradients)

    @property
    def is_trimmed(self) -> bool:
        """Whether a record is to be run without its padding."""
        return any(cut.positions for cut in self.cuts)

    def take_records(self) -> None:
        """Copy the records that are to be run alone. The model may change its arguments later."""
        self.runs = [Run(cut, {}) for cut in self.cuts]
        self.inputs = [take_call(cut, self.arguments) for cut in self.cuts]
        self.padded_inputs = [take_call(cut.padded(), self.arguments) for cut in self.cuts if cut.positions]

    def keep_padding(self) -> None:
        """Let all records be run with their padding."""
        padded = iter(self.padded_inputs)
        self.inputs = [
            next(padded) if cut.positions else given for cut, given in zip(self.cuts, self.inputs, strict=True)
        ]
        self.cuts = [cut.padded() for cut in self.cuts]

    def give_up(self, why: str) -> None:
        """Run no record alone, for a reason that the warning will state."""
        self.cuts, self.runs, self.inputs, self.padded_inputs = [], [], [], []
        self.why = why

    def loss_of(self, cut: Cut, outputs: Paths, mean: bool) -> Any:
        """Return a scalar with the gradient of a record's loss: its outputs times the gradients of the outputs.

        Args:
            cut: the rows of the record.
            outputs: outputs of the model for the record alone.
            mean: whether a loss that the model returns is a mean over records.
        """
        total: Any = 0.0
        for path, gradient in self.gradients.items():
            own = outputs.get(path)
            if own is None:
                continue
            if own.dim() == 0 or own.numel() == 1 == gradient.numel():
                share = 1 / self.users if mean else 1.0
                total = total + (own * gradient.to(own.dtype)).sum() * share
                continue
            part = self._part_of(gradient, cut)
            if part is None or part.shape != own.shape:
                continue
            total = total + (own * part.to(own.dtype)).sum()
        return total

    def _part_of(self, gradient: Tensor, cut: Cut) -> Tensor | None:
        """Return a record's part of the gradient of an output ``[B, ...]`` or ``[B T, ...]``; None without a part."""
        if gradient.dim() <= cut.dim or gradient.shape[cut.dim] % self.rows:
            return None
        if gradient.shape[cut.dim] == self.rows:
            return part_of_output(cut, gradient, self.arguments)
        each = gradient.shape[cut.dim] // self.rows
        part = gradient.narrow(cut.dim, cut.first * each, cut.count * each)
        if cut.positions is None or cut.positions[2] != each:
            return part
        return part.narrow(cut.dim, cut.positions[0], cut.positions[1] - cut.positions[0])
