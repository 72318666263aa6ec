"""What several processes refuse, and what is left when one of them dies: on two to four gloo ranks."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_guards import bounds
from distributed_launch import SHORT, run
from torch import nn
from torch.distributed.tensor import Shard

from opacus_ac.budget import PrivacyLedger
from opacus_ac.distributed.sharded import _check_mesh, _check_placements

REFUSED = {
    "torch DDP": "DistributedDataParallel, whose own reduction.*pass the bare model",
    "Opacus DDP": "DifferentiallyPrivateDistributedDataParallel.*pass the bare model",
    "FSDP1": "FullyShardedDataParallel.*use torch.distributed.fsdp.fully_shard",
    "tensor parallel": "no FSDP2 or HSDP sharding.*tensor and context parallelism",
    "column parallel": "fully_shard does not manage: tensor parallelism",
    "mesh tp": "dimension 'tp'.*data-parallel dimensions only",
    "mesh cp": "dimension 'dp_cp'.*data-parallel dimensions only",
    "partly sharded": "2.weight is trained but not sharded",
    "only frozen ones sharded": "0.weight is sharded and frozen, while nothing that is trained is sharded",
    "second dimension": r"placed as \(Shard\(dim=1\),\)",
    "batch norm": "1 \\(BatchNorm1d\\) cannot be made private",
    "hooks": "grad_sample_mode='hooks' does not work with several processes \\(ddp\\)",
    "functorch": "grad_sample_mode='functorch' does not work with several processes \\(fsdp2\\)",
    "shuffled": "sampling='shuffled' does not work with several processes",
    "fused": "fused_step=True does not work with several processes",
    "raw": "clip_policy='raw_percentile' does not work with several processes",
    "users": "max_rows_per_user=2 does not work with several processes",
    "allocation": "noise_allocation does not work with several processes",
    "role": "reducer='zero' is not available",
    "role fsdp2": "fully_shard was applied to",
    "role ddp": "leave it out",
    "noise differs": "differ in noise_multiplier: rank 0 has 1.0, rank 1 2.0",
    "seed differs": "differ in seed of noise_generator: rank 0 has 0, rank 1 1",
    "records differ": "the ranks differ in ",
    "records in another order": "ranks 0 and 1 have other records, or in another order",
    "two records in each other's place": "ranks 0 and 1 have other records, or in another order",
    "mappings in another order": "ranks 0 and 1 have other records, or in another order",
    "model differs": "differ in trained parameter 0: ",
}
STOPPED = {
    "penalty on weights, ddp": "0.weight has an ordinary gradient, which was not clipped",
    "direct use, fsdp2": "last.weight has an ordinary gradient, which was not clipped",
    "skipped batch": "not in the same step: batch of the loader is 2 on rank 0 and 3 on rank 1",
    "own bound": "not in the same step: max_grad_norm is 1.0 on rank 0 and 2.0 on rank 1",
    "own batch": "a batch that the private loader did not just draw",
    "loader around ours": "a batch that the private loader did not just draw",
    "other draw": "not in the same step: the records drawn differ. ",
    "note in a checkpoint": "no place for checkpoint_dict",
    "file of one process": "is no folder that save_checkpoint wrote",
}
PLANTED = {
    "same noise": "ranks 0 and 1 draw the same noise",
    "C computed per rank": "not in the same step: max_grad_norm is",
}
MESHES = {
    "part of the ranks": "sharded over 2 of 4 processes",
    "two meshes": "different device meshes",
}
TABLES = {"2:refusals": REFUSED, "2:in_the_loop": STOPPED, "2:planted": PLANTED, "4:mesh_refusals": MESHES}
DEATHS = ["2:die_before_meeting", "2:die_after_charge", "2:first_dies_after_charge", "2:stall_and_die"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder) -> dict[str, list[Any]]:
    return run(
        [*TABLES, "2:bounds", "2:uncounted", "2:budget", "2:damaged", "2:one_fails", "2:untroubled", *DEATHS], folder
    )


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), [(case, name) for case, table in TABLES.items() for name in table])
def test_every_rank_refuses_with_the_remedy(results, case, name):
    for got in results[case]:
        assert got.keys() == TABLES[case].keys()
        kind, _, message = got[name].partition(": ")
        assert kind in ("ValueError", "NotImplementedError")
        assert re.search(TABLES[case][name], message), message


@pytest.mark.slow
def test_counts_that_are_not_added_up_change_the_clipping_norm(results):
    """The histogram of all ranks makes the same C as one process, to the last bit; that of one rank does not."""
    expected = bounds(0, 1)
    assert len(set(expected)) > 3
    assert results["2:bounds"] == [expected, expected]
    assert all(got != expected for got in results["2:uncounted"])


@pytest.mark.slow
def test_a_budget_is_spent_on_rank_0_and_refused_everywhere(results, folder):
    first, second = results["2:budget"]
    for got in (first, second):
        assert got["error"].startswith("PrivacyBudgetExceeded: the next step would reach epsilon")
        assert got["taken"] == 3
        assert got["epsilon"] == first["epsilon"] <= 1.0
        assert got["noise"] == first["noise"]
        assert got["report"] == first["report"]
    assert first["exists"]
    assert not second["exists"]
    assert len(PrivacyLedger(folder / "ledger0").charges) == 3


@pytest.mark.slow
def test_a_damaged_ledger_stops_every_rank(results):
    assert [error.split(":")[0] for error in results["2:damaged"]] == ["LedgerError", "LedgerError"]


@pytest.mark.slow
def test_when_a_rank_fails_before_the_release_all_do_and_all_may_try_again(results):
    first, second = results["2:one_fails"]
    assert re.match("rank 1 failed before the release of this step, so no rank takes it", first["errors"][0])
    assert second["errors"] == ["planted: out of memory"]
    for got, expected in zip((first, second), results["2:untroubled"], strict=True):
        assert len(got["errors"]) == 1
        assert got["taken"] == 4
        torch.testing.assert_close(got["weights"], expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "left", "ledger", "charges"),
    [
        ("die_before_meeting", 0, "before0", 3),
        ("die_after_charge", 0, "charged0", 4),
        ("first_dies_after_charge", 1, "first0", 4),
        ("stall_and_die", 0, "stalled0", 3),
    ],
)
def test_when_a_rank_dies_the_others_stop_and_nothing_is_released_unpaid(results, folder, case, left, ledger, charges):
    got = results[f"2:{case}"][left]
    assert got["error"].startswith(f"DistributedError: rank {left} could not exchange")
    assert "start again from the last checkpoint" in got["error"]
    assert got["seconds"] < 4 * SHORT.total_seconds()  # the others wait for SHORT; the rest is a loaded machine
    assert got["taken"] == 3
    assert len(PrivacyLedger(folder / ledger).charges) == charges >= got["taken"]
    assert results[f"2:{case}"][1 - left] is None


def test_parameters_offloaded_to_the_cpu_are_refused():
    on_cpu = SimpleNamespace(device=torch.device("cpu"))
    offloaded = SimpleNamespace(
        placements=(Shard(0),), to_local=lambda: on_cpu, device_mesh=SimpleNamespace(device_type="cuda")
    )
    with pytest.raises(ValueError, match=r"weight is offloaded to the CPU.*leave out offload_policy"):
        _check_placements("weight", offloaded)


def test_a_mesh_in_another_order_is_refused(monkeypatch):
    mesh = SimpleNamespace(
        mesh_dim_names=None, ndim=1, size=lambda: 2, get_local_rank=lambda i: 1, get_group=lambda i: None
    )
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: 0)
    with pytest.raises(ValueError, match=r"in another order.*init_device_mesh"):
        _check_mesh(mesh)


def test_ddp_needs_several_processes():
    from distributed_guards import private

    with pytest.raises(ValueError, match=r"reducer='ddp' needs several processes: start them with torchrun"):
        private(nn.Sequential(nn.Linear(4, 3).double()), reducer="ddp")
