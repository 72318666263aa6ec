"""Values that a model computes once for all records: each record's part of the gradient is its own, or it is refused."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import loader
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample import register_rules
from opacus_ac.grad_sample.one_backward import shared
from opacus_ac.grad_sample.one_backward.shared import Shared, SharedCall
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.testing import per_sample_gradients

B, T, D, HEADS = 4, 5, 6, 2


class Net(nn.Module):
    """Scores ``[B, heads, T, T]`` of an attention, to which ``bias`` adds something that all records share."""

    def __init__(self, bias: Callable[[Net, Tensor], Tensor], checkpointed: bool = False) -> None:
        super().__init__()
        self.bias, self.checkpointed = bias, checkpointed
        self.first = nn.Linear(D, D)
        self.table = nn.Embedding(7, HEADS)
        self.places = nn.Embedding(16, D)
        self.norm = nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, HEADS))
        self.conv = nn.Conv1d(D, D, 3, groups=D)
        self.register_buffer("grid", torch.randn(1, T * T, 2, generator=torch.Generator().manual_seed(5)))
        self.register_buffer("constant", torch.randn(T, T, generator=torch.Generator().manual_seed(6)))

    def relative(self, length: int) -> Tensor:
        steps = torch.arange(length)
        return (steps[None] - steps[:, None]).clamp(-3, 3) + 3

    def heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), x.shape[1], HEADS, -1).transpose(1, 2)

    def scores(self, x: Tensor) -> Tensor:
        states = self.heads(self.first(x))
        return states @ states.transpose(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.bias, self, x, use_reentrant=False)
        return self.bias(self, x)


def relative_bias(net: Net, x: Tensor) -> Tensor:
    """T5: looked up for all pairs of positions, turned, and added to the scores of all records."""
    bias = net.table(net.relative(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
    return (net.scores(x) + bias).softmax(-1)


def relative_bias_expanded(net: Net, x: Tensor) -> Tensor:
    bias = net.table(net.relative(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
    return (net.scores(x) + bias.expand((len(x), -1, -1, -1)).contiguous()).softmax(-1)


def added_in_place(net: Net, x: Tensor) -> Tensor:
    scores = net.scores(x)
    scores += net.table(net.relative(x.shape[1])).permute(2, 0, 1)
    return scores.softmax(-1)


def changed_in_place(net: Net, x: Tensor) -> Tensor:
    bias = net.table(net.relative(x.shape[1])).permute(2, 0, 1)
    bias /= 3.0
    bias *= net.constant[: x.shape[1], : x.shape[1]]
    return net.scores(x) * torch.sigmoid(bias)


def used_twice(net: Net, x: Tensor) -> Tensor:
    bias = net.table(net.relative(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
    return ((net.scores(x) + bias).softmax(-1) + bias).tanh()


def masked(net: Net, x: Tensor) -> Tensor:
    bias = net.table(net.relative(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
    keep = (x.sum(-1) > 0)[:, None, None, :]
    return torch.where(keep, bias, net.scores(x)).softmax(-1)


def mask_of_attention(net: Net, x: Tensor) -> Tensor:
    bias = net.table(net.relative(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
    states = net.heads(net.first(x))
    return F.scaled_dot_product_attention(states, states, states, attn_mask=bias)


def multiplied_positions(net: Net, x: Tensor) -> Tensor:
    positions = net.places(torch.arange(x.shape[1]).unsqueeze(0))
    return net.first(x) * torch.tanh(positions) + positions


def positions_of_one_dimension(net: Net, x: Tensor) -> Tensor:
    return net.first(x) + net.places.weight[: x.shape[1]]


def disentangled(net: Net, x: Tensor) -> Tensor:
    """DeBERTa: a table that is never looked up goes through a norm and the layer of the content, and is repeated."""
    table = net.norm(net.places.weight)[:8].unsqueeze(0)
    keys = net.first(table).view(1, 8, HEADS, -1).permute(0, 2, 1, 3).contiguous().view(HEADS, 8, -1)
    queries = net.heads(net.first(x)).reshape(len(x) * HEADS, x.shape[1], -1)
    return torch.bmm(queries, keys.repeat(len(x), 1, 1).transpose(1, 2)).view(len(x), HEADS, x.shape[1], 8)


def borrowed_weight(net: Net, x: Tensor) -> Tensor:
    return F.linear(net.first(x), net.first.weight)


def transposed_weight(net: Net, x: Tensor) -> Tensor:
    return net.first(x) @ net.first.weight.T


def borrowed_kernel(net: Net, x: Tensor) -> Tensor:
    return F.conv1d(net.first(x).transpose(1, 2), net.conv.weight, net.conv.bias, groups=D, padding=1)


def functional_lookup(net: Net, x: Tensor) -> Tensor:
    ids = (x.sum(-1) * 3).long().remainder(16)
    return net.first(x) + F.embedding(ids, net.places.weight)


def prompt(net: Net, x: Tensor) -> Tensor:
    """A prompt of three rows before each record."""
    rows = net.places.weight[:3].unsqueeze(0).repeat(len(x), 1, 1)
    return net.first(torch.cat([rows, x], dim=1))


def positions_of_each_record(net: Net, x: Tensor) -> Tensor:
    """ProphetNet: ids are counted for each record, looked up outside of the module, and put behind the record."""
    ids = torch.ones(x.shape[:2], dtype=torch.long).cumsum(1)
    rows = F.embedding(ids, net.places.weight) + net.norm.weight
    return net.first(torch.cat([net.first(x), rows], dim=1)) + torch.cat([x * rows, rows], dim=1)


def class_token(net: Net, x: Tensor) -> Tensor:
    rows = net.norm.weight[None, None, :].expand(len(x), -1, -1)
    return net.first(torch.cat([rows, x], dim=1))


def made_from_constants(net: Net, x: Tensor) -> Tensor:
    """Swin: layers run on a buffer."""
    bias = net.mlp(net.grid).view(T, T, HEADS)[: x.shape[1], : x.shape[1]].permute(2, 0, 1)
    return net.scores(x) + (16 * torch.sigmoid(bias)).unsqueeze(0)


def einsum(net: Net, x: Tensor) -> Tensor:
    """BERT's relative keys."""
    distances = net.places.weight[:T].unsqueeze(0).expand(x.shape[1], -1, -1).reshape(-1, T, HEADS, D // HEADS)[:, :, 0]
    return torch.einsum("bhld,lrd->bhlr", net.heads(net.first(x)), distances)


def prototypes(net: Net, x: Tensor) -> Tensor:
    """A codebook, looked up at constant ids: distances of each position to each of its entries."""
    code = net.places(torch.arange(B))
    return (net.first(x).unsqueeze(2) - code).square().sum(-1) * code.square().sum()


def prototypes_as_weight(net: Net, x: Tensor) -> Tensor:
    return net.first(x) @ net.places(torch.arange(3)).T


def layer_on_constants(net: Net, x: Tensor) -> Tensor:
    """The constants are made in the forward pass, and have no batch dimension."""
    return (
        net.scores(x) + net.mlp(torch.linspace(-1, 1, 2 * x.shape[1], dtype=x.dtype).view(x.shape[1], 2)).T[:, None, :]
    )


def ids_through_python(net: Net, x: Tensor) -> Tensor:
    """These ids are those of the records, though torch does not see where they come from."""
    ids = torch.tensor([int(abs(v) * 3) % 16 for v in x.detach().sum((1, 2)).tolist()])
    return net.first(x) + net.places(ids).unsqueeze(1)


def slopes(net: Net, x: Tensor) -> Tensor:
    """A constant per head: there may be as many heads as records."""
    distances = net.table.weight.sum(1)[net.relative(x.shape[1])]
    return net.scores(x) + distances * torch.tensor([0.5, 2.0], dtype=x.dtype)[:, None, None]


def expanded_to_heads(net: Net, x: Tensor) -> Tensor:
    distances = net.table.weight.sum(1)[net.relative(x.shape[1])]
    return net.scores(x) * distances.unsqueeze(0).expand(HEADS, -1, -1)


FOLLOWED = [
    slopes,
    expanded_to_heads,
    prototypes,
    prototypes_as_weight,
    layer_on_constants,
    ids_through_python,
    relative_bias,
    relative_bias_expanded,
    added_in_place,
    changed_in_place,
    used_twice,
    masked,
    mask_of_attention,
    multiplied_positions,
    positions_of_one_dimension,
    disentangled,
    borrowed_weight,
    transposed_weight,
    borrowed_kernel,
    functional_lookup,
    prompt,
    positions_of_each_record,
    class_token,
    made_from_constants,
    einsum,
]


def batch(records: int = B, length: int = T) -> Tensor:
    return torch.randn(records, length, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1).mean()


def net(bias: Callable[[Net, Tensor], Tensor], **kwargs: Any) -> Net:
    torch.manual_seed(0)
    return Net(bias, **kwargs).double().train()


def attached(model: nn.Module) -> tuple[BookKeepingSource, Callable[[], None]]:
    register_rules(model)
    named = dict(model.named_parameters())
    source = BookKeepingSource(model, list(named.values()), list(named))
    return source, source.attach()


def check(
    model: Net,
    x: Tensor,
    passes: int = 1,
    loss: Callable[..., Tensor] = loss,
    rtol: float = 1e-6,
    before: Tensor | None = None,
) -> None:
    """Compare outputs, norms and weighted sums with a loop over single records."""
    twin = copy.deepcopy(model)
    want = per_sample_gradients(twin, x, loss)
    source, detach = attached(model)
    if before is not None:
        loss(model, before).backward()
    for _ in range(passes):  # the first passes are watched for parameters outside of their modules
        source.clear(sums=True)
        torch.testing.assert_close(loss(model, x), loss(twin, x))
        source.clear(sums=True)
        loss(model, x).backward()
    norms = torch.stack([g.flatten(1).square().sum(1) for g in want.values()]).sum(0).sqrt()
    torch.testing.assert_close(source.finish_batch(), norms, rtol=rtol, atol=0, check_dtype=False)
    weights = torch.rand(len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    source.accumulate(weights)
    for total, rows in zip(source.sums(), want.values(), strict=True):
        expected = torch.einsum("i,i...->...", weights, rows.double())
        total = torch.zeros_like(expected) if total is None else total.double()
        torch.testing.assert_close(total, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))
    detach()


@pytest.mark.parametrize("bias", FOLLOWED)
def test_each_record_has_its_own_part(bias: Any) -> None:
    check(net(bias), batch())


@pytest.mark.parametrize("bias", FOLLOWED)
def test_later_passes_are_as_the_first(bias: Any) -> None:
    check(net(bias), batch(), passes=4)


@pytest.mark.parametrize("records", [1, 2, 5])
@pytest.mark.parametrize("bias", [b for b in FOLLOWED if b not in (made_from_constants,)], ids=lambda b: b.__name__)
def test_any_number_of_records(bias: Any, records: int) -> None:
    """Also as many as positions, or as heads, where shapes alone do not tell which is which."""
    check(net(bias), batch(records), before=batch(3))  # a batch whose size is no length of it tells


def slopes_of_a_layer(net: Net, x: Tensor) -> Tensor:
    distances = net.table(net.relative(x.shape[1])).sum(-1)
    return net.scores(x) + distances * torch.tensor([0.5, 2.0], dtype=x.dtype)[:, None, None]


def layer_expanded_to_heads(net: Net, x: Tensor) -> Tensor:
    distances = net.table(net.relative(x.shape[1])).sum(-1)
    return net.scores(x) * distances.unsqueeze(0).expand(HEADS, -1, -1)


@pytest.mark.parametrize("bias", [slopes_of_a_layer, layer_expanded_to_heads])
def test_as_many_records_as_heads_in_a_pass_that_is_not_watched(bias: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, empty in {"known": {}, "places": {}, "constants": set()}.items():
        monkeypatch.setattr(SharedCall, name, empty)
    model, x = net(bias), batch(HEADS)
    want = per_sample_gradients(copy.deepcopy(model), x, loss)
    source, detach = attached(model)
    for _ in range(3):
        loss(model, batch(3)).backward()
        source.clear(sums=True)
    assert source._capture is not None
    assert not source._capture._watched._left
    loss(model, x).backward()
    norms = torch.stack([g.flatten(1).square().sum(1) for g in want.values()]).sum(0).sqrt()
    torch.testing.assert_close(source.finish_batch(), norms, rtol=1e-6, atol=0)
    detach()


def test_a_size_that_may_be_that_of_the_batch_is_refused_until_another_batch_has_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SharedCall, "known", {})
    monkeypatch.setattr(SharedCall, "places", {})
    monkeypatch.setattr(SharedCall, "constants", set())
    model = net(einsum)
    source, detach = attached(model)
    with pytest.raises(ValueError, match="Give the first batch another length"):
        model(batch(T))
    source.clear(sums=True)
    model(batch(T - 1))
    source.clear(sums=True)
    detach()
    check(model, batch(T))


@pytest.mark.parametrize("bias", [relative_bias, multiplied_positions, made_from_constants, mask_of_attention])
def test_inside_a_checkpoint(bias: Any) -> None:
    check(net(bias, checkpointed=True), batch())


@pytest.mark.parametrize("bias", FOLLOWED)
def test_bfloat16_autocast(bias: Any) -> None:
    def narrow(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, x).float()

    check(net(bias).float(), batch().float(), loss=narrow, rtol=6e-2)


def test_a_step_of_the_engine() -> None:
    """All of it, with the comparison of single records, against the clipped mean of a loop."""

    class OnRows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = net(relative_bias), nn.Linear(HEADS * T * T, 3)
            self.inputs = nn.Linear(8, T * D)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(self.inputs(x).view(len(x), T, D)).flatten(1))

    data = loader(64, 16)
    torch.manual_seed(0)
    width = next(iter(data))[0].shape[1]
    model = OnRows()
    model.inputs = nn.Linear(width, T * D)
    model = model.double().train()
    twin = copy.deepcopy(model)
    private, optimizer, private_loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=data,
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        clipping="flat",
        ema_decay=None,
        lr_control=False,
    )
    x, y = next(iter(private_loader))
    F.cross_entropy(private(x), y).backward()
    optimizer.step()
    want = per_sample_gradients(twin, (x, y), lambda model, rows: F.cross_entropy(model(rows[0]), rows[1]))
    norms = torch.stack([g.flatten(1).square().sum(1) for g in want.values()]).sum(0).sqrt()
    factors = (0.5 / norms).clamp(max=1.0)
    for (name, before), after in zip(twin.named_parameters(), model.parameters(), strict=True):
        step = torch.einsum("i,i...->...", factors, want[name]) / optimizer.expected_batch_size
        torch.testing.assert_close(before - after, step, rtol=2e-3, atol=1e-6)


