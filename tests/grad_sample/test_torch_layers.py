"""Layers of torch without a rule of their own, in mode "bk": a step is that of a loop over single records."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import Rows
from opacus.validators.errors import UnsupportedModuleError
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample.checks import coupled, exactness

RECORDS, D, H = 5, 4, 6
BOUND = 0.3

Use = Callable[[nn.Module, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, part: nn.Module, use: Use, width: int) -> None:
        super().__init__()
        self.part, self.use, self.head = part, use, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self.part, x))


def over_time(cell: nn.Module, x: Tensor) -> Tensor:
    state = None
    for t in range(x.shape[1]):
        state = cell(x[:, t]) if state is None else cell(x[:, t], state)
    return state[0] if isinstance(state, tuple) else state


def last(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0][:, -1]


def last_of_time_first(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.transpose(0, 1))[0][-1]


def state_of(layer: nn.Module, x: Tensor) -> Tensor:
    state = layer(x)[1]
    return (state[0] if isinstance(state, tuple) else state)[-1]


def outputs_and_state(layer: nn.Module, x: Tensor) -> Tensor:
    outputs, (state, memory) = layer(x.transpose(0, 1))
    return outputs.mean(0) + state[-1] * memory[0]


def from_a_state(layer: nn.Module, x: Tensor) -> Tensor:
    start = x[:, :, :1].mean(1).expand(len(x), H).unsqueeze(0).contiguous()
    return layer(x, start)[0].mean(1)


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x)[0].mean(1)


def attend_time_first(layer: nn.Module, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return layer(x, x, x)[0].mean(0)


def attention_and_weights(layer: nn.Module, x: Tensor) -> Tensor:
    found, weights = layer(x.transpose(0, 1), x.transpose(0, 1), x.transpose(0, 1))
    return found.mean(0) * weights.pow(2).sum((1, 2)).unsqueeze(1)


def attend_causally(layer: nn.Module, x: Tensor) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return layer(x, x, x, attn_mask=mask, need_weights=False)[0].mean(1)


def attend_to_some(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, key_padding_mask=x[:, :, 0] > 0.8)[0].mean(1)


def mean_over_time(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).mean(1)


def pair(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x[:, 0], x[:, 1])


LAYERS: dict[str, tuple[Callable[[], nn.Module], Use, int]] = {
    "RNNCell": (lambda: nn.RNNCell(D, H), over_time, H),
    "GRUCell": (lambda: nn.GRUCell(D, H), over_time, H),
    "LSTMCell": (lambda: nn.LSTMCell(D, H), over_time, H),
    "RNN": (lambda: nn.RNN(D, H, batch_first=True), last, H),
    "RNN, its state": (lambda: nn.RNN(D, H, batch_first=True), state_of, H),
    "RNN from a state": (lambda: nn.RNN(D, H, batch_first=True), from_a_state, H),
    "GRU, time first": (lambda: nn.GRU(D, H), last_of_time_first, H),
    "GRU from a state": (lambda: nn.GRU(D, H, batch_first=True), from_a_state, H),
    "LSTM, its state": (lambda: nn.LSTM(D, H, batch_first=True), state_of, H),
    "LSTM, all it returns": (lambda: nn.LSTM(D, H), outputs_and_state, H),
    "LSTM of two layers and ways": (lambda: nn.LSTM(D, H, 2, bidirectional=True, batch_first=True), last, 2 * H),
    "attention": (lambda: nn.MultiheadAttention(D, 2, batch_first=True), attend, D),
    "attention, time first": (lambda: nn.MultiheadAttention(D, 2), attend_time_first, D),
    "attention and its weights": (lambda: nn.MultiheadAttention(D, 2), attention_and_weights, D),
    "causal attention": (lambda: nn.MultiheadAttention(D, 2, batch_first=True), attend_causally, D),
    "attention with padding": (lambda: nn.MultiheadAttention(D, 2, add_bias_kv=True, batch_first=True), attend_to_some, D),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True), mean_over_time, D),
    "transformer": (
        lambda: nn.Transformer(D, 2, 1, 1, 8, 0.0, batch_first=True), lambda layer, x: layer(x, x.flip(1)).mean(1), D,
    ),
    "Bilinear": (lambda: nn.Bilinear(D, D, H), pair, H),
    "PReLU": (lambda: nn.PReLU(), mean_over_time, D),
    "PReLU of channels": (lambda: nn.Sequential(nn.Conv1d(7, 3, 2), nn.PReLU(3)), lambda layer, x: layer(x).mean(2), 3),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, H)), mean_over_time, H),
    "adaptive softmax": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(D, 8, [3, 5]), lambda layer, x: layer.log_prob(x[:, 0]), 8,
    ),
}  # fmt: skip


def rows(length: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"x": torch.randn(length, D, generator=generator, dtype=torch.float64), "y": torch.tensor(i % 2)}
        for i in range(RECORDS)
    ]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def private(model: nn.Module, data: list[dict[str, Tensor]], mode: str = "bk") -> tuple:
    return PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(Rows(data), batch_size=len(data)),
        noise_multiplier=0.0,
        max_grad_norm=BOUND,
        clipping="flat",
        ema_decay=None,
        grad_sample_mode=mode,
    )


def take(model: nn.Module, optimizer: torch.optim.Optimizer, batches: DataLoader) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch["x"], batch["y"]).backward()
        optimizer.step()


def check_step(model: nn.Module, data: list[dict[str, Tensor]], mode: str = "bk") -> None:
    want = 0.0
    for row in data:
        gradients = torch.autograd.grad(loss(model, row["x"][None], row["y"][None]), list(model.parameters()),
                                        allow_unused=True, materialize_grads=True)  # fmt: skip
        flat = torch.cat([g.flatten() for g in gradients])
        want = want + flat * min(1.0, BOUND / float(flat.norm()))
    before = [p.detach().clone() for p in model.parameters()]
    take(*private(model, data, mode))
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    torch.testing.assert_close(moved, want / len(data), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("length", [7, RECORDS], ids=["", "as many steps as records"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_is_that_of_a_loop_over_single_records(name: str, length: int) -> None:
    build, use, width = LAYERS[name]
    if length != 7 and name == "PReLU of channels":
        pytest.skip("its channels are seven")
    torch.manual_seed(0)
    check_step(Net(build(), use, width).double(), rows(length))


def packed(layer: nn.Module, x: Tensor) -> Tensor:
    lengths = [7, 2, 5, 3, 6][: len(x)]
    return layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1][0][-1]


REFUSED: dict[str, tuple[Callable[[], nn.Module], Use, int, str]] = {
    "packed sequences": (lambda: nn.LSTM(D, H, batch_first=True), packed, H, "records"),
    "a norm of time first": (
        lambda: nn.TransformerEncoderLayer(D, 2, 8, 0.0), lambda layer, x: layer(x.transpose(0, 1)).mean(0), D, "records",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_is_refused(name: str) -> None:
    build, use, width, words = REFUSED[name]
    torch.manual_seed(0)
    model, optimizer, batches = private(Net(build(), use, width).double(), rows(7))
    with pytest.raises(ValueError, match=words):
        take(model, optimizer, batches)
    assert optimizer.steps_taken == 0


class Scaled(nn.Module):
    """Computes with a parameter of its own, and never calls its dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.randn(D)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class DropsByName(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.drops = nn.ModuleList([nn.Dropout(0.5)])

    def forward(self, x: Tensor) -> Tensor:
        return self.drops[0](super().forward(x))


class DropsInASequence(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.ModuleDict({"first": nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5), nn.Tanh())})

    def forward(self, x: Tensor) -> Tensor:
        return self.inside["first"](super().forward(x))


