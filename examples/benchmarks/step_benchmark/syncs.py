"""How often a step waits for the GPU, and where."""

from __future__ import annotations

import collections
import warnings
from typing import Any

import torch

SKIPPED = "waits for the device are counted by torch on CUDA devices only"
_SAID = "synchronizing CUDA operation"


def count_syncs(trial: Any, device: str) -> dict[str, Any]:
    """Return what torch's debug mode for synchronisation says of one step.

    Returns:
        ``skipped``: the reason why nothing was counted; or ``refused``: the first place in the step where the mode
        "error" stops it, "" if it does not; ``waits``: how many operations waited in a whole step, and ``places``: how many
        at each line.
    """
    if device != "cuda":
        return {"skipped": SKIPPED}
    before = torch.cuda.get_sync_debug_mode()
    trial.synchronize()
    try:
        # The whole step first: the mode "error" leaves a step behind that was stopped half way.
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trial.step()
        torch.cuda.set_sync_debug_mode("error")
        refused = _stopped_at(trial)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    places = collections.Counter(
        f"{warning.filename}:{warning.lineno}" for warning in caught if _SAID in str(warning.message)
    )
    return {"refused": refused, "waits": places.total(), "places": dict(places.most_common(20))}


def _stopped_at(trial: Any) -> str:
    """Return the innermost line of the step that waited first."""
    try:
        trial.step()
    except RuntimeError as error:
        if _SAID not in str(error):
            raise
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
            trace = trace.tb_next
        return frames[-1]
    return ""
