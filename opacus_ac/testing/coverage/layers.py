"""Layers and small nets of plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from opacus_ac.testing.coverage.case import Case
from opacus_ac.testing.coverage.tiny import prepared

RECORDS, LENGTH, WIDTH = 6, 5, 8


class _First(nn.Module):
    """The first of what a layer returns: the states of a recurrent layer, the output of attention."""

    def __init__(self, layer: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(*[x] * self.times)
        return found[0] if isinstance(found, tuple) else found


class _Scale(nn.Module):
    """A parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Tied(nn.Module):
    """A layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class _ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 6, 3)
        self.layer.weight.data = self.layer.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(memory_format=torch.channels_last))


def _vectors() -> Tensor:
    return _random(RECORDS, WIDTH)


def _sequences() -> Tensor:
    return _random(RECORDS, LENGTH, WIDTH)


def _channels(dimensions: int) -> Callable[[], Tensor]:
    return lambda: _random(RECORDS, 4, *[7] * dimensions)


def _ids() -> Tensor:
    return torch.randint(0, 9, (RECORDS, LENGTH), generator=torch.Generator().manual_seed(2))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


#: Name -> the layer, and its input.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "Linear": (lambda: nn.Linear(WIDTH, 3), _vectors),
    "Linear, no bias": (lambda: nn.Linear(WIDTH, 3, bias=False), _vectors),
    "Linear on sequences": (lambda: nn.Linear(WIDTH, 3), _sequences),
    "Linear used twice": (_Tied, _sequences),
    "Bilinear": (lambda: _First(nn.Bilinear(WIDTH, WIDTH, 3), 2), _vectors),
    "a parameter of a module": (_Scale, _sequences),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), _channels(1)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), _channels(2)),
    "Conv2d, stride, dilation, groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2), _channels(2)),
    "Conv2d, padding same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), _channels(2)),
    "Conv2d, padding circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), _channels(2)),
    "Conv2d, padding reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), _channels(2)),
    "Conv2d, channels last": (_ChannelsLast, _channels(2)),
    "Conv3d": (lambda: nn.Conv3d(4, 3, 3), _channels(3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), _channels(1)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), _channels(2)),
    "Embedding": (lambda: nn.Embedding(9, WIDTH), _ids),
    "Embedding, padding_idx": (lambda: nn.Embedding(9, WIDTH, padding_idx=0), _ids),
    "Embedding, scale_grad_by_freq": (lambda: nn.Embedding(9, WIDTH, scale_grad_by_freq=True), _ids),
    "Embedding, max_norm": (lambda: nn.Embedding(9, WIDTH, max_norm=1.0), _ids),
    "Embedding, sparse": (lambda: nn.Embedding(9, WIDTH, sparse=True), _ids),
    "EmbeddingBag, sum": (lambda: nn.EmbeddingBag(9, WIDTH, mode="sum"), _ids),
    "EmbeddingBag, mean": (lambda: nn.EmbeddingBag(9, WIDTH, mode="mean"), _ids),
    "EmbeddingBag, max": (lambda: nn.EmbeddingBag(9, WIDTH, mode="max"), _ids),
    "LayerNorm": (lambda: nn.LayerNorm(WIDTH), _sequences),
    "LayerNorm, no bias": (lambda: nn.LayerNorm(WIDTH, bias=False), _sequences),
    "RMSNorm": (lambda: nn.RMSNorm(WIDTH), _sequences),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), _channels(2)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), _channels(1)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), _channels(2)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(WIDTH), _vectors),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), _channels(2)),
    "PReLU": (lambda: nn.PReLU(WIDTH), _vectors),
    "MultiheadAttention": (lambda: _First(nn.MultiheadAttention(WIDTH, 2, batch_first=True), 3), _sequences),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True),
        _sequences,
    ),
    "TransformerDecoderLayer": (
        lambda: _First(nn.TransformerDecoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True), 2),
        _sequences,
    ),
    "RNN": (lambda: _First(nn.RNN(WIDTH, 6, batch_first=True)), _sequences),
    "GRU": (lambda: _First(nn.GRU(WIDTH, 6, batch_first=True)), _sequences),
    "LSTM": (lambda: _First(nn.LSTM(WIDTH, 6, batch_first=True)), _sequences),
    "RNNCell": (lambda: nn.RNNCell(WIDTH, 6), _vectors),
    "GRUCell": (lambda: nn.GRUCell(WIDTH, 6), _vectors),
    "LSTMCell": (lambda: _First(nn.LSTMCell(WIDTH, 6)), _vectors),
    "weight_norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 3)), _vectors),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 3)), _vectors),
}


def _cubic(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A mean over records whose gradient at the output differs at every place and grows with the record."""
    output: Tensor = model(batch["x"])
    return output.pow(3).flatten(1).sum(1).mean()


def _model(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    layer, values = LAYERS[name]
    return prepared(nn.Sequential(layer())), [{"x": record} for record in values()]


def cases() -> Iterator[Case]:
    """Yield a case per layer."""
    for name in LAYERS:
        yield Case(name, partial(_model, name), _cubic)