def without_dropout(layer: nn.Module) -> None:
    for part in layer.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention | nn.LSTM):
            part.dropout = 0.0


def keep_vectors(layer: nn.Module) -> None:
    layer.parametrizations.weight[0].eval()


def remove_norm(layer: nn.Module) -> None:
    nn.utils.parametrize.remove_parametrizations(layer, "weight")


def spectral() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Linear(D, H))


class Early(NamedTuple):
    """A layer that is refused by make_private, and what the message says to do about it."""

    build: Callable[[], nn.Module]
    use: Use
    width: int
    said: str
    at_the_batch: str
    ways_out: tuple[Callable[[nn.Module], object], ...]


EARLY = {
    "dropout in attention": Early(
        lambda: nn.MultiheadAttention(D, 2, 0.5, batch_first=True), attend, D, "part .*drops other values each time",
        "it is random", (without_dropout,),
    ),
    "dropout in an encoder layer": Early(
        lambda: nn.TransformerEncoderLayer(D, 2, 8, batch_first=True), mean_over_time, D,
        r"part.self_attn \(Multihead.*\(dropout=0.1\)", "it is random", (without_dropout,),
    ),
    "dropout between layers": Early(
        lambda: nn.LSTM(D, H, 2, dropout=0.5, batch_first=True), last, H, r"LSTM drops .*\(dropout=0.5\)", "it is random",
        (without_dropout,),
    ),
    "dropout by its name": Early(
        DropsByName, mean_over_time, D, r"drops.0 drops .*\(p=0.5\)", "it is random",
        (without_dropout, lambda layer: layer.drops.eval()),
    ),
    "dropout in a sequence": Early(
        DropsInASequence, mean_over_time, D, r"inside.first.1 drops", "it is random", (without_dropout,),
    ),
    "spectral norm": Early(
        spectral, mean_over_time, H, "moves its vectors by a power iteration", "changes its buffers",
        (keep_vectors, remove_norm),
    ),
    "spectral norm, the old one": Early(
        lambda: nn.utils.spectral_norm(nn.Linear(D, H)), mean_over_time, H, "moves its vectors by a power iteration",
        "layer with buffers", (nn.utils.remove_spectral_norm,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EARLY)
def test_what_would_be_refused_at_the_first_batch_is_refused_by_make_private(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = EARLY[name]
    torch.manual_seed(0)
    model = Net(case.build(), case.use, case.width).double()
    with pytest.raises(ValueError, match=case.said):
        private(model, rows(7))
    for check in (coupled, "_power_iteration"), (exactness, "random_part"):
        monkeypatch.setattr(*check, lambda module: None)
    with pytest.raises(ValueError, match=case.at_the_batch):  # so the check is about what is so
        take(*private(model, rows(7)))


@pytest.mark.parametrize(
    ("name", "way", "mode"),
    [(name, way, "bk") for name, case in EARLY.items() for way in range(len(case.ways_out))]
    + [("spectral norm", 1, "hooks"), ("spectral norm, the old one", 0, "hooks")],
)
def test_what_make_private_says_to_do_is_a_way_out(name: str, way: int, mode: str) -> None:
    case = EARLY[name]
    torch.manual_seed(0)
    model = Net(case.build(), case.use, case.width).double()
    case.ways_out[way](model.part)
    check_step(model, rows(7), mode)


def test_dropout_that_is_never_called_is_no_reason() -> None:
    torch.manual_seed(0)
    check_step(Net(Scaled(), mean_over_time, D).double(), rows(7))


def test_modes_of_opacus_refuse_layers_that_opacus_replaces() -> None:
    with pytest.raises(UnsupportedModuleError, match=r"do not support nn\.LSTM"):
        private(Net(nn.LSTM(D, H, batch_first=True), last, H).double(), rows(7), "hooks")
    with pytest.raises(UnsupportedModuleError, match="BatchNorm"):
        private(Net(nn.Sequential(nn.BatchNorm1d(7), nn.LSTM(D, H, batch_first=True)), last, H).double(), rows(7))
