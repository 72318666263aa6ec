"""Mixtures of experts: stacked weights, of which every token uses some, one gradient per record."""

import copy

import pytest
import tiny_models
import torch
from tiny_models import one_backward, worst_error
from torch import nn
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample import check_model, explain
from opacus_ac.grad_sample.one_backward import experts, layer_terms
from opacus_ac.testing import check_norms, per_sample_gradients

pytest.importorskip("transformers.integrations.moe")
pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = list(tiny_models.EXPERTS)


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def private(model, rows, **options):
    settings = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1e-2,
        "clipping": "flat",
        "ema_decay": None,
        "lr_control": False,
    }
    return PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), normalize=False,
        data_loader=DataLoader(rows, batch_size=len(rows), collate_fn=collate), **{**settings, **options},
    )  # fmt: skip


def clipped_mean(model, rows, bound):
    """The mean of clipped gradients, by a loop of batch size one over the model's own loss."""
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for row in rows:
        model.zero_grad()
        model(**collate([row])).loss.backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        norm = torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()
        for name, gradient in gradients.items():
            total[name] += gradient.double() * min(1.0, bound / float(norm)) / len(rows)
    return total


def rows_of(batch):
    return [{name: values[i] for name, values in batch.items()} for i in range(len(batch["input_ids"]))]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", NAMES)
def test_a_private_step_with_the_models_own_loss(name, implementation):
    """Through make_private, where records are also run by themselves."""
    model = tiny_models.build(name, dtype=torch.float32)
    model.config._experts_implementation = implementation
    rows = rows_of(tiny_models.token_batch(5, 9))
    want = clipped_mean(copy.deepcopy(model), rows, 1e-2)
    net, optimizer, loader = private(model, rows)
    for batch in loader:
        optimizer.zero_grad()
        net(**batch).loss.backward()
        optimizer.step()
    got = {name: p.grad.double() for name, p in model.named_parameters()}
    size = sum(w.square().sum() for w in want.values()).sqrt()
    error = sum((got[n] - w).square().sum() for n, w in want.items()).sqrt()
    assert float(error / size) < 2e-3  # what the bounds of norms cost
    assert model.config._experts_implementation == implementation


