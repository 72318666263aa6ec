"""The distributed example under torchrun: two gloo processes, sharded, and then resumed as replicas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from checkout import ROOT
from distributed_launch import launcher

from opacus_ac.budget import PrivacyLedger


def torchrun(*options: str) -> str:
    env = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    script = str(ROOT / "examples" / "finetune_distributed.py")
    process = subprocess.Popen(
        [sys.executable, *launcher(), script, *options],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes, which are in sessions of their own
        printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return printed


@pytest.mark.slow
def test_the_example_trains_saves_and_resumes(tmp_path):
    shared = ["--expected-batch-size", "24", "--delta", "1e-3", "--steps", "4"]
    shared += ["--ledger", str(tmp_path / "ledger")]
    printed = torchrun(*shared, "--shard", "--until", "2", "--output", str(tmp_path / "first"))
    assert "2 processes (fsdp2, cpu)" in printed
    assert printed.count("noisy loss") == 2  # rank 0 alone
    printed = torchrun(
        *shared, "--resume", str(tmp_path / "first" / "checkpoint"), "--output", str(tmp_path / "second")
    )
    assert "2 processes (ddp, cpu)" in printed
    results: list[dict[str, Any]] = [
        json.loads((tmp_path / run / "result.json").read_text()) for run in ("first", "second")
    ]
    assert [r["privacy"]["steps"] for r in results] == [2, 4]
    assert 0 < results[0]["privacy"]["epsilon"] < results[1]["privacy"]["epsilon"] <= 8
    assert results[1]["privacy"]["epsilon"] > 7.9
    assert len(PrivacyLedger(tmp_path / "ledger").charges) == 4
    # The second run begins where the first ended, whatever the two had: shards, or the whole.
    assert results[1]["public_loss"]["before"] == pytest.approx(results[0]["public_loss"]["after"], rel=1e-5)
