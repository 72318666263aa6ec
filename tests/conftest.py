"""Settings of every test: few threads, no compilation, examples importable as scripts import each other."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # before torch is imported: BitNet layers compile otherwise

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run without a GPU
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


@pytest.fixture(autouse=True)
def fresh_start():
    """Opacus's registries are global and ``make_private`` fills them: every test starts from Opacus's own."""
    from tiny_models import opacus_table_restored

    torch.manual_seed(0)
    with opacus_table_restored():
        yield
