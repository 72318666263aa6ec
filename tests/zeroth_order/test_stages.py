"""Stages, proximal term and pruning (DP-ZOSO, DP-ZOPO), and that the mistakes of public code would be found."""

import math

import pytest
import torch
from torch import nn
from zeroth import Scripted, by_hand, direction, flat, released, weights

from opacus_ac.zeroth_order import PRESETS, Pruning, Stages, ZerothOrderSettings, coordinates, preset
from opacus_ac.zeroth_order.coordinates import _Part, _trained
from opacus_ac.zeroth_order.pruning import choose

K = 4


def zeros():
    return Scripted(torch.zeros(1, K), 1e-3)


# ---------------------------------------------------------------- stages


def test_stages_grow_while_steps_shrink():
    stages = Stages(first=2, count=3, growth=2.0, lr_decay=0.5, smoothing_end=1e-4)
    assert [stages.stage(step) for step in range(9)] == [0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert [stages.lr_factor(s) for s in range(3)] == [1.0, 0.5, 0.25]
    assert [stages.smoothing(s, 1e-2) for s in range(3)] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert Stages().smoothing(2, 1e-3) == 1e-3
    assert Stages(count=1, smoothing_end=1e-5).smoothing(0, 1e-3) == 1e-3


def test_learning_rate_and_smoothing_follow_the_stage():
    stages = Stages(first=1, count=2, lr_decay=0.1, smoothing_end=1e-5, proximal=0.0)
    module = weights()
    optimizer = by_hand(module, stages=stages, max_grad_norm=100.0)
    for factor, smoothing in ((1.0, 1e-3), (0.1, 1e-5), (0.1, 1e-5)):
        assert optimizer.smoothing == pytest.approx(smoothing)
        before, z = flat(module).clone(), direction(optimizer, optimizer.direction_seeds[0])
        deltas = torch.zeros(1, K).double()
        deltas[0, 0] = 8.0
        optimizer.step(Scripted(deltas, smoothing))
        torch.testing.assert_close(flat(module), before - factor * 2.0 * z, rtol=1e-6, atol=1e-6)
        assert optimizer.param_groups[0]["lr"] == 1.0


def check_proximal_pull():
    """gamma = 0.5 with rate 1: from a distance x to the anchor a step leaves x / 2, when no record pushes."""
    module = weights()
    optimizer = by_hand(module, stages=Stages(first=2, count=2, proximal=0.5, lr_decay=1.0))
    anchor = flat(module).clone()
    deltas = torch.full((1, K), 1.0).double()
    optimizer.step(Scripted(deltas, 1e-3))
    away = flat(module).clone()
    assert float((away - anchor).norm()) > 0.1
    optimizer.step(zeros())
    torch.testing.assert_close(flat(module), anchor + (away - anchor) / 2, rtol=1e-9, atol=1e-9)
    optimizer.step(zeros())  # a new stage starts here, and with it a new anchor
    torch.testing.assert_close(flat(module), anchor + (away - anchor) / 2, rtol=1e-9, atol=1e-9)


def test_proximal_term_pulls_to_where_the_stage_began():
    check_proximal_pull()


def test_an_anchor_that_aliases_the_live_weights_would_be_caught(monkeypatch):
    """The planted bug is that of public code, whose anchor is ``model.state_dict()``."""
    monkeypatch.setattr(coordinates, "_trained", lambda parameter, index: parameter.detach().view(-1))
    with pytest.raises(AssertionError):
        check_proximal_pull()


@pytest.mark.parametrize("index", [None, torch.tensor([0, 2], dtype=torch.int32)])
def test_the_anchor_is_a_copy(index):
    parameter = nn.Parameter(torch.ones(3))
    kept = _trained(parameter, index)
    with torch.no_grad():
        parameter.add_(1)
    assert kept.tolist() == [1.0] * (3 if index is None else 2)


# ---------------------------------------------------------------- masks


def bits(tensor):
    return tensor.view(torch.int32)


def check_mask(weight_decay=0.1, steps=3, **kwargs):
    """Coordinates outside the mask keep every bit; those inside move, under noise, decay and pull."""
    module = weights((700, 200), (50,), dtype=torch.float32)
    inner = torch.optim.SGD(module.parameters(), lr=0.5, weight_decay=weight_decay)
    settings = {"pruning": Pruning(ratio=0.3, score="magnitude", strategy="static"), "noise_multiplier": 2.0, **kwargs}
    optimizer = by_hand(module, inner, **settings)
    before = flat(module).clone()
    for _ in range(steps):
        optimizer.step(Scripted(torch.randn(3, K), 1e-3))
    inside = torch.zeros(before.numel(), dtype=torch.bool)
    offset = 0
    for p, index in zip(module.parameters(), optimizer.coordinates.indices, strict=True):
        inside[offset + index.long()] = True
        offset += p.numel()
    assert int(inside.sum()) == optimizer.coordinates.size == round(0.3 * before.numel())
    assert torch.equal(bits(flat(module)[~inside]), bits(before[~inside]))
    assert bool((flat(module)[inside] != before[inside]).float().mean() > 0.99)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"direction": "sphere"}, {"direction": "rademacher"}, {"stages": Stages(first=1, proximal=0.1)}],
    ids=str,
)
def test_coordinates_outside_the_mask_keep_every_bit_and_those_inside_are_trained(kwargs):
    check_mask(**kwargs)