# ---------------------------------------------------------------- refused


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def only_shared(net: Net, x: Tensor) -> Tensor:
    return net.table(net.relative(x.shape[1])).permute(2, 0, 1).unsqueeze(0)


def own_function(net: Net, x: Tensor) -> Tensor:
    """A function in C++, or of the user's own, which __torch_function__ does not see."""
    bias = Double.apply(net.table(net.relative(x.shape[1])).permute(2, 0, 1).unsqueeze(0))
    return net.scores(x) + bias


def records_inside(net: Net, x: Tensor) -> Tensor:
    """Records are not the first dimension where the value is added."""
    return net.first(x).transpose(0, 1) + net.places(torch.arange(x.shape[1])).unsqueeze(1)


def written_into(net: Net, x: Tensor) -> Tensor:
    out = net.first(x).clone()
    out[:, 0] = net.places.weight[0]
    return out


def other_records(net: Net, x: Tensor) -> Tensor:
    """The bias of all records depends on the first one."""
    return net.scores(x) + net.first(x[:1]).mean()


def step(model: nn.Module, source: BookKeepingSource) -> None:
    loss(model, batch(3)).backward()
    source.finish_batch()


@pytest.mark.parametrize("bias", [only_shared, own_function, records_inside, written_into, other_records])
def test_what_cannot_be_followed_is_refused(bias: Any) -> None:
    model = net(bias)
    source, detach = attached(model)
    with pytest.raises(ValueError, match="records"):
        step(model, source)
    detach()


