"""More runs on a device: experts, gradient checkpointing and the fused step under autocast, FSDP2 on one rank.

As in ``test_devices.py``, ``OPACUS_AC_TEST_DEVICE=cuda`` runs them on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from device_runs import CPU, lm_run
from tiny_models import DEVICE, EXPERTS, MORE_MODELS
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")
LAYERS = {"qwen2-tied": "model.layers", "gpt2": "transformer.h", "bitnet-tied": "model.layers"}


def checkpointed(reentrant: bool) -> Any:
    return lambda model: model.gradient_checkpointing_enable({"use_reentrant": reentrant})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-tied"])
def test_checkpointing_under_autocast_changes_nothing(name: str, reentrant: bool) -> None:
    """The same operations are done again, of the same values: four noisy steps, physical batches of 6."""
    settings = {"dtype": torch.float32, "autocast": True, "max_physical_batch_size": 6}
    whole = lm_run(name, DEVICE, **settings)
    again = lm_run(name, DEVICE, prepare=checkpointed(reentrant), **settings)
    torch.testing.assert_close(again, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("name", ["qwen2-tied", "bitnet-tied"])
def test_the_fused_step_is_the_step(name: str, autocast: bool) -> None:
    """Without noise, which is drawn in another order there."""
    quiet = {"dtype": torch.float32, "autocast": autocast, "noise_multiplier": 0.0, "max_physical_batch_size": 6}
    whole = lm_run(name, DEVICE, **quiet)
    fused = lm_run(name, DEVICE, fused_step=True, **quiet)
    torch.testing.assert_close(fused, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in EXPERTS if name in MORE_MODELS])
def test_experts(name: str) -> None:
    """Rows that are routed to experts, whose norms transformers computes in float32."""
    results = [lm_run(name, device, max_physical_batch_size=6) for device in (CPU, DEVICE)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.fixture
def one_rank() -> Iterator[Any]:
    """A process group of this process alone, and its mesh."""
    if not dist.is_available() or (DEVICE.type == "cuda" and not dist.is_nccl_available()):
        pytest.skip("this build of torch cannot join processes on the device")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(DEVICE.type, (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", LAYERS)
def test_one_rank_under_fully_shard(name: str, one_rank: Any) -> None:
    """Every block a unit of its own: as the bare model on the processor, noise aside, which has streams of its own."""
    from torch.distributed.fsdp import fully_shard

    def shard(model: nn.Module) -> None:
        for layer in model.get_submodule(LAYERS[name]):
            fully_shard(layer, mesh=one_rank)
        fully_shard(model, mesh=one_rank)

    quiet = {"noise_multiplier": 0.0, "max_physical_batch_size": 6}
    sharded = lm_run(name, DEVICE, prepare=shard, **quiet)
    bare = lm_run(name, CPU, reducer="local", **quiet)
    torch.testing.assert_close(sharded, bare, rtol=1e-4, atol=1e-4)
