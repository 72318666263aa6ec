"""Weights and buffers move by releases only; the set of trained weights may shrink and grow again, within what was made private."""

import pytest
import torch
from helpers import dataset, loss_of
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import AutoAdam, PrivacyEngine

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")
MODES = ["bk", "hooks", "functorch"]


class Net(nn.Module):
    """Two trained layers, a frozen one, a buffer, and something that the forward pass does on its way."""

    def __init__(self, on_the_way=lambda net, x: None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.table = nn.Embedding(5, 40).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.on_the_way = on_the_way
        self.double()

    def forward(self, x):
        self.on_the_way(self, x)
        return self.second(torch.tanh(self.first(x + self.frozen(x)))) + 0 * self.seen


def private(net, *, inner=torch.optim.SGD, parameters=None, noise=0.0, engine=None, **options):
    engine = engine or PrivacyEngine()
    arguments = {"noise_multiplier": noise, "max_grad_norm": 1.0, "clipping": "flat", "ema_decay": None, **options}
    made = engine.make_private(
        module=net,
        optimizer=inner(parameters or net.parameters(), lr=0.5),
        data_loader=DataLoader(dataset(16), batch_size=16),
        **arguments,
    )
    return (engine, *made)


def step(model, optimizer, batch):
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


@torch.no_grad()
def codebook(net, x):
    net.table.weight[x.shape[0] % 5] += float(x.mean())


def through_data(net, x):
    net.table.weight.data[1, 3:30] += x.mean()


def new_buffer(net, x):
    net.seen = net.seen + x.mean()


@torch.no_grad()
def running_mean(net, x):
    net.seen.mul_(0.9).add_(x[:, :3].mean(0))


def counted(net, x):
    net.count += len(x)


def trained_weight(net, x):
    with torch.no_grad():
        net.first.weight.mul_(1 - 1e-3 * float(x.mean()))


def late_buffer(net, x):
    if "late" not in net._buffers:
        net.register_buffer("late", x.detach().mean(0))


WRITES = {
    "rows of a frozen table": (codebook, "table.weight"),
    "a frozen table through .data": (through_data, "a frozen weight or a buffer"),
    "a buffer that is replaced": (new_buffer, "seen"),
    "running statistics": (running_mean, "seen"),
    "a counter": (counted, "count"),
    "a trained weight": (trained_weight, "first.weight"),
    "a buffer that is added": (late_buffer, "late"),
}


@pytest.mark.parametrize(("what", "mode"), [(what, mode) for what in WRITES for mode in MODES])
def test_a_forward_pass_that_writes_is_refused_before_the_charge(what, mode):
    write, name = WRITES[what]
    net = Net()
    engine, model, optimizer, loader = private(net, noise=1.0, grad_sample_mode=mode)
    net.on_the_way = write
    before = net.second.weight.detach().clone()
    with pytest.raises(ValueError, match=name):
        step(model, optimizer, next(iter(loader)))
    assert engine.accountant.history == []
    assert torch.equal(before, net.second.weight)


@pytest.mark.parametrize("what", ["rows of a frozen table", "running statistics", "a trained weight"])
def test_a_write_in_a_later_step_is_refused_too(what):
    net = Net()
    engine, model, optimizer, loader = private(net, noise=1.0)
    step(model, optimizer, next(iter(loader)))
    net.on_the_way = WRITES[what][0]
    with pytest.raises(ValueError, match=WRITES[what][1]):
        step(model, optimizer, next(iter(loader)))
    assert engine.accountant.history == [(1.0, 1.0, 1)]


def test_between_two_steps_the_model_is_the_callers():
    """Loading weights, averages for an evaluation, merging an adapter: functions of public values."""
    net = Net()
    engine, model, optimizer, loader = private(net, noise=1.0)
    for _ in range(3):
        step(model, optimizer, next(iter(loader)))
        with torch.no_grad():
            net.table.weight.mul_(2)
            net.first.weight.mul_(0.5)
            net.seen.add_(1)
        net.load_state_dict(net.state_dict())
    assert engine.accountant.history == [(1.0, 1.0, 3)]


def test_a_pass_without_a_step_leaves_no_watch_behind():
    net = Net()
    _, model, optimizer, loader = private(net, noise=1.0)
    loss_of(model, next(iter(loader)))  # left out by the loop
    net.table.weight.data.mul_(2)
    step(model, optimizer, next(iter(loader)))


class Sloppy(torch.optim.SGD):
    """An inner optimizer that also decays what is frozen."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(0.99)
        return super().step(closure)


def test_an_inner_optimizer_that_moves_frozen_weights_is_named():
    net = Net()
    _, model, optimizer, loader = private(net, inner=Sloppy, noise=1.0)
    with pytest.raises(ValueError, match=r"(frozen|table)\S* was changed .* during optimizer.step"):
        step(model, optimizer, next(iter(loader)))


class Carry(nn.Module):
    """Truncated back-propagation through time: a hidden state that stays on the module."""

    def __init__(self, in_place=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out, self.in_place = nn.Linear(4, 8).double(), nn.Linear(8, 3).double(), in_place
        self.state = torch.zeros(8, dtype=torch.float64)

    def forward(self, x):
        h = torch.tanh(self.first(x) + self.state.clone())
        if self.in_place:
            self.state.copy_(h.mean(0).detach())
        else:
            self.state = h.mean(0).detach() * 5
        return self.out(h)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_module_keeps_for_the_next_batch_is_put_back(mode):
    net = Carry()
    _, model, optimizer, loader = private(net, grad_sample_mode=mode)
    state = net.state
    with pytest.warns(UserWarning, match="keeps state from one batch for the next"):
        step(model, optimizer, next(iter(loader)))
    assert net.state is state
    fresh = Carry()
    fresh.load_state_dict(net.state_dict())
    step(model, optimizer, next(iter(loader)))
    _, other, its_optimizer, its_loader = private(fresh, grad_sample_mode=mode)
    step(other, its_optimizer, next(iter(its_loader)))
    torch.testing.assert_close(net.first.weight, fresh.first.weight, rtol=0, atol=1e-12)


def test_a_state_that_is_written_in_place_is_refused():
    net = Carry(in_place=True)
    engine, model, optimizer, loader = private(net, noise=1.0)
    with pytest.raises(ValueError, match="state was changed"):
        step(model, optimizer, next(iter(loader)))
    assert engine.accountant.history == []


# ---------------------------------------------------------------- gradients that no release covers


@pytest.mark.parametrize("mode", MODES)
def test_a_raw_gradient_of_a_parameter_that_was_frozen_does_not_reach_the_weights(mode):
    """Frozen when made private, trainable for forward and backward, frozen again for the step."""
    net = Net()
    engine, model, optimizer, loader = private(net, noise=1.0, grad_sample_mode=mode)
    before = net.frozen.weight.detach().clone()
    for batch in loader:
        optimizer.zero_grad()
        net.frozen.weight.requires_grad_(True)
        loss_of(model, batch).backward()
        net.frozen.weight.requires_grad_(False)
        if net.frozen.weight.grad is None:
            net.frozen.weight.grad = torch.ones_like(net.frozen.weight)
        with pytest.raises(ValueError, match=r"frozen\.weight.*gradient that was not clipped"):
            optimizer.step()
    assert torch.equal(before, net.frozen.weight)
    assert engine.accountant.history == []


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_is_frozen_between_backward_and_step_keeps_no_raw_gradient(mode):
    net = Net()
    _, model, optimizer, loader = private(net, noise=1.0, grad_sample_mode=mode)
    before = net.first.weight.detach().clone()
    loss_of(model, next(iter(loader))).backward()
    net.first.weight.requires_grad_(False)
    if mode == "bk":  # left out of the release
        optimizer.step()
    else:
        with pytest.raises(ValueError, match=r"first\.weight"):
            optimizer.step()
    assert torch.equal(before, net.first.weight)


# ---------------------------------------------------------------- what is trained


def expected_update(net, batch, names):
    """The clipped mean over records of the gradients of ``names``, by a loop over single records."""
    parameters = [dict(net.named_parameters())[name] for name in names]
    total = [torch.zeros_like(p) for p in parameters]
    inputs, targets = batch
    for i in range(len(inputs)):
        found = torch.autograd.grad(loss_of(net, (inputs[i : i + 1], targets[i : i + 1])), parameters)
        norm = torch.stack([g.norm() for g in found]).norm()
        for t, g in zip(total, found, strict=True):
            t += g * min(1.0, float(1.0 / norm))
    return dict(zip(names, (t / 16 * 0.5 for t in total), strict=True))


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_opacus_hooks_do_not_follow_freezing_and_say_so(mode):
    net = Net()
    engine, model, optimizer, loader = private(net, noise=1.0, grad_sample_mode=mode)
    net.first.requires_grad_(False)
    with pytest.raises(ValueError, match="grad_sample_mode='bk'"):
        step(model, optimizer, next(iter(loader)))
    assert engine.accountant.history == []


@pytest.mark.parametrize("fused", [False, True])
def test_layers_that_take_turns_are_clipped_and_noised_as_what_is_trained(fused):
    """Frozen and unfrozen within what was made private: each step's update is that of the layers that are on."""
    net = Net()
    reference = Net()
    _, model, optimizer, loader = private(net, fused_step=fused)
    layers = {"first": ["first.weight", "first.bias"], "second": ["second.weight", "second.bias"]}
    for on in ("first", "second", "first", "both"):
        for name in layers:
            getattr(net, name).requires_grad_(on in (name, "both"))
        batch = next(iter(loader))
        reference.load_state_dict(net.state_dict())
        names = [n for name, owned in layers.items() if on in (name, "both") for n in owned]
        updates = expected_update(reference, batch, names)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        step(model, optimizer, batch)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(
                before[name] - parameter, updates.get(name, torch.zeros_like(parameter)), rtol=1e-7, atol=1e-10
            )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["unfrozen", "added"])
