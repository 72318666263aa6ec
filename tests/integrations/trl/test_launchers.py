"""TRL's methods under torchrun and accelerate launch: two ranks do what one process does, and go on from a checkpoint."""

import os
import pickle
import subprocess
import sys

import pytest

pytest.importorskip("trl")
import torch
import trl_ranks
from checkout import PYTHONPATH, SUPPORT
from distributed_launch import free_port, launcher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning", "ignore::UserWarning"),
]


def accelerate():
    """The words after ``python`` of ``accelerate launch``, as people use it with several GPUs."""
    return [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_ip=127.0.0.1",
        f"--main_process_port={free_port()}",
    ]  # fmt: skip


LAUNCHERS = {"torchrun": launcher, "accelerate launch": accelerate}


@pytest.fixture(scope="module", params=LAUNCHERS)
def launched(request, tmp_path_factory):
    """What each of two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PYTHONPATH,
    }  # fmt: skip
    command = [sys.executable, *LAUNCHERS[request.param](), str(SUPPORT / "trl_ranks.py"), str(folder)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher then ends its processes, which are in sessions of their own
        printed, _ = process.communicate()
    assert process.returncode == 0, printed[-6000:]
    return [pickle.loads((folder / f"results{rank}").read_bytes()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {method: trl_ranks.run(method, tmp_path_factory.mktemp(method), 1) for method in trl_ranks.METHODS}


@pytest.mark.parametrize("method", trl_ranks.METHODS)
def test_two_ranks_equal_one_process(method, launched, alone):
    for rank in launched:
        # In float32, a step of Adam passes on the rounding of small gradients, up to the rate of 1e-3 times it.
        torch.testing.assert_close(rank[method]["weights"], alone[method]["weights"], rtol=0, atol=1e-6)
        assert rank[method]["steps"] == 4
        for mine, theirs in zip(rank[method]["logs"], alone[method]["logs"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("method", trl_ranks.METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one(method, launched):
    for rank in launched:
        assert torch.equal(rank[f"{method}, resumed"]["weights"], rank[method]["weights"])
        assert rank[f"{method}, resumed"]["steps"] == 4
        assert rank[f"{method}, resumed"]["logs"] == rank[method]["logs"]


@pytest.mark.parametrize("method", trl_ranks.METHODS)
def test_two_ranks_end_at_the_target_with_the_same_weights(method, launched):
    first, second = (rank[f"{method}, private"] for rank in launched)
    assert torch.equal(first["weights"], second["weights"])
    assert 3.96 <= first["epsilon"] <= 4.0
    assert first["epsilon"] == second["epsilon"]
