"""Small classification tasks; in some of them canaries (chosen records) have an input feature that no other has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.release.values import FloatArray
from opacus_ac.testing import per_sample_gradients


class Task:
    """Data, model and loss of an audit.

    Args:
        inputs: one row per record.
        targets: class of each record, or what its outputs should be.
        model: makes the model, the same at each call, in training mode.
        canaries: indices of the records that an audit is about.
        public_randomness: the model's forward pass draws numbers, so that equal batches need not have equal gradients.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        model: Callable[[], nn.Module],
        canaries: Sequence[int],
        *,
        public_randomness: bool = False,
    ) -> None:
        # Numbers from 1: the stand-in for an empty batch is all zeros and must not pass for a record.
        self.dataset = TensorDataset(torch.arange(1, len(inputs) + 1), inputs, targets)
        self.size = len(inputs)
        self.canaries = list(canaries)
        self.model = model
        self.public_randomness = public_randomness

    def loader(self, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
        """Return an ordinary loader, as a user would pass it to ``make_private``."""
        return DataLoader(self.dataset, batch_size=batch_size)

    def losses(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the loss of each record, ``[B]``: cross entropy for class targets, else half the squared error."""
        _, inputs, targets = batch
        if targets.is_floating_point():
            return (model(inputs) - targets).square().flatten(1).sum(1) / 2
        return F.cross_entropy(model(inputs), targets, reduction="none")

    def backward(self, model: nn.Module, batch: tuple[Tensor, ...], optimizer: AdaptiveClipDPOptimizer) -> None:
        """Do what a user's loop does before ``optimizer.step()``."""
        optimizer.zero_grad()
        losses = self.losses(model, batch)
        if optimizer.statistics.loss_bound is not None:
            optimizer.record_losses(losses)
        (losses.mean() if optimizer.loss_reduction == "mean" else losses.sum()).backward()

    def step(self, model: nn.Module, batch: tuple[Tensor, ...], optimizer: AdaptiveClipDPOptimizer) -> None:
        """Do what a user's loop does with a batch, whatever the method of the optimizer."""
        if optimizer.forward_only:
            optimizer.step(lambda: self.losses(model, batch))
        else:
            self.backward(model, batch, optimizer)
            optimizer.step()

    @staticmethod
    def members(batch: tuple[Tensor, ...]) -> npt.NDArray[np.int64]:
        """Return the indices of the records in a batch, without the stand-in for an empty one."""
        numbers = batch[0].numpy()
        return np.asarray(numbers[numbers > 0] - 1, dtype=np.int64)

    def gradients(self) -> dict[str, FloatArray]:
        """Return every record's gradient at the initial weights, ``{name: [size, numel]}``, from the batch-1 loop."""
        grads = per_sample_gradients(self.model(), self.dataset.tensors, lambda m, batch: self.losses(m, batch).sum())
        return {name: g.flatten(1).double().numpy() for name, g in grads.items()}


class CanaryTask(Task):
    """A task with canaries that are made to be seen.

    The last ``canaries`` records are canaries: canary ``j`` has the value ``strength`` in the input feature ``j`` that
    only it uses, and zeros elsewhere. Its gradient lies, up to 1 / strength, in the weights behind this feature, where
    every other record's gradient is exactly zero; those weights start at zero, so the canary's output is ordinary.

    Args:
        records: ordinary records.
        canaries: canaries beside them.
        strength: size of the canaries' feature; their gradients are of this order, so that any usual C clips them.
        seed: seed of data and weights.
        features: input features of the ordinary records.
        hidden: width of the hidden layer.
        classes: number of classes.
    """

    def __init__(
        self,
        records: int = 63,
        canaries: int = 1,
        *,
        strength: float = 1e6,
        seed: int = 0,
        features: int = 6,
        hidden: int = 8,
        classes: int = 3,
    ) -> None:
        if records < 1 or canaries < 0:
            raise ValueError(f"an audit needs records >= 1 and canaries >= 0, got {records} and {canaries}")
        generator = torch.Generator().manual_seed(seed)
        size, width = records + canaries, features + canaries
        inputs = torch.zeros(size, width)
        inputs[:records, :features] = torch.randn(records, features, generator=generator)
        for j in range(canaries):
            inputs[records + j, features + j] = strength
        targets = torch.randint(0, classes, (size,), generator=generator)
        self._weights = [
            torch.cat([torch.randn(hidden, features, generator=generator), torch.zeros(hidden, canaries)], 1) / 2,
            torch.randn(hidden, generator=generator) / 2,
            torch.randn(classes, hidden, generator=generator) / 2,
            torch.randn(classes, generator=generator) / 2,
        ]
        super().__init__(inputs, targets, self._model, range(records, size))

    def _model(self) -> nn.Module:
        """Return a new model with the task's initial weights."""
        hidden, width = self._weights[0].shape
        model = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, self._weights[2].shape[0]))
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), self._weights, strict=True):
                parameter.copy_(weight)
        return model


def endless(loader: DataLoader[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches of pass after pass."""
    while True:
        yield from loader
