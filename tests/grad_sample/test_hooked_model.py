"""Errors inside of Opacus's hooks: they name the layer and a way out, and nothing is released."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine


class KeywordsOnly(nn.Module):
    """A layer with a parameter of its own, which is called without positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, *, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), KeywordsOnly()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x=self.first(x))


class SharedBias(nn.Module):
    """The head of BERT: its bias is also that of the layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(4, 4)
        self.bias = self.decoder.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        y += 1
        return y


class OwnMistake(InPlace):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("my own mistake")


def one_step(model: nn.Module, mode: str, **options: object) -> tuple[PrivacyEngine, list[torch.Tensor]]:
    """Take a step, and return the engine and the weights of before."""
    engine = PrivacyEngine()
    before = [p.detach().clone() for p in model.parameters()]
    rows = [torch.randn(4) for _ in range(6)]
    wrapped, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0,
        data_loader=DataLoader(rows, batch_size=6), grad_sample_mode=mode, **options,
    )  # fmt: skip
    wrapped = model if options.get("wrap_model") is False else wrapped
    try:
        for x in loader:
            optimizer.zero_grad()
            wrapped(x).pow(3).sum(1).mean().backward()
            optimizer.step()
    except ValueError as error:
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert engine.get_epsilon(1e-5) == 0
        raise error
    return engine, before


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Calls, r"layer \(KeywordsOnly\): Opacus's hooks do not work on this layer \(IndexError"),
        (lambda: nn.Sequential(nn.Linear(4, 4), SharedBias()), r"1 \(SharedBias\): .* \(RuntimeError"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GRUCell(4, 3)), r"1 \(GRUCell\)"),
        (InPlace, "changes the output of a layer in place"),
    ],
    ids=["keywords", "shared", "functorch", "in place"],
)
def test_an_error_in_a_hook_names_the_layer_and_a_way_out(model, said):
    with pytest.raises(ValueError, match=f'{said}.*grad_sample_mode="bk"'):
        one_step(model(), "hooks")


@pytest.mark.parametrize("model", [Calls, SharedBias, InPlace], ids=["keywords", "shared", "in place"])
def test_the_way_out(model):
    engine, before = one_step(model := model(), "bk")
    assert engine.get_epsilon(1e-5) > 0
    assert not all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_hooks_without_a_wrapper_tell_it_too():
    with pytest.raises(ValueError, match=r"layer \(KeywordsOnly\)"):
        one_step(Calls(), "hooks", wrap_model=False)


def test_errors_of_the_model_stay_what_they_are():
    with pytest.raises(RuntimeError, match="my own mistake"):
        one_step(OwnMistake(), "hooks")
