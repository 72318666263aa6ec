"""PrivateTrainer under torchrun: two ranks do what one process does, rank 0 alone writes, and what would differ is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch
import trainer_cases
from checkout import PYTHONPATH, SUPPORT
from distributed_launch import launcher
from tiny_trainer import trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:noise_generator is seeded", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The folder of the one launch of two ranks, and what each of them saw."""
    folder = tmp_path_factory.mktemp("ranks")
    env = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "", "TENSORBOARD_LOGGING_DIR": str(folder / "events"), "PYTHONPATH": PYTHONPATH,
    }  # fmt: skip
    command = [sys.executable, *launcher(), str(SUPPORT / "trainer_cases.py"), str(folder)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes, which are in sessions of their own
        printed, _ = process.communicate()
    assert process.returncode == 0, printed[-6000:]
    return folder, [pickle.loads((folder / f"results{rank}").read_bytes()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        return trainer_cases.plain(folder, 0, 1)


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def same_run(mine, theirs):
    close(mine["weights"], theirs["weights"])
    close(mine["average"], theirs["average"])
    assert mine["bound"] == theirs["bound"]
    assert mine["history"] == theirs["history"]
    assert mine["steps"] == theirs["steps"]


def test_two_ranks_equal_one_process(launched, alone):
    """Rank 1 begins with other weights, which must not matter."""
    for rank in launched[1]:
        same_run(rank["plain"], alone)
        assert rank["plain"]["steps"] == 4
    assert torch.equal(launched[1][0]["plain"]["weights"], launched[1][1]["plain"]["weights"])


def test_logs_and_evaluation_equal_those_of_one_process(launched, alone):
    """The loss is a mean over records, whatever fills up the last batches of the ranks."""
    for rank in launched[1]:
        assert rank["plain"]["before"] == pytest.approx(alone["before"], rel=1e-6)
        logs = rank["plain"]["logs"]
        assert len(logs) == len(alone["logs"])
        for mine, theirs in zip(logs, alone["logs"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)
    assert {key for entry in alone["logs"] for key in entry} >= {"loss", "max_grad_norm", "eval_a_loss", "eval_c_loss"}


def test_rank_0_alone_writes(launched):
    folder, _ = launched
    written = {str(p.relative_to(folder / "plain")) for p in (folder / "plain").rglob("*") if p.is_file()}
    assert {name.split("/")[0] for name in written} == {"rank0"}
    for name in ("checkpoint-2/privacy_state.pt", "checkpoint-4/optimizer.pt", "final/privacy_report.json"):
        assert f"rank0/{name}" in written
    assert len(list((folder / "events").rglob("*tfevents*"))) == 1


def test_a_resumed_run_equals_the_uninterrupted_one(launched):
    for rank in launched[1]:
        assert torch.equal(rank["resumed"]["weights"], rank["plain"]["weights"])
        same_run(rank["resumed"], rank["plain"])
        assert [e["loss"] for e in rank["resumed"]["logs"] if "loss" in e] == [
            e["loss"] for e in rank["plain"]["logs"] if "loss" in e
        ]


def test_one_process_goes_on_where_two_were(launched, tmp_path):
    checkpoint = launched[0] / "plain" / "rank0" / "checkpoint-2"
    same_run(trainer_cases.resumed(tmp_path, 0, 1, checkpoint), launched[1][0]["plain"])


def test_the_budget_ends_all_ranks_together(launched, tmp_path):
    alone = trainer_cases.budget(tmp_path, 0, 1)
    ranks = [rank["budget"] for rank in launched[1]]
    for run in (alone, *ranks):
        assert run["stopped"]
        assert (run["steps"], run["charges"]) == (2, 2)
        assert run["error"].startswith("PrivacyBudgetExceeded")
        assert torch.equal(run["weights"], run["resumed"])
        assert (run["history"], run["epsilon"]) == (alone["history"], alone["epsilon"])
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])
    assert not torch.equal(ranks[0]["weights"], alone["weights"])  # secret noise


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("each node", "save_on_each_node=True: only rank 0"),
        ("sharded", "the model is sharded"),
        ("other arguments", "torch.distributed has 2 processes and TrainingArguments 1"),
        ("shuffled", "sampling='shuffled' does not work with several processes"),
        ("own order", "ranks 0 and 1 have other records, or in another order"),
        ("other checkpoint", "ranks 0 and 1 read different checkpoints"),
        ("iterable", "evaluation on 2 processes"),
        ("uneven", "evaluation on 2 processes"),
        ("split", "evaluation on 2 processes"),
    ],
)
def test_what_differs_is_refused_on_all_ranks(case, text, launched):
    for rank in launched[1]:
        assert rank["refused"][case].startswith("ValueError") or case == "other arguments"
        assert text in rank["refused"][case]


def test_a_rank_that_cannot_read_the_checkpoint_stops_all(launched):
    texts = [rank["refused"]["no checkpoint on rank 1"] for rank in launched[1]]
    assert texts[0].startswith("ValueError: rank 1 cannot resume: ")
    assert "privacy_state.pt is missing" in texts[1]


def test_autocast_needs_no_wrapper(launched):
    assert [rank["bfloat16"] for rank in launched[1]] == ["torch.bfloat16"] * 2


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_accelerate_launch_adds_is_refused(name, tmp_path, monkeypatch):
    made = trainer_cases.arguments(tmp_path)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    (line,) = trainer_cases.refused_processes(made, None)
    assert line.startswith(f"ACCELERATE_USE_{name}='true'")
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
    assert trainer_cases.refused_processes(made, None) == []


def test_arguments_for_fsdp_are_refused(tmp_path):
    with pytest.raises(ValueError, match="FSDP is not available in the Trainer"):
        trainer(tmp_path, fsdp="full_shard")