WAYS = {
    "exact sums": ({}, {"secure_mode": True}),
    "in turns": ({"fused_step": True}, {}),
    "physical batches": ({"max_physical_batch_size": 2}, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_private_step_in_other_ways(name, way):
    """The weights move by the clipped mean, whatever the sums are formed in."""
    options, of_engine = WAYS[way]
    model, rows = tiny_models.build(name, dtype=torch.float32), rows_of(tiny_models.token_batch(5, 9))
    want = clipped_mean(copy.deepcopy(model), rows, 1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    net, optimizer, loader = PrivacyEngine(**of_engine).make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), normalize=False, noise_multiplier=0.0,
        data_loader=DataLoader(rows, batch_size=5, collate_fn=collate), max_grad_norm=1e-2, clipping="flat", ema_decay=None,
        lr_control=False, **options,
    )  # fmt: skip
    for batch in loader:
        optimizer.zero_grad()
        net(**batch).loss.backward()
        optimizer.step()
    assert optimizer.steps_taken == 1
    error = sum((before[n] - p.detach() - want[n]).double().square().sum() for n, p in model.named_parameters()).sqrt()
    assert float(error / sum(w.square().sum() for w in want.values()).sqrt()) < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_out_is_the_same(name):
    model = tiny_models.build(name)
    batch = tiny_models.token_batch()
    want = model(**batch).logits
    net, _, _ = private(model, rows_of(batch))
    torch.testing.assert_close(net(**batch).logits, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj", "gate.weight", "all but experts"])
def test_frozen_parts(frozen):
    model = tiny_models.build("mixtral")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" in name if frozen == "all but experts" else frozen not in name)
    batch = tiny_models.token_batch()
    want = per_sample_gradients(model, batch, tiny_models.mean_loss)
    norms, sums = one_backward(model, batch, tiny_models.mean_loss)
    check_norms(norms, want, rtol=1e-7)
    assert worst_error(sums, {n: g.sum(0) for n, g in want.items()}, floor=1e-5)[0] <= 2e-6


class Twice(nn.Module):
    """The same experts in two places, the second time for other tokens."""

    def __init__(self):
        super().__init__()
        self.moe = tiny_models.build("mixtral").model.layers[0].mlp
        self.head = nn.Linear(32, 3).double()

    def forward(self, x):
        return self.head(x + self.moe(self.moe(x).flip(1)))


def test_experts_in_two_places():
    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 5, 32, dtype=torch.float64)

    def loss(m, rows):
        return m(rows).square().sum((1, 2)).mean()

    want = per_sample_gradients(model, x, loss)
    norms, sums = one_backward(model, x, loss)
    check_norms(norms, want, rtol=1e-7)
    assert worst_error(sums, {n: g.sum(0) for n, g in want.items()}, floor=1e-6)[0] <= 1e-7


def test_users_of_several_rows():
    """A user's rows are more rows of the user's groups."""
    every = rows_of(tiny_models.token_batch(6, 7, seed=1))
    users = [every[:2], every[2:4], every[4:]]
    model = tiny_models.build("mixtral", dtype=torch.float32)
    twin = copy.deepcopy(model)
    want = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in twin.named_parameters()}
    for user in users:
        twin.zero_grad()
        sum(twin(**collate([row])).loss for row in user).backward()
        norm = torch.stack([p.grad.double().square().sum() for p in twin.parameters()]).sum().sqrt()
        for name, p in twin.named_parameters():
            want[name] += p.grad.double() * min(1.0, 1e-2 / float(norm))
    _, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), max_rows_per_user=2, noise_multiplier=0.0,
        data_loader=DataLoader(users, batch_size=3, collate_fn=lambda users: collate([r for u in users for r in u])),
        max_grad_norm=1e-2, clipping="flat", ema_decay=None, lr_control=False, normalize=False, loss_reduction="sum",
    )  # fmt: skip
    for batch in loader:
        optimizer.zero_grad()
        tiny_models.record_losses(model, batch).sum().backward()
        optimizer.step()
    error = sum((p.grad.double() - want[name]).square().sum() for name, p in model.named_parameters()).sqrt()
    assert float(error) < 2e-3 * float(sum(w.square().sum() for w in want.values()).sqrt())


def test_a_poisonous_record_leaves_the_others_alone():
    model, batch = tiny_models.build("mixtral"), tiny_models.token_batch(4, 7, padded=False)
    weights = torch.ones(4, dtype=torch.float64)
    weights[2] = 0.0

    def loss(m, rows, poison=float("nan")):
        losses = tiny_models.record_losses(m, rows)
        return torch.cat([losses[:2], losses[2:3] * poison, losses[3:]]).mean()

    _, clean = one_backward(model, batch, lambda m, rows: loss(m, rows, 1.0), weights)
    _, sums = one_backward(model, batch, loss, weights)
    for name, total in clean.items():
        torch.testing.assert_close(sums[name], total, rtol=1e-9, atol=1e-12)


def test_the_configuration_is_put_back_when_a_call_fails():
    model = tiny_models.build("mixtral")
    net, optimizer, _ = private(model, rows_of(tiny_models.token_batch()))
    module = model.model.layers[0].mlp.experts
    handle = module.act_fn.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
    with pytest.raises(RuntimeError, match="planted"):
        net(**tiny_models.token_batch())
    handle.remove()
    assert module.config is model.config
    assert all(p.requires_grad for p in model.parameters())
    optimizer.zero_grad()
    net(**tiny_models.token_batch())
    assert module.config is model.config


def test_a_copy_of_a_private_mixture_is_a_plain_model(tmp_path):
    model = tiny_models.build("mixtral")
    net, _, _ = private(model, rows_of(tiny_models.token_batch()))
    net(**tiny_models.token_batch())
    twin = copy.deepcopy(model)
    twin(**tiny_models.token_batch()).loss.backward()
    assert all(p.grad is not None for n, p in twin.named_parameters() if "experts" in n)
    model.save_pretrained(tmp_path)
    assert "opacus_ac" not in (tmp_path / "config.json").read_text()


