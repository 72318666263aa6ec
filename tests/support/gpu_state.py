"""Whether the GPU still works after a test.

A kernel that fails leaves CUDA in a state in which every later call of the process fails, ``torch.manual_seed`` in the set-up
of the next tests among them. All of them then end as errors at set-up, and none of these says what went wrong.
"""

from __future__ import annotations

import pytest
import torch

BROKEN = 4
"""Exit status of a run that stopped here."""


def stop_if_broken(test: str) -> None:
    """Wait for the kernels of a test; if the GPU answers with an error, end the run and name the test.

    Raises:
        pytest.exit.Exception: If it does.
    """
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # AcceleratorError is one
        reason = str(error).splitlines()[0]
        pytest.exit(
            f"the GPU answers with errors only since {test} ({reason}): run that test by itself with "
            "CUDA_LAUNCH_BLOCKING=1, and the others in a process without it",
            returncode=BROKEN,
        )