def test_a_use_that_begins_later_is_refused() -> None:
    """The functions of later passes are not watched: the ordinary gradient is found."""
    model = net(relative_bias)
    source, detach = attached(model)
    for _ in range(3):
        loss(model, batch()).backward()
        source.finish_batch()
        source.clear(sums=True)
    model.bias = borrowed_weight
    loss(model, batch()).backward()
    with pytest.raises(ValueError, match=r"first\.weight has an ordinary gradient"):
        source.finish_batch()
    detach()


def interrupted(net: Net, x: Tensor) -> Tensor:
    net.first(x)
    raise KeyboardInterrupt


def test_an_interrupted_pass_leaves_nothing_behind() -> None:
    """torch runs no hook after a KeyboardInterrupt. What is computed afterwards is as ever."""
    model = net(interrupted)
    source, detach = attached(model)
    with pytest.raises(KeyboardInterrupt):
        model(batch())
    source.clear(sums=True)
    assert not isinstance(model.first.weight * 2, Shared)
    with torch.no_grad():
        model.first.weight.add_(0.0)
    model.bias = disentangled
    twin = copy.deepcopy(model)
    loss(model, batch()).backward()
    want = per_sample_gradients(twin, batch(), loss)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in want.values()]).sum(0).sqrt()
    torch.testing.assert_close(source.finish_batch(), norms, rtol=1e-6, atol=0)
    assert not isinstance(model.first.weight * 2, Shared)
    detach()