def test_a_masked_update_that_writes_to_a_copy_would_be_caught(monkeypatch):
    """The planted bug is that of public code: ``parameter[index].data += ...`` changes a copy, so nothing is trained."""

    def to_a_copy(self, change, scale=1.0):
        self._flat[self._index].data.add_(change, alpha=scale)

    monkeypatch.setattr(_Part, "add", to_a_copy)
    with pytest.raises(AssertionError):
        check_mask()


def test_weight_decay_that_forgets_the_mask_would_be_caught(monkeypatch):
    real = coordinates.Coordinates.descend

    def forgetful(self, seeds, coefficients, rates, decays, proximal):
        real(self, seeds, coefficients, rates, [0.0] * len(decays), proximal)
        for parameter, rate, decay in zip(self.parameters, rates, decays, strict=True):
            parameter.data.mul_(1 - rate * decay)

    monkeypatch.setattr(coordinates.Coordinates, "descend", forgetful)
    with pytest.raises(AssertionError):
        check_mask()


def test_directions_are_drawn_for_the_trained_coordinates_only():
    module = weights((40,), (30,))
    optimizer = by_hand(module, pruning=Pruning(ratio=0.5, score="magnitude", strategy="static"), direction="sphere")
    optimizer.step(zeros())
    z = direction_in_mask(optimizer)
    assert int((z != 0).sum()) == 35
    assert float(z.norm()) == pytest.approx(math.sqrt(35))


def direction_in_mask(optimizer):
    before = flat(optimizer.module).clone()
    optimizer.coordinates.move(5, 1.0)
    return flat(optimizer.module) - before


def test_strategies():
    module = weights((100,), (60,))
    stages = Stages(first=1, count=3, growth=1.0, proximal=0.0)

    def masks(pruning, seed=7):
        optimizer = by_hand(module, pruning=pruning, stages=stages, direction_seed=seed)
        found = []
        for _ in range(3):
            optimizer.step(zeros())
            chosen = torch.zeros(160, dtype=torch.bool)
            for offset, index in zip((0, 100), optimizer.coordinates.indices, strict=True):
                chosen[offset + index.long()] = True
            found.append(chosen)
        return found

    static = masks(Pruning(ratio=0.2, score="random", strategy="static"))
    assert torch.equal(static[0], static[1])
    assert torch.equal(static[0], static[2])
    dynamic = masks(Pruning(ratio=0.2, score="random", strategy="dynamic"))
    assert [int(m.sum()) for m in dynamic] == [32, 32, 32]
    assert not torch.equal(dynamic[0], dynamic[1])
    growing = masks(Pruning(ratio=(0.1, 0.2, 0.5), score="random", strategy="incremental"))
    assert [int(m.sum()) for m in growing] == [16, 32, 80]
    assert bool((growing[0] <= growing[1]).all() and (growing[1] <= growing[2]).all())
    assert torch.equal(static[0], masks(Pruning(ratio=0.2, score="random", strategy="static"))[0])
    assert not torch.equal(static[0], masks(Pruning(ratio=0.2, score="random", strategy="static"), seed=8)[0])


# ---------------------------------------------------------------- scores


def chosen(module, **kwargs):
    pruning = Pruning(strategy="static", **kwargs)
    return [i.tolist() for i in choose(module, list(module.parameters()), pruning, stage=0, seed=0)]


