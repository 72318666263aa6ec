"""Settings of every test: few threads, no compilation, registries as Opacus leaves them."""

import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # before torch is imported: BitNet layers compile otherwise
os.environ.setdefault("OPACUS_AC_REGISTRY", "0")  # the runs of tests are not a person's

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run without a GPU
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def fresh_file():
    """What is made once for the tests of a file may fill Opacus's registries, too."""
    from tiny_models import opacus_table_restored

    with opacus_table_restored():
        yield


@pytest.fixture(autouse=True)
def fresh_start(request):
    """What is global starts anew for every test: Opacus's registries, and the batches of other tests' runs.

    Many tests have the same rows, and a batch that a run has drawn belongs to that run: it must not be another test's.
    """
    from gpu_state import stop_if_broken
    from tiny_models import opacus_table_restored

    from opacus_ac.sampling.delivery import RECOGNITION

    RECOGNITION.forget()
    torch.manual_seed(0)
    with opacus_table_restored():
        yield
    stop_if_broken(request.node.nodeid)


@pytest.fixture(params=["torch", "oneDNN"])
def library(request, monkeypatch):
    """Products by either library, on any machine and of any size, in whole and in pieces."""
    from opacus_ac.grad_sample.one_backward import matmul as products

    monkeypatch.setattr(products, "onednn_is_faster", lambda *_: request.param == "oneDNN")
    if request.param == "oneDNN":
        if not products.onednn_is_right():
            pytest.skip("this build of torch has no products of oneDNN's")
        for name, value in {"_WORTH": 0, "_WORTH_A_RECORD": 0, "_WHOLE": 64, "_ROWS": 7, "_MANY": 20}.items():
            monkeypatch.setattr(products, name, value)
    return request.param


@pytest.fixture(params=["widened", "as they are"])
def halves(request, monkeypatch):
    """Products of half precision: widened, as on a CPU, or as on a device that multiplies it with float32 results.

    The latter is played by float64 products on the CPU, which take nothing but half precision. Returns the types of all of them.
    """
    from opacus_ac.grad_sample.one_backward import half_products

    seen: list[torch.dtype] = []

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == b.dtype
        assert a.dtype in (torch.bfloat16, torch.float16)
        assert a.dim() == b.dim() == 3
        seen.append(a.dtype)
        return torch.bmm(a.double(), b.double()).float()

    if request.param == "as they are":
        monkeypatch.setattr(half_products, "_are_right", lambda *_: True)
        monkeypatch.setattr(half_products, "multiply", multiply)
    seen_of = {"widened": None, "as they are": seen}
    return seen_of[request.param]