class Packed(nn.Module):
    """Is called with one object that holds the tensors of the batch."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: Any) -> Tensor:
        return self.net(batch["x"] if isinstance(batch, Mapping) else batch.x)


@dataclass
class Item:
    x: Tensor


@pytest.mark.parametrize("pack", [lambda x: UserDict(x=x), lambda x: Item(x), lambda x: {"more": [{"y": x}], "x": x}])
@pytest.mark.parametrize("bias", [relative_bias, multiplied_positions, disentangled])
def test_the_batch_is_found_in_mappings_and_dataclasses(bias: Any, pack: Any) -> None:
    """transformers' BatchEncoding is a mapping that is no dict."""
    model, x = Packed(net(bias)), batch(3)
    want = per_sample_gradients(copy.deepcopy(model), x, lambda m, x: loss(m, pack(x)))
    source, detach = attached(model)
    loss(model, pack(x)).backward()
    norms = torch.stack([g.flatten(1).square().sum(1) for g in want.values()]).sum(0).sqrt()
    torch.testing.assert_close(source.finish_batch(), norms, rtol=1e-6, atol=0)
    detach()


class Hidden:
    """Holds a tensor where nobody looks."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def test_without_a_batch_nothing_is_shared_and_the_step_is_refused() -> None:
    model = Packed(net(disentangled))
    source, detach = attached(model)
    with pytest.raises(ValueError, match=r"records|ordinary gradient"):
        step_on(model, source, Hidden(batch(3)))
    detach()


def step_on(model: nn.Module, source: BookKeepingSource, x: Any) -> None:
    loss(model, x).backward()
    source.finish_batch()


def test_an_operator_with_its_overload_writes_once() -> None:
    model = net(lambda net, x: torch.ops.aten.add_.Tensor(net.scores(x), relative(net, x)).softmax(-1))
    check(model, batch(3))


def relative(net: Net, x: Tensor) -> Tensor:
    return net.table(net.relative(x.shape[1])).permute(2, 0, 1).unsqueeze(0)


def test_sizes_of_constants_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of many lengths come before one with as many records as heads."""
    for name, empty in {"known": {}, "places": {}, "constants": set()}.items():
        monkeypatch.setattr(SharedCall, name, empty)
    monkeypatch.setattr(shared, "_MOST_KINDS", 2)
    model, x = net(slopes_of_a_layer), batch(HEADS)
    want = per_sample_gradients(copy.deepcopy(model), x, loss)
    source, detach = attached(model)
    for length in (5, 6, 7, 8, 9):
        loss(model, batch(3, length)).backward()
        source.clear(sums=True)
    loss(model, x).backward()
    norms = torch.stack([g.flatten(1).square().sum(1) for g in want.values()]).sum(0).sqrt()
    torch.testing.assert_close(source.finish_batch(), norms, rtol=1e-6, atol=0)
    detach()


def test_outside_of_training_nothing_is_shared() -> None:
    model = net(disentangled)
    _, detach = attached(model)
    with torch.no_grad():
        assert type(model(batch())) is Tensor
    assert type(model.eval()(batch())) is Tensor
    detach()