def test_magnitude_ranks_all_tensors_together():
    module = nn.Module()
    module.a, module.b = nn.Parameter(torch.tensor([0.1, -3.0, 0.2])), nn.Parameter(torch.tensor([[2.0, -0.05]]))
    assert chosen(module, ratio=0.4, score="magnitude") == [[1], [0]]
    assert chosen(module, ratio=0.4, score="magnitude", keep="low") == [[0], [1]]


def two_layers():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).double().eval()


def test_synflow_is_the_flow_through_each_weight():
    """R = 1^T |W2| |W1| 1, so the score of W1[j, i] is |W1[j, i]| times the column sum j of |W2|."""
    model = two_layers()
    before = flat(model).clone()
    first, second = (p.detach().abs() for p in model.parameters())
    scores = torch.cat([(first * second.sum(0)[:, None]).reshape(-1), (second * first.sum(1)).reshape(-1)])
    expected = scores.topk(5).indices.sort().values
    found = chosen(model, ratio=5 / 20, score="synflow", public_input=torch.ones(1, 3).double())
    assert found == [[i for i in expected.tolist() if i < 12], [i - 12 for i in expected.tolist() if i >= 12]]
    assert torch.equal(flat(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_synflow_in_rounds_keeps_whole_paths():
    """With one weight per layer left, flow remains only if they follow each other; rounds see that, a single one may not."""
    found = chosen(two_layers(), ratio=2 / 20, score="synflow", rounds=20, public_input=torch.ones(1, 3).double())
    ((first,), (second,)) = found
    assert first // 3 == second % 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"score": "synflow"}, "needs a constant input"),
        ({"score": "synflow", "public_input": torch.full((1, 3), math.inf).double()}, "not finite"),
    ],
)
def test_scores_that_cannot_be_computed_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        chosen(two_layers(), ratio=0.1, **kwargs)


def test_scores_that_rank_nothing_are_refused():
    module = weights((5,))
    nn.init.zeros_(module.w0)
    with pytest.raises(ValueError, match="ranks nothing"):
        chosen(module, ratio=0.2, score="magnitude")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stages(first=0), "stages.first=0"),
        (lambda: Stages(lr_decay=0.0), "stages.lr_decay"),
        (lambda: Stages(proximal=-1.0), "stages.proximal"),
        (lambda: Stages(smoothing_end=math.nan), "smoothing_end"),
        (lambda: Pruning(ratio=0.0), "pruning.ratio"),
        (lambda: Pruning(ratio=1.5), "pruning.ratio"),
        (lambda: Pruning(score="snip"), "pruning.score='snip'"),
        (lambda: Pruning(ratio=0.1, strategy="incremental"), "must be a tuple"),
        (lambda: Pruning(ratio=(0.5, 0.1), strategy="incremental"), "must not fall"),
        (lambda: Pruning(rounds=3, score="magnitude"), "rounds > 1"),
        (lambda: ZerothOrderSettings(num_directions=0), "num_directions=0"),
        (lambda: ZerothOrderSettings(num_directions=2.0), "num_directions=2.0"),
        (lambda: ZerothOrderSettings(smoothing=0.0), "smoothing must be a finite number > 0, got 0.0"),
        (lambda: ZerothOrderSettings(direction="uniform"), "direction='uniform'"),
        (lambda: ZerothOrderSettings(mechanism="exponential"), "mechanism="),
        (lambda: ZerothOrderSettings(direction_seed=2**63), "direction_seed"),
        (lambda: ZerothOrderSettings(pruning=Pruning()), "there are no stages"),
        (lambda: preset("dp-sgd"), "unknown zeroth_order preset 'dp-sgd'"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_momentum_with_a_mask_is_refused():
    module = weights()
    pruning = Pruning(ratio=0.1, score="magnitude", strategy="static")
    for inner in (torch.optim.Adam(module.parameters()), torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9)):
        with pytest.raises(ValueError, match="would move coordinates that are not trained"):
            by_hand(module, inner, pruning=pruning)


def test_presets_have_the_papers_numbers_of_directions():
    assert {name: s.num_directions for name, s in PRESETS.items()} == {
        "aggzo": 64, "dp-zo": 1, "dpzero": 1, "dp-zoso": 1, "dp-zopo": 1,
    }  # fmt: skip
    assert preset("dp-zopo", num_directions=2).pruning == Pruning()
    assert PRESETS["dp-zoso"].stages == Stages()
    assert released(by_hand(num_directions=1), torch.ones(1, 1)).tolist() == [pytest.approx(1.0)]
