"""Starts the cases of ``distributed_cases`` on several gloo processes of this machine, and collects what they return."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def start(cases: list[str], folder: Path, **settings: Any) -> subprocess.Popen:
    """Start the script that runs ``WORLD:CASE`` one after the other, a group of processes for each run of equal worlds."""
    shared = {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": 1,
        "TORCHDYNAMO_DISABLE": 1,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
        **settings,
    }
    command = [sys.executable, "-W", "ignore", str(HERE / "distributed_cases.py"), str(folder), *cases]
    env = {**os.environ, **{name: str(value) for name, value in shared.items()}}
    log = (folder / "log").open("w")
    # A session of its own: at the end all of its processes can be killed.
    return subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)


def run(cases: list[str], folder: Path, timeout: float = 240, **settings: Any) -> dict[str, list[Any]]:
    """Run cases ``WORLD:CASE`` and return, for each, what every rank returned.

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
        results[case] = [pickle.loads((folder / f"{case}:{rank}").read_bytes()) for rank in range(world)]
    return results
