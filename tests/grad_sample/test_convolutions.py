"""Convolutions: every padding mode, stride, group and memory format, in every mode, against a loop over records."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opacus_ac.grad_sample import register_rules
from opacus_ac.testing import hooks_gradients, one_backward, per_sample_gradients, worst_error

LAYOUTS: dict[str, Any] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "last two swapped": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "records last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}
LAYERS: dict[str, Any] = {
    "1d": lambda mode: nn.Conv1d(4, 6, 3, padding=2, stride=2, padding_mode=mode),
    "1d same": lambda mode: nn.Conv1d(4, 6, 4, padding="same", padding_mode=mode),
    "2d": lambda mode: nn.Conv2d(4, 6, (3, 2), padding=(1, 2), stride=(2, 1), padding_mode=mode),
    "2d groups": lambda mode: nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False, padding_mode=mode),
    "2d dilated, same": lambda mode: nn.Conv2d(4, 3, 2, padding="same", dilation=2, padding_mode=mode),
    "3d": lambda mode: nn.Conv3d(4, 3, 2, padding=1, stride=(1, 2, 1), padding_mode=mode),
}


class Net(nn.Module):
    """A layer before the convolution, whose output has any memory format."""

    def __init__(self, layer: nn.Module, layout: Any) -> None:
        super().__init__()
        self.before, self.layer, self.layout = nn.Linear(5, 5), layer, layout

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layout(self.before(x)))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1).mean()


def case(name: str, mode: str, layout: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    dims = int(name[0])
    x = torch.randn(3, 4, *(6,) * (dims - 1), 5, dtype=torch.float64)
    return Net(LAYERS[name](mode), LAYOUTS[layout]).double().train(), x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions_are_exact(name: str, mode: str, layout: str) -> None:
    model, x = case(name, mode, layout)
    want = per_sample_gradients(model, x, loss)
    weights = torch.rand(len(x), dtype=torch.float64)
    _, sums = one_backward(model, x, loss, weights)
    for parameter, total in sums.items():
        expected = torch.einsum("i,i...->...", weights, want[parameter])
        torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    register_rules(model)
    error, worst = worst_error(hooks_gradients(model, x, loss), want)
    assert error < 1e-9, worst