def test_rows_that_nothing_is_known_of_are_refused():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = tiny_models.build("mixtral").model.layers[0].mlp.experts

        def forward(self, x):
            chosen = torch.zeros(len(x), 1, dtype=torch.long)
            return self.experts(x, chosen, x.new_ones(len(x), 1))

    with pytest.raises(ValueError, match="nothing tells which record they belong to"):
        one_backward(Flat(), torch.randn(4, 32).double(), lambda m, x: m(x).square().sum(1).mean())


def test_experts_spread_over_processes_are_refused():
    model = tiny_models.build("mixtral")
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    net, _, _ = private(model, rows_of(tiny_models.token_batch()))
    with pytest.raises(ValueError, match="spread over processes"):
        net(**tiny_models.token_batch())


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_other_modes_refuse_them(mode):
    with pytest.raises(ValueError, match="Experts"):
        check_model(tiny_models.build("mixtral"), mode=mode)


def test_tokens_given_to_other_records_are_found_by_the_check_of_single_records(monkeypatch):
    def backwards(use, tensors, backprops, original=layer_terms._routed):
        return original(use, (tensors[0], use.product.rows - 1 - tensors[1]), backprops)

    monkeypatch.setattr(layer_terms, "_routed", backwards)
    net, optimizer, loader = private(
        tiny_models.build("mixtral", dtype=torch.float32), rows_of(tiny_models.token_batch(5, 9))
    )
    optimizer.zero_grad()
    net(**next(iter(loader))).loss.backward()
    with pytest.raises(ValueError, match="experts"):
        optimizer.step()


def test_explain_names_the_route():
    routes = {row.parameter.split(".")[-1]: row.route for row in explain(tiny_models.build("mixtral"))}
    assert routes["gate_up_proj"] == routes["down_proj"] == "routed"


def test_which_modules_are_experts():
    model = tiny_models.build("mixtral")
    assert [type(m).__name__ for m in experts.mixtures(model)] == ["MixtralSparseMoeBlock"] * 2
    assert not any(experts.is_experts(m) for m in tiny_models.build("qwen2-tied").modules())


class AlsoOtherwise(Twice):
    """A matrix of the first expert is used as a layer's weight too."""

    def __init__(self):
        super().__init__()
        self.stack = self.moe.experts.gate_up_proj

    def forward(self, x):
        return super().forward(x) + (x @ self.stack[0].t()).sum(2, keepdim=True)


def test_a_stack_that_is_used_otherwise_too_is_refused():
    with pytest.raises(ValueError, match="gate_up_proj|stack|experts"):  # noqa: RUF043
        one_backward(AlsoOtherwise(), torch.randn(4, 5, 32).double(), lambda m, x: m(x).square().sum((1, 2)).mean())


class Pointwise(nn.Module):
    """An activation that is trained."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(48, dtype=torch.float64))

    def forward(self, x):
        return torch.nn.functional.silu(x) * self.slope


@pytest.mark.parametrize("mode", ["bk", "hooks", "functorch"])
@pytest.mark.parametrize("frozen", [False, True], ids=["stacks trained", "stacks frozen"])
@pytest.mark.parametrize("choices", [1, 2])
def test_trained_layers_inside_experts_are_refused(choices, frozen, mode):
    """Their rows are sorted by expert. With one expert a token they are as many as tokens, and all of them may begin in one expert."""
    model = tiny_models.mixtral(num_experts_per_tok=choices).double().train()
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = Pointwise()
        if frozen:
            layer.mlp.gate.requires_grad_(False)
            for name in ("gate_up_proj", "down_proj"):
                getattr(layer.mlp.experts, name).requires_grad_(False)
    with pytest.raises(ValueError, match=r"act_fn\.slope.* with requires_grad_"):
        check_model(model, mode=mode)
