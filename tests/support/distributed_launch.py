"""Starts the cases of ``distributed_cases`` on several gloo processes of this machine, and collects what they return."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkout import PYTHONPATH

MODULES = (
    "distributed_cases",
    "distributed_guards",
    "distributed_noise",
    "distributed_zeroth",
    "distributed_zeroth_guards",
)
DEADLY = "die"
TIMEOUT, SHORT = timedelta(seconds=30), timedelta(seconds=5)


def start(cases: list[str], folder: Path, **settings: Any) -> subprocess.Popen:
    """Start the script that runs ``WORLD:CASE`` one after the other, a group of processes for each run of equal worlds."""
    shared = {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": 1,
        "TORCHDYNAMO_DISABLE": 1,
        "PYTHONPATH": PYTHONPATH,
        "CASES_FOLDER": folder,
        **settings,
    }
    command = [sys.executable, "-W", "ignore", __file__, *cases]
    env = {**os.environ, **{name: str(value) for name, value in shared.items()}}
    log = (folder / "log").open("w")
    # A session of its own: at the end all of its processes can be killed.
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def run(cases: list[str], folder: Path, timeout: float = 240, **settings: Any) -> dict[str, list[Any]]:
    """Run cases ``WORLD:CASE`` and return, for each, what every rank returned.

    A rank that does not survive its case returns None.

    Raises:
        AssertionError: a process failed or did not end; with what they wrote.
    """
    process = start(cases, folder, **settings)
    try:
        code: int | None = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if code != 0:
        raise AssertionError(f"exit code {code}\n{(folder / 'log').read_text()[-6000:]}")
    results = {}
    for case in cases:
        world = int(case.split(":")[0])
        files = [folder / f"{case}:{rank}" for rank in range(world)]
        results[case] = [pickle.loads(f.read_bytes()) if f.exists() else None for f in files]
    return results


# ---------------------------------------------------------------- as a script


def find(name: str) -> Callable[[int, int], Any]:
    more = os.environ.get("CASES_MODULES", "").split()
    modules = [importlib.import_module(module) for module in (*MODULES, *more)]
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def be_rank(rank: int, world: int, port: int, names: list[str], folder: Path) -> None:
    """Run cases as one rank, and leave their results in files."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", timeout=SHORT if DEADLY in names[0] else TIMEOUT)
    for name in names:
        result = find(name)(rank, world)
        (folder / f"{world}:{name}:{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    """Return a port of this machine on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launcher() -> list[str]:
    """Return the words after ``python`` that start two processes under torchrun, on a port of their own."""
    return [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
    ]


def start_ranks(world: int, names: list[str], folder: Path) -> dict[int, int]:
    """Fork the ranks, which need not import everything again; return their process ids and numbers."""
    port = free_port()
    ranks = {}
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                be_rank(rank, world, port, names, folder)
                code = 0
            except BaseException:
                print(f"--- rank {rank} of {world}, {names}", traceback.format_exc(), file=sys.stderr, flush=True)
            finally:
                os._exit(code)
        ranks[pid] = rank
    return ranks


def wait_for(ranks: dict[int, int]) -> list[int]:
    """Return the exit code of every rank, in the order in which they end."""
    codes = []
    while ranks:
        pid, status = os.wait()
        del ranks[pid]
        codes.append(os.waitstatus_to_exitcode(status))
    return codes


def group(case: str) -> tuple[str, str]:
    """Cases of one world run one after the other in its processes; those that some do not survive have their own."""
    world, name = case.split(":")
    return world, name if DEADLY in name else ""


def main() -> None:
    torch.set_num_threads(1)
    find("language_model")()  # imports what the ranks need, and what makes the model
    folder, failed = Path(os.environ["CASES_FOLDER"]), False
    for (world, deadly), cases in itertools.groupby(sys.argv[1:], key=group):
        codes = wait_for(start_ranks(int(world), [case.split(":")[1] for case in cases], folder))
        failed |= any(codes) and not deadly
    sys.exit(failed)


if __name__ == "__main__":
    main()
