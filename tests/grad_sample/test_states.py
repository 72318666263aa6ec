"""Modules without a rule that keep states as plain attributes, and that get rows ``[B T, ...]`` beside records."""

import copy

import pytest
import torch
from torch import Tensor, nn

from opacus_ac.testing import check_norms, one_backward, per_sample_gradients, worst_error

D, EXPERTS = 4, 3


class Recurrent(nn.Module):
    """Adds up its inputs in a state, which the module around it sets before each call."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.weight, self.first, self.state = nn.Parameter(torch.randn(D, D) / D), first, None

    def reset(self, x: Tensor) -> None:
        if self.first == "absent":
            vars(self).pop("state", None)
        else:
            self.state = None if self.first == "none" else x[:, 0] * 0.5

    def forward(self, x: Tensor) -> Tensor:
        state = getattr(self, "state", None)
        state = torch.zeros_like(x[:, 0]) if state is None else state
        out = []
        for t in range(x.shape[1]):
            state = torch.tanh(state @ self.weight + x[:, t])
            out.append(state)
        self.state = state
        return torch.stack(out, 1)


class Returning(Recurrent):
    """Returns its last state beside its output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = super().forward(x)
        return out, out[:, -1]


class Scored(nn.Module):
    """Weights the outputs of its experts by scores ``[B T, E]``, which come beside states ``[B, T, d]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(EXPERTS, D, D) / D)

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        rows = x.reshape(1, -1, D).expand(EXPERTS, -1, -1)
        return (torch.bmm(rows, self.stack).tanh() * scores.T[:, :, None]).sum(0).view_as(x)


class Wide(Scored):
    """Gets a table ``[B T, ...]`` that has nothing to do with records."""

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x @ self.stack[0] * table.sum()


class Model(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.router, self.block = nn.Linear(D, D), nn.Linear(D, EXPERTS), block

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if isinstance(self.block, Scored):
            scores = torch.linspace(0, 1, len(x) * x.shape[1], dtype=x.dtype)[:, None].expand(-1, EXPERTS).contiguous()
            return self.block(x, scores)
        self.block.reset(x)
        out = self.block(x)
        return out[0] + out[1][:, None] if isinstance(out, tuple) else out


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum((1, 2)).mean()


@pytest.mark.parametrize("first", ["none", "absent", "tensor"])
@pytest.mark.parametrize("kind", [Recurrent, Returning])
def test_a_second_run_begins_with_the_states_of_the_first(kind: type[Recurrent], first: str) -> None:
    torch.manual_seed(0)
    model = Model(kind(first)).double().train()
    alone = copy.deepcopy(model)
    for records in (5, 3):
        batch = torch.randn(records, 6, D, dtype=torch.float64)
        want = per_sample_gradients(alone, batch, loss)
        norms, sums = one_backward(model, batch, loss)
        check_norms(norms, want, rtol=1e-9)
        assert worst_error(sums, {n: w.sum(0) for n, w in want.items()})[0] < 1e-9


class Routed(Model):
    """Computes the scores from the rows, as a router does."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.block(x, x.reshape(-1, D)[:, :EXPERTS].softmax(-1))


def test_rows_beside_records_are_taken_apart() -> None:
    torch.manual_seed(0)
    for length in (6, 5):  # of records and positions one number, too
        model = Routed(Scored()).double().train()
        model.router.requires_grad_(False)
        batch = torch.randn(5, length, D, dtype=torch.float64)
        want = per_sample_gradients(copy.deepcopy(model), batch, loss)
        norms, sums = one_backward(model, batch, loss)
        check_norms(norms, want, rtol=1e-9)
        assert worst_error(sums, {n: w.sum(0) for n, w in want.items()})[0] < 1e-9


def test_a_table_as_long_as_the_rows_is_whole() -> None:
    torch.manual_seed(0)
    model = Model(Wide()).double().train()
    model.router.requires_grad_(False)
    batch = torch.randn(5, 6, D, dtype=torch.float64)
    norms, _ = one_backward(copy.deepcopy(model), batch, loss)
    table = torch.linspace(0, 1, 30, dtype=torch.float64).sum() * EXPERTS

    def alone(model: nn.Module, x: Tensor) -> Tensor:
        return (model.first(x) @ model.block.stack[0] * table).square().sum((1, 2)).mean()

    check_norms(norms, per_sample_gradients(model, batch, alone), rtol=1e-9)
