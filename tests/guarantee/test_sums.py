"""What is summed is what was clipped: values that change between norm and sum, the sum's own rounding, and policies that enlarge gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from opacus_ac import PrivacyEngine
from opacus_ac.clipping import ClipPolicy
from opacus_ac.release import StepStatistics
from opacus_ac.testing.policies import released_vector

pytestmark = pytest.mark.filterwarnings("ignore")

MODES = ("bk", "hooks", "functorch")


def private(model: nn.Module, *tensors: Tensor, secure: bool = False, batch: int | None = None, **changes):
    """``make_private`` without noise, C = 1, every record in every batch."""
    options = {
        "noise_multiplier": 0.0, "max_grad_norm": 1.0, "lr_control": False, "ema_decay": None, "loss_reduction": "sum", **changes,
    }  # fmt: skip
    if "clip_policy" not in options:
        options["clipping"] = "flat"
    engine = PrivacyEngine(secure_mode=secure)
    made = engine.make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        data_loader=DataLoader(TensorDataset(*tensors), batch_size=len(tensors[0])), **options,
    )  # fmt: skip
    return engine, *made


# ---------------------------------------------------------------- values that change between norm and sum


class InPlace(torch.autograd.Function):
    """An identity whose backward pass works in place, as some fused kernels do."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mul_(1e4)


class Beside(nn.Module):
    """Hands one gradient to a layer and to what stands beside it."""

    def __init__(self, function=None):
        super().__init__()
        self.function, self.layer, self.bias = function, nn.Linear(64, 64), nn.Linear(64, 64)
        self.eye = torch.eye(64).requires_grad_()

    def forward(self, x):
        beside = x @ self.eye if self.function is None else self.function.apply(x @ self.eye)
        return beside + self.layer(x) + self.bias(x)


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 64)

    def forward(self, ids):
        return self.table(ids)


class Repeated(nn.Module):
    """Of two uses one is written down, the other not."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(64), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.layer(self.norm(x)) + self.layer(x)


def changed_input(model, batch):
    model(batch).square().sum().backward()
    batch.mul_(7)


def changed_through_a_view(model, batch):
    model(batch).square().sum().backward()
    batch.view(-1)[:3].zero_()


def kept_gradient(model, batch):
    """The gradient at a layer's output, changed after its hooks have seen it."""
    seen = []
    output = model(batch)
    output.register_hook(lambda gradient: seen.append(gradient))
    output.square().sum().backward()
    for gradient in seen:
        gradient.mul_(3)


CHANGES = {
    "input": (Beside, changed_input),
    "a view of it": (Beside, changed_through_a_view),
    "ids": (Looked, lambda m, b: (m(b).square().sum().backward(), b.add_(1))),
    "second use": (Repeated, changed_input),
    "gradient": (Beside, kept_gradient),
    "by a backward function": (lambda: Beside(InPlace), lambda m, b: m(b).square().sum().backward()),
}


def batch_for(model: nn.Module) -> Tensor:
    return torch.randint(0, 8, (4, 3)) if isinstance(model, Looked) else torch.randn(4, 64)


@pytest.mark.parametrize("name", CHANGES)
def test_values_that_change_after_the_backward_pass_are_refused(name):
    make, change = CHANGES[name]
    torch.manual_seed(0)
    model = make()
    engine, model, optimizer, loader = private(model, batch_for(model), noise_multiplier=1.0)
    for (batch,) in loader:
        optimizer.zero_grad()
        change(model, batch)
        with pytest.raises(ValueError, match=r"(layer|bias|table).* written to in place .* copy"):
            optimizer.step()
        break
    assert not engine.accountant.history  # nothing was charged,
    assert all(p.grad is None for p in model.parameters())  # or released


@pytest.mark.parametrize("name", CHANGES)
def test_copies_are_not_refused(name):
    make, _ = CHANGES[name]
    model = make() if name != "by a backward function" else Beside()
    _, model, optimizer, loader = private(model, batch_for(model))
    for (batch,) in loader:
        copy = batch.clone()
        model(copy).square().sum().backward()
        batch.fill_(1)
        optimizer.step()
    assert sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5 <= 4.001


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("physical", [None, 2])
def test_values_that_change_even_later_are_refused_too(mode, physical):
    """After the norms: a policy of a user's own, or a hook on the step, is where code can still run."""
    torch.manual_seed(0)
    x = torch.randn(4, 64)
    held = []

    class Writes(ClipPolicy):
        def _factors(self, norms):
            for tensor in held:
                tensor.mul_(1e4)
            return super()._factors(norms)

    model = nn.Linear(64, 64, bias=False)
    _, model, optimizer, loader = private(
        model, x, grad_sample_mode=mode, clip_policy=Writes(1.0), max_physical_batch_size=physical
    )
    with pytest.raises(ValueError, match="written to in place"):  # noqa: PT012
        for (batch,) in loader:
            optimizer.zero_grad()
            model(batch).square().sum().backward()
            held[:] = [batch] if mode == "bk" else [p.grad_sample for p in model.parameters()]
            optimizer.step()
    assert all(p.grad is None or bool((p.grad == 0).all()) or mode != "bk" for p in model.parameters())


