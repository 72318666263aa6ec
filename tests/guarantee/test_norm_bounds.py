"""Norms are upper bounds: no record, however it is made, adds more than C to the sum, whatever the route, the mode and the type.

Records are made by their sides: a loss ``(layer(x) * g).sum()`` has the output gradient g and the input x. One of four records is the
attacker's; the un-noised sum of a step with it is compared with that of a step where it is zero, so that all else is the same.
"""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample import expand_broadcast_embeddings, register_rules
from opacus_ac.grad_sample.one_backward import bounds, certified, norm_sums
from opacus_ac.grad_sample.one_backward import outer_products as terms
from opacus_ac.grad_sample.one_backward.bounds import Certificates, squared_norms
from opacus_ac.grad_sample.one_backward.source import BookKeepingSource

pytestmark = pytest.mark.filterwarnings("ignore")

RECORDS, SLACK = 4, 1e-3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs(size: float, other: float, share: float = 0.0):
    """The same features twice with opposite gradients, up to a share."""

    def make(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[0] // 2
        x[half : 2 * half], g[half : 2 * half] = x[:half], -g[:half] * (1 + share)
        x[2 * half :] = 0
        return x * size, g * other

    return make


def repeated(value: float, other: float):
    """The same position again and again, of values whose products round to one side."""

    def make(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(x, value), torch.full_like(g, other)

    return make


def stepped(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two first, and then positions of which each is lost beside it."""
    x[0], g[0] = 2.0**13, 2.0**13
    x[1:], g[1:] = 1 + 2.0**-12, 1 + 2.0**-12
    return x, g


def drowned(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """What is left beside two positions that cancel is lost if these are added first, or last."""
    x[-1], g[-1] = x[0], -g[0]
    x[[0, -1]], g[[0, -1]] = 3e5 * x[[0, -1]], 3e5 * g[[0, -1]]
    return x, g


def scaled(size: float, other: float):
    return lambda x, g: (x * size, g * other)


KINDS = {
    "ordinary": scaled(10, 10),
    "cancelling": pairs(1e3, 1e3),
    "cancelling, large": pairs(1e7, 1e6),
    "cancelling, huge": pairs(1e16, 1e12),
    "cancelling, nearly": pairs(1e3, 1e3, 1e-6),
    "cancelling, to a tenth": pairs(30, 30, 0.1),
    "repeating": repeated(1 / 3, 1 / 3),
    "repeating, of one size": repeated(1 + 2.0**-11, 1 - 2.0**-12),
    "powers of two": stepped,
    "drowned": drowned,
    "huge": scaled(1e16, 1e10),
    "huge beside tiny": scaled(1e16, 1e-15),
    "huge beside what has no square": scaled(1e18, 1e-24),
    "tiny": scaled(1e-20, 1e-10),
    "subnormal": scaled(1e-40, 1.0),
}


class Net(nn.Module):
    """Layers that a route needs; :meth:`loss` of records ``x`` ``[B, T, J]`` and ``g`` ``[B, T, I]``."""

    def __init__(self, route: str) -> None:
        super().__init__()
        self.route = route
        _, self.width, self.height = ROUTES[route]
        if route in ("lookup", "cross"):
            self.table = nn.Embedding(self.height, self.width)
        if route not in ("lookup", "rows", "replay"):
            self.layer = nn.Linear(self.width, self.height, bias=route == "kept")
        if route == "cross":
            self.layer.weight = self.table.weight
        if route == "rows":
            self.layer = nn.LayerNorm(self.width)
        if route == "replay":
            self.layer = Scale(self.width)
        if route.startswith("experts"):
            self.layer = Mixture(self.width, self.height)
        for parameter in self.parameters():
            if parameter.requires_grad:
                nn.init.zeros_(parameter)

    def loss(self, x: Tensor, g: Tensor) -> Tensor:
        """The sum of the records' losses; one token of three is the same in all of a record."""
        ids = torch.arange(x.shape[1], device=x.device).remainder(3).expand(x.shape[:2])
        total = x.new_zeros(())
        if self.route in ("lookup", "cross"):
            total = total + (self.table(ids) * x).sum()
        if self.route != "lookup":
            total = total + (self.layer(x) * g).sum()
        if self.route == "two uses":
            total = total + (self.layer(x.flip(1)) * g).sum()
        return total


class Scale(nn.Module):
    """Has no rule, and one long dimension."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def experts(width: int, height: int) -> nn.Module:
    """Three experts of transformers' kind, of which all positions take the second; what follows their product changes nothing."""
    moe = pytest.importorskip("transformers.integrations.moe")

    class Experts(nn.Module):
        def __init__(self, config: object) -> None:
            super().__init__()
            self.num_experts, self.act_fn = 3, nn.Identity()
            self.up_proj = nn.Parameter(torch.zeros(3, height, width))
            self.down_proj = nn.Parameter(torch.eye(height).repeat(3, 1, 1), requires_grad=False)

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return nn.functional.linear(hidden_states, self.up_proj[1])

    config = SimpleNamespace(_experts_implementation="eager")
    return moe.use_experts_implementation(Experts, has_gate=False)(config)


class Mixture(nn.Module):
    """Hands the positions of all records to its experts."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.experts = experts(width, height)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[2])
        chosen = torch.ones(len(rows), 1, dtype=torch.long)
        return self.experts(rows, chosen, rows.new_ones(len(rows), 1)).view(*x.shape[:2], -1)


ROUTES = {  # positions, J, I
    "gram": (12, 40, 48),
    "kept": (64, 16, 24),
    "lookup": (12, 24, 9),
    "cross": (8, 24, 40),
    "two uses": (6, 40, 48),
    "users": (12, 40, 48),
    "rows": (16, 33, 33),
    "replay": (8, 5000, 5000),
    "experts": (12, 40, 48),
    "experts, written down": (64, 16, 24),
}
TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16 autocast": torch.float32}
RUNS = [
    (route, kind, mode)
    for route in ROUTES
    for kind in TYPES
    for mode in ("bk", "hooks", "functorch")
    if mode != "functorch" or route not in ("cross", "two uses")
    if mode == "bk" or not route.startswith("experts")
]


def of_users(users: list[list[tuple[Tensor, Tensor]]]) -> tuple[Tensor, ...]:
    """The rows of all users, ``[U K, J]`` and ``[U K, I]``."""
    return tuple(torch.stack(side) for side in zip(*(row for user in users for row in user), strict=True))


class Run:
    """A model made private, C = 1, whose loader gives all records at every step."""

    def __init__(
        self, route: str, kind: str, mode: str, records: int = RECORDS, secure: bool = False, net: type[nn.Module] = Net
    ) -> None:
        positions, width, height = ROUTES[route]
        self.kind = kind
        dtype = TYPES[kind]
        self.x = randn(records, positions, width, seed=1).to(dtype)
        self.g = randn(records, positions, height, seed=2).to(dtype)
        self.model = net(route).to(dtype)
        data = TensorDataset(self.x, self.g)
        options = {}
        if route == "users":  # a user's rows instead of a record's positions
            data = [[(x[k], g[k]) for k in range(positions)] for x, g in zip(self.x, self.g, strict=True)]
            options = {"max_rows_per_user": positions}
        self.private, self.optimizer, self.loader = PrivacyEngine(secure_mode=secure).make_private(
            module=self.model, optimizer=torch.optim.SGD(self.model.parameters(), lr=0.0),
            data_loader=DataLoader(data, batch_size=records, collate_fn=of_users if options else None),
            noise_multiplier=0.0, max_grad_norm=1.0, clipping="flat", lr_control=False, ema_decay=None, loss_reduction="sum",
            grad_sample_mode=mode, **options,
        )  # fmt: skip

    def sum(self, x: Tensor, g: Tensor) -> Tensor:
        """The sum that a step releases when record 1 has these sides ``[T, J]`` and ``[T, I]``."""
        self.x[1], self.g[1] = x, g
        for batch in self.loader:
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in self.kind):
                loss = self.model.loss(*batch)
            loss.backward()
            self.optimizer.step()
        return torch.cat([p.grad.reshape(-1).double() for p in self.model.parameters() if p.requires_grad])

    def moves(self) -> dict[str, float]:
        """By how much a record of each kind moves the sum, in units of C."""
        x, g = self.x[1].clone(), self.g[1].clone()
        without = self.sum(torch.zeros_like(x), torch.zeros_like(g))
        moved = {}
        for name, make in KINDS.items():
            made = make(x.double(), g.double())
            moved[name] = float((self.sum(*(side.to(x.dtype) for side in made)) - without).norm())
        return moved


@pytest.mark.parametrize(("route", "kind", "mode"), RUNS)
def test_no_record_adds_more_than_the_bound(route, kind, mode):
    moved = Run(route, kind, mode).moves()
    assert max(moved.values()) <= 1 + SLACK, moved
    assert moved["ordinary"] >= 0.99, moved  # and a record that is clipped uses its room


@pytest.mark.parametrize("halves", ["as they are"], indirect=True)
@pytest.mark.parametrize("route", ["gram", "kept", "cross", "two uses", "users", "experts", "experts, written down"])
def test_no_record_adds_more_by_products_of_half_precision(route, halves):
    """On a device that multiplies bfloat16 with float32 results, which is played on the CPU."""
    moved = Run(route, "bfloat16 autocast", "bk").moves()
    assert halves
    assert max(moved.values()) <= 1 + SLACK, moved
    assert moved["ordinary"] >= 0.99, moved


def bare(self: Certificates) -> Tensor:
    return self.squares.clamp(min=0).sqrt()


def without_errors(self: Certificates, bounds=Certificates.bounds) -> Tensor:
    return bounds(dataclasses.replace(self, norm_error=0.0, sum_error=0.0))


@pytest.mark.parametrize("route", ["gram", "two uses", "users", "cross", "experts"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16 autocast"])
@pytest.mark.parametrize(("planted", "worthwhile"), [(bare, math.inf), (without_errors, certified.WORTHWHILE)])
def test_the_battery_finds_norms_that_are_no_bounds(planted, worthwhile, route, kind, monkeypatch):
    """Planted: the computed norm as it is; and a bound without its two errors, which would tell what to compute in float64."""
    monkeypatch.setattr(Certificates, "bounds", planted)
    monkeypatch.setattr(certified, "WORTHWHILE", worthwhile)
    assert max(Run(route, kind, "bk").moves().values()) > 1 + 5 * SLACK


@pytest.mark.parametrize("route", ["gram", "two uses", "users", "cross", "experts"])
def test_bounds_hold_without_float64_too(route, monkeypatch):
    """It is there for the records' sake: what cancels would otherwise be clipped to nothing."""
    honest = Run(route, "float32", "bk").moves()
    monkeypatch.setattr(certified, "WORTHWHILE", math.inf)
    moved = Run(route, "float32", "bk").moves()
    assert max(moved.values()) <= 1 + SLACK
    assert moved["cancelling, nearly"] < 0.9 * honest["cancelling, nearly"]
    assert honest["cancelling, nearly"] > 0.999 or route == "cross"


# ---------------------------------------------------------------- long dimensions


class Long(nn.Module):
    """A bias, and a matrix of one column, of millions of entries."""

    def __init__(self, route: str) -> None:
        super().__init__()
        self.layer = nn.Linear(1, ROUTES[route][2])

    def loss(self, x: Tensor, g: Tensor) -> Tensor:
        return (self.layer(x[:, 0]) * g[:, 0]).sum()


@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_one_long_dimension(mode, monkeypatch):
    """A flat float32 norm of millions of entries is thousandths too small."""
    entries = 5_000_000
    monkeypatch.setitem(ROUTES, "long", (1, 1, entries))
    run = Run("long", "float32", mode, records=2, net=Long)
    one, thirds = torch.ones(1, 1), torch.full((1, entries), 1 / 3)
    without = run.sum(one, torch.zeros(1, entries))
    assert float((run.sum(one, thirds) - without).norm()) <= 1 + 1e-6
    monkeypatch.setattr(bounds, "BLOCK", 1 << 40)
    for module in (bounds, norm_sums):
        monkeypatch.setattr(module, "relative_error", lambda *_: 0.0)
    assert float((run.sum(one, thirds) - without).norm()) > 1 + SLACK  # the blocks are what does it


@pytest.mark.parametrize("entries", [1, 1023, 1024, 1025, 50_000, 1_000_000])
@pytest.mark.parametrize("kind", ["normal", "uniform", "equal"])
def test_squared_norms_of_any_length(entries, kind):
    rows = {
        "normal": randn(2, entries),
        "uniform": randn(2, entries).abs() + 0.5,
        "equal": torch.full((2, entries), 1 / 3),
    }
    rows = rows[kind].float()
    torch.testing.assert_close(squared_norms(rows), rows.double().square().sum(1), rtol=2e-6, atol=0)


# ---------------------------------------------------------------- what it costs, and on what it depends


def norms_and_bounds(model: nn.Module, batch: object, loss_fn: object) -> tuple[Tensor, Tensor]:
    """Norms as computed and the bounds by which records are clipped."""
    register_rules(model)
    named = dict(model.named_parameters())
    source = BookKeepingSource(model, list(named.values()), list(named), "sum")
    with expand_broadcast_embeddings(model):
        detach = source.attach()
        loss_fn(model, batch).backward()
        found = source.finish_batch()
        detach()
    return source.parameter_squares().sum(1).sqrt(), found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["qwen2-tied", "gpt2"])
def test_ordinary_records_lose_little(name, autocast):
    """At most one per cent of the median factor; half of it is what is aimed at."""
    torch.manual_seed(0)
    model = tiny_models.build(name, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        norms, found = norms_and_bounds(model, tiny_models.token_batch(8, 16), tiny_models.mean_loss)
    assert float((found / norms).median()) < 1.005


@pytest.mark.parametrize(("positions", "width", "height"), [(64, 128, 384), (128, 384, 1056), (512, 768, 2048)])
def test_layers_of_real_sizes_lose_little(positions, width, height):
    torch.manual_seed(0)
    layer = nn.Linear(width, height, bias=False)
    x, g = torch.randn(4, positions, width), torch.randn(4, positions, height)
    norms, found = norms_and_bounds(layer, (x, g), lambda m, b: (m(b[0]) * b[1]).sum())
    assert 1.0001 < float((found / norms).median()) < 1.01


SIDES = {
    "a longer record": lambda x, g: (nn.functional.pad(x, (0, 0, 0, 9)), nn.functional.pad(g, (0, 0, 0, 9))),
    "so long that gradients are written down": lambda x, g: (nn.functional.pad(x, (0, 0, 0, 90)), nn.functional.pad(g, (0, 0, 0, 90))),
    "many records": lambda x, g: (x.repeat(150, 1, 1), g.repeat(150, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("change", SIDES)
def test_a_record_has_its_bound_whatever_is_beside_it(change):
    """Else the factors of all others would follow the length of one record, or whether it is there."""
    layer = nn.Linear(80, 96, bias=False)
    x, g = randn(4, 16, 80, seed=1).float(), randn(4, 16, 96, seed=2).float()
    alone = norms_and_bounds(layer, (x, g), lambda m, b: (m(b[0]) * b[1]).sum())[1]
    beside = norms_and_bounds(layer, SIDES[change](x, g), lambda m, b: (m(b[0]) * b[1]).sum())[1]
    torch.testing.assert_close(beside[:4], alone, rtol=1e-6, atol=0)
    assert terms.keeps(16 + 90, 96, 80)
    assert not terms.keeps(16 + 9, 96, 80)