def test_a_parameter_that_was_not_made_private_is_not_trained(how, mode):
    net = Net()
    parameters = [*net.first.parameters(), *net.second.parameters()]
    engine, model, optimizer, loader = private(
        net, noise=1.0, parameters=None if how == "unfrozen" else parameters, grad_sample_mode=mode
    )
    before = net.frozen.weight.detach().clone()
    net.frozen.requires_grad_(True)
    if how == "added":
        optimizer.add_param_group({"params": list(net.frozen.parameters())})
    with pytest.raises(ValueError, match="detach"):
        step(model, optimizer, next(iter(loader)))
    assert engine.accountant.history == []
    assert torch.equal(before, net.frozen.weight)
    net.frozen.requires_grad_(False)
    step(model, optimizer, next(iter(loader)))
    assert engine.accountant.history == [(1.0, 1.0, 1)]


def test_a_group_that_is_added_has_the_entries_of_its_kind():
    """The report reads them, and it is asked for after a refusal as well."""
    net = Net()
    parameters = [*net.first.parameters(), *net.second.parameters()]
    engine, _, optimizer, _ = private(net, noise=1.0, parameters=parameters, inner=AutoAdam)
    optimizer.add_param_group({"params": list(net.frozen.parameters())})
    first, second = optimizer.param_groups
    assert first.keys() == second.keys()
    assert "found by AutoAdam" in engine.privacy_report(1e-5).learning_rate


def test_freezing_within_a_logical_batch_kills_it():
    net = Net()
    engine, model, optimizer, loader = private(net, noise=1.0, max_physical_batch_size=6)
    batches = iter(loader)
    step(model, optimizer, next(batches))
    net.first.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen or unfrozen within a logical batch"):
        step(model, optimizer, next(batches))
    assert engine.accountant.history == []
