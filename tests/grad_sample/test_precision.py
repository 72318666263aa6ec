"""Norms and clipped sums are computed in float32, also in programs that ask for faster products."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import one_backward
from torch.overrides import TorchFunctionMode

from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample import precision
from opacus_ac.grad_sample.precision import exact

NEW = hasattr(torch.backends.mkldnn, "matmul")


def _set(owner, name, value):
    return lambda: setattr(owner(), name, value)


#: How a program asks for products below float32.
WAYS = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": _set(lambda: torch.backends.cuda.matmul, "allow_tf32", True),
}
if NEW:
    WAYS |= {
        "everywhere": _set(lambda: torch.backends, "fp32_precision", "tf32"),
        "oneDNN": _set(lambda: torch.backends.mkldnn, "fp32_precision", "bf16"),
        "products of oneDNN": _set(lambda: torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
        "convolutions of oneDNN": _set(lambda: torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
        "products on GPUs": _set(lambda: torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    }


def settings():
    if not NEW:
        return torch.get_float32_matmul_precision()
    backends = torch.backends
    owners = [backends, backends.mkldnn, backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul]
    return [owner.fp32_precision for owner in owners]


@pytest.fixture(params=WAYS)
def asked(request):
    """A program that asked for faster products, and what it had set."""
    WAYS[request.param]()
    yield settings()
    torch.set_float32_matmul_precision("highest")
    if NEW:
        backends = torch.backends
        for owner in (backends, backends.mkldnn, backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul):
            owner.fp32_precision = "none"
    assert torch.get_float32_matmul_precision() == "highest"


PRODUCTS = (
    "mm",
    "bmm",
    "mv",
    "addmm_",
    "baddbmm",
    "einsum",
    "linear",
    "matmul",
    "conv2d_weight",
    "convolution_backward",
)


class Spy(TorchFunctionMode):
    """Notes, for every product that torch is asked for, whether it would have float32's precision."""

    def __init__(self):
        super().__init__()
        self.full: dict[str, set[bool]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in PRODUCTS:
            self.full.setdefault(name, set()).add(all(value in precision._FULL for value in precision._read()))
        return func(*args, **(kwargs or {}))


def private(mode):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).train()
    rows = torch.utils.data.TensorDataset(torch.randn(40, 6), torch.randint(3, (40,)))
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        data_loader=torch.utils.data.DataLoader(rows, batch_size=8),
        noise_multiplier=1.0,
        grad_sample_mode=mode,
    )
    return model, optimizer, loader


@pytest.mark.parametrize("mode", ["bk", "hooks"])
def test_a_step_is_computed_in_float32_and_the_model_as_asked(mode, asked):
    model, optimizer, loader = private(mode)
    x, y = next(batch for batch in loader if len(batch[0]))
    with Spy() as forward:
        output = model(x)
    assert forward.full["linear"] == {False}
    with Spy() as rest:
        torch.nn.functional.cross_entropy(output, y).backward()
        if mode == "hooks":
            rest.full.clear()  # Opacus's own; what is released is the clipped sum of what they left, whatever that is
        optimizer.step()
    assert rest.full
    assert all(full == {True} for full in rest.full.values()), rest.full
    assert settings() == asked


class RoundsBatches(torch.nn.Module):
    """A module without a rule, whose products are as far off on a batch as in TF32, and right on a single record."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(6, 5))

    def forward(self, x):
        return (x @ self.weight) * (1.0 if x.shape[0] == 1 else 1 + 1e-3)


def replayed():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(RoundsBatches()).train(), torch.randn(4, 6)
    return one_backward(model, x, lambda model, rows: model(rows).square().sum(1).mean())[0]


def test_a_module_that_is_run_again_may_differ_by_what_was_asked():
    with pytest.raises(ValueError, match="does not return what it returned on the batch"):
        replayed()
    torch.set_float32_matmul_precision("high")
    try:
        assert replayed().shape == (4,)
    finally:
        torch.set_float32_matmul_precision("highest")


def lowered(x, bits):
    """``x`` rounded to a mantissa of so many bits."""
    step = 2.0 ** (torch.floor(torch.log2(x.abs())) - bits)
    return (x / step).round() * step


@pytest.mark.parametrize(("bits", "bound"), [(10, 1e-3), (7, 8e-3)], ids=["tf32", "bfloat16"])
def test_norms_of_lowered_products_would_be_off_by_more_than_is_allowed(bits, bound, monkeypatch):
    """What the setting is taken back for: 1e-4 is what a clipped record may exceed C by."""
    from opacus_ac.grad_sample.one_backward import outer_products as terms
    from opacus_ac.grad_sample.one_backward.certified import certified
    from opacus_ac.grad_sample.one_backward.gram import GramCache
    from opacus_ac.grad_sample.one_backward.parameter_book import ParameterBook

    monkeypatch.setattr(terms, "KEEP_FACTOR", 0.0)
    left, right = torch.full((3, 4, 8), 1 + 2**-8 - 2**-11), torch.full((3, 4, 9), 1 + 2**-8 - 2**-11)
    errors = []
    for change in (lambda x: x, lambda x: lowered(x, bits)):
        book = ParameterBook(torch.Size([8, 9]))
        book.add(terms.Dense(change(left), change(right)), GramCache())
        want = torch.einsum("nti,ntj->nij", left.double(), right.double()).flatten(1).norm(dim=1)
        errors.append(float((certified([book], [1.0])[1][0].sqrt() / want - 1).abs().max()))
    assert errors[0] < 1e-6
    assert 1e-4 < errors[1] < bound


def test_it_is_put_back_after_an_error(asked):
    with pytest.raises(KeyError), exact():
        raise KeyError
    assert settings() == asked


def test_the_last_thread_to_leave_puts_it_back(asked):
    entered, leave = threading.Event(), threading.Event()

    def other():
        with exact():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with exact():
        thread.start()
        assert entered.wait(10)
    with exact():  # while the other one is still inside
        assert all(value in precision._FULL for value in precision._read())
    assert settings() != asked
    leave.set()
    thread.join()
    assert settings() == asked


def test_nothing_is_touched_where_nothing_was_asked(monkeypatch):
    monkeypatch.setattr(precision, "_write", lambda values: pytest.fail("written"))
    with exact():
        pass


@pytest.mark.parametrize("variable", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
def test_a_variable_that_lowers_precision_for_good_is_refused(variable, monkeypatch):
    monkeypatch.setenv(variable, "strict")
    private("bk")
    monkeypatch.setenv(variable, "BF16")
    with pytest.raises(ValueError, match=f"{variable}=BF16.*start the program without it"):
        private("bk")


def test_the_variable_of_cublas_matters_on_gpus_only(monkeypatch):
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    precision.check_environment({"cpu"})
    with pytest.raises(ValueError, match="NVIDIA_TF32_OVERRIDE=1"):
        precision.check_environment({"cuda", "cpu"})
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    precision.check_environment({"cuda"})
