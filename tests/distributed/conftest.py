"""Settings of the tests that compare ranks with one process."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def norms_restored():
    """The runs in this process compute RMSNorm in float64, as the ranks do; later tests get it as it was."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    kept = Qwen2RMSNorm.forward
    yield
    Qwen2RMSNorm.forward = kept