# ---------------------------------------------------------------- the sum's own rounding

UNIT = 2.0**-11  # of numbers from 4096 to 8192: beside the power of two a record more rounds up where it rounded down
OTHERS = torch.cat([torch.full((8191,), 1.0), torch.full((2048,), 1.2 * UNIT)])
TWICE = torch.cat([OTHERS, torch.full((8192 - 2,), 1.0), torch.full((4096,), 2.4 * UNIT)])


class Looks(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 1)

    def forward(self, x):
        return self.table(torch.zeros(len(x), 1, dtype=torch.long))[:, :, 0]


LAYERS = {"lookup": Looks, "dense": lambda: nn.Linear(1, 1, bias=False), "bias": lambda: nn.Linear(1, 1)}


def sum_of(layer: str, coefficients: Tensor, mode: str = "bk", **options) -> float:
    model = LAYERS[layer]()
    if layer == "bias":
        model.weight.requires_grad_(False)
    _, model, optimizer, loader = private(
        model, torch.ones(len(coefficients), 1), coefficients, grad_sample_mode=mode, **options
    )
    for x, c in loader:
        optimizer.zero_grad()
        (model(x)[:, 0] * c).sum().backward()
        optimizer.step()
    return float(next(p for p in model.parameters() if p.grad is not None).grad.sum())


def moved(layer: str, others: Tensor, **options) -> float:
    return abs(sum_of(layer, torch.cat([torch.ones(1), others]), **options) - sum_of(layer, others, **options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("others", [OTHERS, TWICE], ids=["10239 records", "22525 records"])
def test_in_secure_mode_a_record_does_not_change_how_others_are_rounded(mode, layer, others):
    assert moved(layer, others, mode=mode, secure=True) <= 1.001


@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_nor_over_physical_batches(mode):
    few = torch.cat([torch.full((255,), 1.0), torch.full((256,), 1.2 * 2.0**-16)])
    options = {"mode": mode, "max_physical_batch_size": 1, "max_grad_norm": 1.01}
    assert moved("dense", few, secure=True, **options) <= 1.001
    if mode == "bk":
        assert moved("dense", few, **options) > 1.003  # what is left in the default mode


@pytest.mark.parametrize("fused", [False, True])
def test_noise_is_added_before_the_sum_is_rounded(fused):
    """In secure mode the sum is float64 until then; gradients are of the parameters' type all the same."""
    model = nn.Linear(8, 4)
    seen = []
    _, model, optimizer, loader = private(model, torch.randn(6, 8), secure=True, noise_multiplier=1.0, fused_step=fused)
    add = optimizer.mechanism.stream.add_normal
    optimizer.mechanism.stream.add_normal = lambda t, *a: (seen.extend(x.dtype for x in t), add(t, *a))[1]
    for (x,) in loader:
        model(x).square().sum().backward()
        optimizer.step()
    assert set(seen) == {torch.float64}
    assert fused or all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_lookups_are_added_up_in_float64_by_default_too():
    assert moved("lookup", OTHERS) <= 1.001


# ---------------------------------------------------------------- policies and the room that the histogram takes


class Normalised(ClipPolicy):
    """Enlarges small gradients where there are as many as in the batch, and only there: no grid of norms shows it."""

    name, needs_histogram = "normalised", True

    def _factors(self, norms):
        return self._bound / norms.clamp(min=1e-12) if len(norms) == RECORDS else super()._factors(norms)


class Spike(ClipPolicy):
    """Doubles gradients of a hair's breadth."""

    name, needs_histogram = "spike", True

    def _factors(self, norms):
        return torch.where((norms - SPIKE).abs() < 1e-7, 2.0, (self._bound / norms).clamp(max=1))


RECORDS, SPIKE = 8, 0.2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", [Normalised, Spike])
def test_factors_are_held_to_the_share_that_the_histogram_was_encoded_with(policy, mode):
    engine, model, optimizer, loader = private(
        nn.Linear(16, 4, bias=False).double(), torch.ones(RECORDS, 16, dtype=torch.float64), noise_multiplier=1.0,
        clip_policy=policy(1.0), grad_sample_mode=mode,
    )  # fmt: skip
    for (x,) in loader:
        optimizer.zero_grad()
        (model(x)[:, 0] * torch.linspace(0.9, 1.0, RECORDS) * SPIKE / 4).sum().backward()
        with pytest.raises(ValueError, match=r"gradient_share"):
            optimizer.step()
        break
    assert not engine.accountant.history  # nothing was charged,
    assert optimizer.released is None  # or released


def test_it_is_the_check_that_refuses_them(monkeypatch):
    """Planted: a step without it releases more than is declared."""
    monkeypatch.setattr(StepStatistics, "check_kept", lambda *_: None)
    gradients = torch.full((RECORDS, 5), 0.02, dtype=torch.float64)
    whole = released_vector(gradients, clip_policy=Normalised(1.0), statistics=StepStatistics(), lr_control=False)
    assert float(whole.norm()) / RECORDS > StepStatistics().sensitivity * 1.1
