"""Moving float32 weights forth and back rounds, and what is rounded must not tell how many records were drawn."""

import pytest
import torch
from distributed_cases import fixed_draws
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from zeroth import flat

from opacus_ac import PrivacyEngine
from opacus_ac.zeroth_order import Pruning, Stages, ZerothOrderSettings
from opacus_ac.zeroth_order.coordinates import Coordinates

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")
SETTINGS = {
    "plain": ZerothOrderSettings(num_directions=4, direction_seed=1),
    "masked": ZerothOrderSettings(
        num_directions=2,
        direction="rademacher",
        direction_seed=1,
        stages=Stages(first=1, count=2),
        pruning=Pruning(ratio=0.5, score="magnitude"),
    ),
}


def prepare(kind="plain", limit=4, draws=(), inner=torch.optim.SGD):
    torch.manual_seed(0)
    model = nn.Linear(50, 40)
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=inner(model.parameters(), lr=0.01),
        data_loader=DataLoader(TensorDataset(torch.zeros(64, 50)), batch_size=16),
        noise_multiplier=1.0,
        clip_policy="fixed",
        max_physical_batch_size=limit,
        zeroth_order=SETTINGS[kind],
        noise_generator=torch.Generator().manual_seed(1),
    )
    loader.batch_sampler._draw = fixed_draws([list(range(size)) for size in draws]).__get__(loader.batch_sampler)
    return model, optimizer, loader


def after(*draws, steps=2, **options):
    """Return the weights after steps on batches of so many records, whose losses are 0: they follow from public values."""
    model, optimizer, loader = prepare(draws=draws, **options)
    for (inputs,) in loader:
        optimizer.step(lambda: torch.zeros(len(inputs)))  # noqa: B023
        if optimizer.steps_taken == steps:
            break
    return flat(model)


@pytest.mark.parametrize(
    ("kind", "inner"), [("plain", torch.optim.SGD), ("plain", torch.optim.AdamW), ("masked", torch.optim.SGD)]
)
def test_weights_do_not_tell_how_many_records_were_drawn(kind, inner):
    expected = after(3, 3, kind=kind, inner=inner)
    for draws in ((0, 0), (4, 5), (9, 0), (17, 33)):
        assert torch.equal(after(*draws, kind=kind, inner=inner), expected)
    assert torch.equal(after(30, 30, kind=kind, inner=inner, limit=None), expected)


@pytest.mark.parametrize("kind", SETTINGS)
def test_weights_that_round_with_every_physical_batch_are_caught(kind, monkeypatch):
    expected = after(3, 3, kind=kind)
    monkeypatch.setattr(Coordinates, "restore", lambda self, values: None)
    assert not torch.equal(after(5, 5, kind=kind), expected)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_copy_is_restored_to_the_last_bit(kind):
    model, optimizer, _ = prepare(kind)
    optimizer.measurement.course.enter(0)
    before, kept = flat(model).clone(), optimizer.coordinates.copy()
    optimizer.coordinates.move(3, 0.1)
    assert not torch.equal(flat(model), before)
    optimizer.coordinates.restore(kept)
    assert torch.equal(flat(model), before)


def test_a_copy_lives_as_long_as_its_logical_batch():
    """Weights that are changed after a logical batch was left alone, or by a checkpoint, are not taken back."""
    model, optimizer, loader = prepare(draws=(8, 3, 8))
    state = optimizer.state_dict()

    def first():
        (inputs,) = next(iter(loader))
        optimizer.step(lambda: torch.zeros(len(inputs)))

    first()
    assert optimizer.measurement._rounded is not None
    with torch.no_grad():
        model.weight.fill_(2.0)
    first()  # three records: the whole of another batch
    assert optimizer.steps_taken == 1
    assert optimizer.measurement._rounded is None
    assert float(model.weight.detach().mean()) == pytest.approx(2.0, abs=0.1)
    first()
    optimizer.load_state_dict(state)
    assert optimizer.measurement._rounded is None
