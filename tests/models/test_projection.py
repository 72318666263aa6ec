"""Random projections: per-record gradients are P^T G exactly, and P knows nothing of the data."""

import copy
import math

import pytest
import torch
from helpers import dataset, loader, loss_of, train
from tiny_models import build, mean_loss, one_backward, token_batch, worst_error
from torch import nn

from opacus_ac import PrivacyEngine
from opacus_ac.allocation import NoiseAllocation
from opacus_ac.models import RandomProjection
from opacus_ac.models.projection import projected_layers
from opacus_ac.optimizer import DPAdamW
from opacus_ac.testing import per_sample_gradients

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning", "ignore::UserWarning")
PROJECTIONS = ["*q_proj", "*down_proj"]


def wide_classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3)).double()


def private(projection, *, data=None, inner=torch.optim.AdamW, targets=("0",), **kwargs):
    torch.manual_seed(5)
    model = wide_classifier()
    projection.apply(model, targets)
    trained = [p for p in model.parameters() if p.requires_grad]
    source = loader(64, 16) if data is None else torch.utils.data.DataLoader(data, batch_size=16)
    arguments = {"noise_multiplier": 0.7, "max_grad_norm": 0.5, "ema_decay": None, **kwargs}
    engine = PrivacyEngine()
    made = engine.make_private(
        module=model, optimizer=inner(trained, lr=0.01), data_loader=source,
        noise_generator=torch.Generator().manual_seed(3), **arguments,
    )  # fmt: skip
    return *made, engine


@pytest.mark.parametrize("name", ["qwen2-tied", "llama"])
def test_records_gradients_are_the_projected_ones(name):
    """Norms and sums of mode "bk" against P^T times the oracle's gradients of the model as it was, in float64."""
    model, batch = build(name), token_batch()
    whole = per_sample_gradients(copy.deepcopy(model), batch, mean_loss)
    names = RandomProjection(3, seed=1).apply(model, PROJECTIONS)
    assert len(names) == 4
    want = {n: g for n, g in whole.items() if not any(n.startswith(f"{layer}.weight") for layer in names)}
    for layer_name, layer in projected_layers(model):
        want[f"{layer_name}.down.weight"] = layer.up.weight.detach().t() @ whole[f"{layer_name}.weight"]
    want = {n.replace("q_proj.bias", "q_proj.base.bias"): g for n, g in want.items()}
    norms, sums = one_backward(model, batch, mean_loss)
    expected = sum(g.flatten(1).square().sum(1) for g in want.values()).sqrt()
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
    assert worst_error(sums, {n: g.sum(0) for n, g in want.items()}, floor=1e-6)[0] < 1e-6


@pytest.mark.statistical
def test_projections_are_the_identity_on_average():
    """n = 4000 draws of P [6, 2]: entries of P P^T have std at most sqrt(2 / 2) = 1 each; limit 6 / sqrt(n)."""
    model = nn.Sequential(nn.Linear(2, 6))
    total, draws = torch.zeros(6, 6, dtype=torch.float64), 4000
    projection = RandomProjection(2, seed=7)
    projection.apply(model)
    ((_, layer),) = projected_layers(model)
    for _ in range(draws):
        layer.refreshes.data += 1
        projection._draw(layer, 0)
        p = layer.up.weight.detach().double()
        total += p @ p.t() / draws
    assert float((total - torch.eye(6)).abs().max()) < 6 / math.sqrt(draws)


@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
@pytest.mark.parametrize("inner", [torch.optim.AdamW, DPAdamW])
def test_it_trains_with_states_in_the_projected_space(mode, inner):
    model, optimizer, batches, _ = private(RandomProjection(2), inner=inner, grad_sample_mode=mode)
    layer = model[0] if mode == "bk" else model._module[0]
    before = layer.base.weight.detach().clone()
    train(model, optimizer, batches)
    assert optimizer.original_optimizer.state[layer.down.weight]["exp_avg"].shape == (2, 4)
    assert torch.equal(layer.base.weight, before)
    assert float(layer.down.weight.detach().abs().min()) > 0


