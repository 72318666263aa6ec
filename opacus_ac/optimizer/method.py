"""A method of training: how records are measured, and how a release moves the weights."""

from __future__ import annotations

from torch.optim import Optimizer

from opacus_ac.grad_sample.opacus_hooks import PerSampleSource
from opacus_ac.grad_sample.source import GradientSource
from opacus_ac.optimizer.measurement import Measurement
from opacus_ac.optimizer.update import GradientUpdate, Update

Method = tuple[Measurement, Update]
"""The private half and the public half of a step, which meet in a release."""


def by_gradients(inner: Optimizer, source: GradientSource | None = None, loss_reduction: str = "mean") -> Method:
    """Return the method of a backward pass.

    Args:
        inner: the optimizer over the trained weights.
        source: where per-sample gradients come from; None for Opacus's ``grad_sample``.
        loss_reduction: "mean" or "sum" of the records' losses, as the loss is computed.
    """
    trained = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
    source = source or PerSampleSource(trained, loss_reduction=loss_reduction)
    return Measurement(source, trained), GradientUpdate(inner)
