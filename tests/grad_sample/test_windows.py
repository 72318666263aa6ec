"""Layers that cut records into windows, and layers with the time first: each record's gradient is its own, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample import register_rules, register_windows
from opacus_ac.grad_sample.one_backward.shared import SharedCall
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource
from opacus_ac.grad_sample.oracle import select_records
from opacus_ac.testing import per_sample_gradients

W, D, HEADS = 3, 4, 2
Bias = Callable[["Attention", Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Attention inside of windows ``[B K, W, D]``; ``bias`` changes its scores ``[B K, heads, W, W]``."""

    def __init__(self, bias: Bias) -> None:
        super().__init__()
        self.bias = bias
        self.qkv = nn.Linear(D, 3 * D)
        self.table = nn.Embedding(2 * W - 1, HEADS)
        self.own = OwnTable()
        self.mlp = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, HEADS))
        self.scale = nn.Linear(HEADS, 1, bias=False)
        steps = torch.arange(W)
        self.register_buffer("steps", steps[None] - steps[:, None] + W - 1)
        self.register_buffer("grid", torch.linspace(-1, 1, 2 * W - 1).reshape(1, -1, 1))

    def forward(self, windows: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(windows).view(*windows.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = self.bias(self, q @ k.transpose(2, 3), mask)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class OwnTable(nn.Module):
    """Swin: a bias for all windows from a parameter that no other module sees."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * W - 1, HEADS))

    def forward(self) -> Tensor:
        steps = torch.arange(W)
        index = (steps[None] - steps[:, None] + W - 1).view(-1)
        return self.table[index].view(W, W, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def of_rows(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the mask ``[K, W, W]`` of each row ``[B K, 1, W, W]``."""
    return mask[:, None].unsqueeze(0).expand(len(scores) // len(mask), -1, -1, -1, -1).reshape(-1, 1, W, W)


def only_layers(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    return scores


def own_table(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    return scores + net.own()


def masked_table(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    """Swin: the constant mask is added to the bias before the scores are."""
    return scores + (net.own() + of_rows(scores, mask))


def mask_of_windows(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    """Swin v2: the scores are split into records and windows."""
    split = scores.view(-1, len(mask), HEADS, W, W) + mask.unsqueeze(1).unsqueeze(0)
    return split.view(-1, HEADS, W, W) + net.table(net.steps).permute(2, 0, 1)


def positions(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    bias = net.table(net.steps).permute(2, 0, 1).unsqueeze(0)
    return scores * bias + bias.sigmoid()


def continuous(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    """Swin v2: a network on constant positions, whose output is looked up."""
    table = net.mlp(net.grid).view(-1, HEADS)
    return scores + 16 * torch.sigmoid(table[net.steps.view(-1)].view(W, W, -1).permute(2, 0, 1))


def in_place(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    scores = scores * 1.0
    scores += net.table(net.steps).permute(2, 0, 1)
    return scores


def borrowed(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    """A parameter is used outside of its module."""
    return scores * net.scale.weight.view(HEADS, 1, 1).exp()


def multiplied(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    return torch.matmul(scores, net.own().softmax(-1))


BIASES = [
    only_layers, own_table, masked_table, mask_of_windows, positions, continuous, in_place, borrowed, multiplied,
]  # fmt: skip


class Scaled(nn.Module):
    """Swin v2: a parameter of its own, so that the whole attention is run again."""

    def __init__(self, bias: Bias) -> None:
        super().__init__()
        self.inner = Attention(bias)
        self.scale = nn.Parameter(torch.rand(D))

    def forward(self, windows: Tensor, mask: Tensor) -> Tensor:
        return self.inner(windows * self.scale, mask)


class Layer(nn.Module):
    """Cuts ``[B, K W, D]`` into windows."""

    windows_first = False

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(D), attention

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[1] // W
        windows = self.norm(x).unflatten(1, (count, W))
        windows = (windows.transpose(0, 1) if self.windows_first else windows).flatten(0, 1)
        mask = torch.arange(count, dtype=x.dtype)[:, None, None] * torch.eye(W, dtype=x.dtype)
        out = self.attended(windows, mask)
        if self.windows_first:
            return x + out.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2)
        return x + out.unflatten(0, (-1, count)).flatten(1, 2)

    def attended(self, windows: Tensor, mask: Tensor) -> Tensor:
        return self.attention(windows, mask)


class Checkpointed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class PartCheckpointed(Layer):
    def attended(self, windows: Tensor, mask: Tensor) -> Tensor:
        return checkpoint(self.attention, windows, mask, use_reentrant=False)


class WindowsFirst(Layer):
    """Puts the first windows of all records one after the other, which is not what is registered."""

    windows_first = True


class Unnamed(Layer):
    """Is not registered."""


for cls in (Layer, Checkpointed, PartCheckpointed, WindowsFirst):
    register_windows(cls, "attention")


class Net(nn.Module):
    def __init__(self, attention: Callable[[], nn.Module], layer: type[Layer] = Layer) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, 2)
        self.layers = nn.ModuleList(layer(attention()) for _ in range(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x.tanh().mean(1))


def net(attention: Callable[[], nn.Module], layer: type[Layer] = Layer) -> Net:
    torch.manual_seed(0)
    return Net(attention, layer).double().train()


def batch(records: int, windows: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(records, windows * W, D, generator=generator, dtype=torch.float64)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum(1).mean()


def check(model: nn.Module, batches: list[Any], loss: Callable[..., Tensor] = loss, rtol: float = 1e-7) -> None:
    """Compare norms and weighted sums of every batch with a loop over single records."""
    twin = copy.deepcopy(model)
    register_rules(model)
    named = dict(model.named_parameters())
    source = BookKeepingSource(model, list(named.values()), list(named))
    detach = source.attach()
    for x in batches:
        want = per_sample_gradients(twin, x, loss)
        loss(model, x).backward()
        norms = torch.stack([g.flatten(1).square().sum(1) for g in want.values()]).sum(0).sqrt()
        torch.testing.assert_close(source.finish_batch(), norms, rtol=rtol, atol=0, check_dtype=False)
        weights = torch.rand(len(norms), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        source.accumulate(weights)
        for (name, rows), total in zip(want.items(), source.sums(), strict=True):
            expected = torch.einsum("i,i...->...", weights, rows.double())
            total = torch.zeros_like(expected) if total is None else total.double()
            atol = rtol * max(float(expected.abs().max()), 0.1)  # the bias of keys has no gradient
            torch.testing.assert_close(total, expected, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
        source.clear(sums=True)
    detach()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, empty in {"known": {}, "places": {}, "constants": set()}.items():
        monkeypatch.setattr(SharedCall, name, empty)


FIRST = [(2, 4), (3, 3), (4, 1), (1, 4)]
"""Records and windows of the first batches: also as many windows as records, one window, and one record."""
SHAPES = [(4, 2), (2, 3), (3, 3), (4, 1)]


@pytest.mark.parametrize("first", FIRST, ids=str)
@pytest.mark.parametrize("bias", BIASES, ids=lambda b: b.__name__)
def test_each_record_has_its_own_part(bias: Bias, first: tuple[int, int]) -> None:
    """The first passes are watched, later ones are not; the number of windows changes between batches."""
    check(net(lambda: Attention(bias)), [batch(*shape) for shape in (first, first, *SHAPES)])


@pytest.mark.parametrize("bias", [only_layers, masked_table, mask_of_windows], ids=lambda b: b.__name__)
def test_a_part_that_is_run_again_as_a_whole(bias: Bias) -> None:
    check(net(lambda: Scaled(bias)), [batch(*shape) for shape in SHAPES])


@pytest.mark.parametrize("attention", [Attention, Scaled])
@pytest.mark.parametrize("layer", [Checkpointed, PartCheckpointed])
@pytest.mark.parametrize("bias", [masked_table, continuous], ids=lambda b: b.__name__)
def test_inside_a_checkpoint(bias: Bias, layer: type[Layer], attention: Callable[[Bias], nn.Module]) -> None:
    check(net(lambda: attention(bias), layer), [batch(*shape) for shape in SHAPES])


def test_records_in_another_order_have_the_same_gradients() -> None:
    x, order = batch(4, 4), torch.tensor([2, 0, 3, 1])
    check(net(lambda: Attention(masked_table)), [x, select_records(x, order), x.flip(0)])


def test_frozen_layers_below() -> None:
    """The scores do not require a gradient, so that only the watched passes tell what comes from the batch."""
    model = net(lambda: Attention(masked_table))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("own" in name or "last" in name)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    register_rules(model)
    named = {n: p for n, p in model.named_parameters() if n in trained}
    twin = copy.deepcopy(model)
    source = BookKeepingSource(model, list(named.values()), list(named))
    detach = source.attach()
    for shape in [(3, 3), (3, 3), *SHAPES]:
        want = per_sample_gradients(twin, batch(*shape), loss)
        loss(model, batch(*shape)).backward()
        norms = torch.stack([want[n].flatten(1).square().sum(1) for n in named]).sum(0).sqrt()
        torch.testing.assert_close(source.finish_batch(), norms, rtol=1e-7, atol=0)
        source.clear(sums=True)
    detach()


def test_a_failed_pass_leaves_nothing() -> None:
    def fails(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
        if net.qkv.weight[0, 0] > 5:
            raise RuntimeError("once")
        return own_table(net, scores, mask)

    model = net(lambda: Attention(fails))
    register_rules(model)
    source = BookKeepingSource(model, list(model.parameters()), [n for n, _ in model.named_parameters()])
    detach = source.attach()
    weight = model.layers[0].attention.qkv.weight
    before = weight.detach().clone()
    weight.data[0, 0] = 9.0
    with pytest.raises(RuntimeError, match="once"):
        model(batch(2, 4))
    assert source._capture is not None
    assert source._capture._windows.now is None
    weight.data.copy_(before)
    detach()
    check(model, [batch(2, 4)])


def test_copies_and_pickles_do_nothing() -> None:
    model = net(lambda: Attention(own_table))
    source = BookKeepingSource(model, list(model.parameters()), [n for n, _ in model.named_parameters()])
    register_rules(model)
    detach = source.attach()
    copied = copy.deepcopy(model)
    copied(batch(2, 4))
    assert source._capture is not None
    assert source._capture._windows.__reduce__()[0]()._start(copied, (), {}) is None
    assert not source._capture._windows._records
    detach()


# ---------------------------------------------------------------- refused


def first_step(model: nn.Module, x: Tensor) -> None:
    """Take the first step of a run, in which some records are also run by themselves."""
    private, optimizer, batches = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        data_loader=DataLoader(list(x), batch_size=len(x)),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
    )
    optimizer.zero_grad()
    loss(private, next(iter(batches))).backward()
    optimizer.step()


def test_the_first_step_is_taken() -> None:
    model = net(lambda: Attention(masked_table))
    before = copy.deepcopy(model)
    first_step(model, batch(6, 4))
    assert not torch.equal(model.first.weight, before.first.weight)


def expanded(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    return scores + net.own().expand(len(scores), -1, -1, -1).contiguous()


def repeated(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    return scores + net.own().repeat(len(scores), 1, 1, 1)


def mask_through_a_layer(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    """A layer gets a row for each window of one record, and there are as many windows as records."""
    turned = net.qkv(mask[:, :1].expand(-1, W, -1)[..., :1].expand(-1, -1, D))
    return scores.view(-1, len(mask), HEADS, W, W) + turned.sum((1, 2)).view(1, -1, 1, 1, 1)


def flat_mask_through_a_layer(net: Attention, scores: Tensor, mask: Tensor) -> Tensor:
    return mask_through_a_layer(net, scores, mask).flatten(0, 1)


REFUSED = {
    "a layer that is not named": (lambda: net(lambda: Attention(only_layers), Unnamed), (6, 4), "register_windows"),
    "as many windows as records": (lambda: net(lambda: Attention(only_layers), Unnamed), (4, 4), "register_windows"),
    "windows of other records between": (
        lambda: net(lambda: Attention(only_layers), WindowsFirst),
        (6, 4),
        "not the one that it gets alone",
    ),
    "and as many windows as records": (
        lambda: net(lambda: Attention(own_table), WindowsFirst),
        (4, 4),
        "not the one that it gets alone",
    ),
    "a value that is expanded to all windows": (lambda: net(lambda: Attention(expanded)), (6, 4), "without expand"),
    "a value that is repeated for all windows": (
        lambda: net(lambda: Attention(repeated)),
        (6, 4),
        "it is not clear which record",
    ),
    "a layer inside on what windows share": (
        lambda: net(lambda: Attention(flat_mask_through_a_layer)),
        (4, 4),
        "4 rows inside of a layer with 4 windows of each of 4 records",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_clear_is_refused(name: str) -> None:
    made, shape, message = REFUSED[name]
    model = made()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        first_step(model, batch(*shape))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_windows_that_records_do_not_share_equally() -> None:
    class Uneven(Layer):
        def attended(self, windows: Tensor, mask: Tensor) -> Tensor:
            return torch.cat([self.attention(windows[:-1], mask), windows[-1:]])

    register_windows(Uneven, "attention")
    with pytest.raises(ValueError, match="Attention gets 11 windows of 3 records"):
        check(net(lambda: Attention(only_layers), Uneven), [batch(3, 4)])


def test_what_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match=r"subclass of torch\.nn\.Module"):
        register_windows(int, "attention")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="name the parts of Layer"):
        register_windows(Layer)

    class Other(Layer): ...

    register_windows(Other, "attn")
    with pytest.raises(ValueError, match="Other has no part attn"):
        check(net(lambda: Attention(only_layers), Other), [batch(3, 4)])


# ---------------------------------------------------------------- the time first


def longformer(length: int = 8, window: int = 4) -> nn.Module:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = LongformerConfig(hidden_size=8, num_attention_heads=2, attention_window=[window], pad_token_id=0)
            config.attention_probs_dropout_prob = 0.0
            self.words, self.attention = nn.Embedding(20, 8), LongformerSelfAttention(config, 0)

        def forward(self, ids: Tensor, whole: Tensor) -> Tensor:
            reach = torch.where(ids == 0, -1e4, whole * 1e4)
            out = self.attention(
                self.words(ids),
                attention_mask=reach,
                is_index_masked=reach < 0,
                is_index_global_attn=reach > 0,
                is_global_attn=bool((reach > 0).any()),
            )[0]
            return out.mean(1)

    torch.manual_seed(0)
    return Text().train()  # in float64 its masks are no numbers, because the softmax is in float32


def texts(records: int, whole: int, length: int = 8) -> tuple[Tensor, Tensor]:
    """Return padded ids, and for each record another number of positions, at most ``whole``, that all attend to."""
    generator = torch.Generator().manual_seed(records)
    ids = torch.randint(1, 20, (records, length), generator=generator)
    numbers = torch.arange(records)[:, None] % (whole + 1)
    ids[torch.arange(length) >= length - numbers.clamp(max=2)] = 0  # a window of padding only has no number
    return ids, (torch.arange(length) < numbers).float()


@pytest.mark.parametrize("whole", [0, 1, 3])
def test_longformer_with_positions_that_all_attend_to(whole: int) -> None:
    def loss(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
        return model(*rows).square().sum(1).mean()

    # Of 8 records, the batch is as large as the sequence is long.
    check(longformer(), [texts(records, whole) for records in (5, 8, 1, 4, 3)], loss, rtol=1e-3)