def test_a_refresh_keeps_the_function_and_changes_the_directions():
    projection = RandomProjection(2, seed=4)
    model, optimizer, batches, _ = private(projection, noise_allocation=NoiseAllocation("dimension"))
    train(model, optimizer, batches)
    inputs = dataset(8).tensors[0]
    before, old = model(inputs).detach(), model[0].up.weight.detach().clone()
    state = optimizer.original_optimizer.state[model[0].down.weight]
    second = state["exp_avg_sq"].clone()
    optimizer.zero_grad()
    projection.refresh(model, optimizer)
    torch.testing.assert_close(model(inputs).detach(), before, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model[0].up.weight, old)
    assert float(state["exp_avg"].abs().max()) == 0
    assert torch.equal(state["exp_avg_sq"], second)
    optimizer.zero_grad()
    train(model, optimizer, batches)
    after = model(inputs).detach()
    assert projection.remove(model) == ["0"]
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(inputs).detach(), after, rtol=1e-12, atol=1e-12)


def test_projections_do_not_depend_on_the_data():
    found = []
    for seed in (1, 2):
        projection = RandomProjection(2, seed=4)
        model, optimizer, batches, _ = private(projection, data=dataset(64, seed=seed))
        train(model, optimizer, batches)
        projection.refresh(model, optimizer)
        found.append((model[0].up.weight.detach().clone(), model[0].base.weight.detach().clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_a_resumed_run_goes_on_with_the_next_projection():
    projection = RandomProjection(2, seed=4)
    model, optimizer, batches, _ = private(projection)
    train(model, optimizer, batches)
    projection.refresh(model, optimizer)
    state = copy.deepcopy(model.state_dict())
    projection.refresh(model, optimizer)
    again = RandomProjection(2, seed=4)
    model2, optimizer2, _, _ = private(again)
    model2.load_state_dict(state)
    again.refresh(model2, optimizer2)
    assert torch.equal(model2[0].up.weight, model[0].up.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 2, "basis": "svd"}, "raw gradients"),
        ({"rank": 2, "basis": "galore"}, "raw gradients"),
        ({"rank": 2, "basis": "other"}, "unknown basis"),
        ({"rank": 0}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": True}, "rank"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomProjection(**arguments)


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [
        (wide_classifier, ("nothing",), "no trainable nn.Linear"),
        (wide_classifier, ("*",), "2 has 3 outputs"),
        (lambda: wide_classifier().bfloat16(), ("0",), "bfloat16"),
        (lambda: build("qwen2-tied"), ("lm_head",), "lm_head is tied"),
        (lambda: nn.Linear(4, 8), ("*",), "itself an nn.Linear"),
    ],
)
def test_layers_that_cannot_be_projected_are_refused_and_left_alone(make, targets, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        RandomProjection(4).apply(model, targets)
    assert not list(projected_layers(model))
    assert all(p.requires_grad for p in model.parameters())


def test_a_second_projection_is_refused():
    model = wide_classifier()
    RandomProjection(2).apply(model, ("0",))
    before = model[0].up.weight.detach().clone()
    with pytest.raises(ValueError, match="already"):
        RandomProjection(1).apply(model, ("2",))
    assert torch.equal(model[0].up.weight, before)
    assert type(model[2]) is nn.Linear


def test_a_refresh_under_an_average_or_within_a_batch_is_refused():
    projection = RandomProjection(2)
    model, optimizer, _, _ = private(projection, ema_decay=0.9)
    with pytest.raises(ValueError, match="ema_decay=None"):
        projection.refresh(model, optimizer)
    model, optimizer, batches, _ = private(projection, max_physical_batch_size=4)
    optimizer.zero_grad()
    loss_of(model, next(iter(batches))).backward()
    optimizer.step()
    assert optimizer.steps_taken == 0
    with pytest.raises(ValueError, match="within a logical batch"):
        projection.refresh(model, optimizer)
    assert int(model[0].refreshes) == 0
