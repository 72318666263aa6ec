"""Small private runs that are written to TensorBoard, for the tests of the dashboard and of its tab."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.data import DataLoader

from opacus_ac import PrivacyEngine, StepRelease
from opacus_ac.tensorboard import PrivacyDashboard, tags

DELTA = 1e-3


def private(
    *, target: float = 8.0, steps: int = 50, batch_size: int = 16, accountant: str = "vpld", **options: Any
) -> tuple[Any, ...]:
    """Return (engine, model, optimizer, loader) of a small run."""
    engine, model = PrivacyEngine(accountant=accountant), helpers.classifier()
    arguments = {
        "module": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "data_loader": DataLoader(helpers.dataset(), batch_size=batch_size),
        **options,
    }
    if "noise_multiplier" in options:
        return engine, *engine.make_private(**arguments)
    return engine, *engine.make_private_with_epsilon(
        **arguments, target_epsilon=target, target_delta=DELTA, steps=steps
    )


def steps(run: tuple[Any, ...], dashboard: PrivacyDashboard, count: int, losses: bool = False) -> list[StepRelease]:
    """Take ``count`` logical steps, log each, and return the releases."""
    _, model, optimizer, loader = run
    end, releases = optimizer.steps_taken + count, []
    while optimizer.steps_taken < end:
        for inputs, targets in loader:
            optimizer.zero_grad()
            rows = torch.nn.functional.cross_entropy(model(inputs), targets, reduction="none")
            if losses:
                optimizer.record_losses(rows)
            rows.mean().backward()
            optimizer.step()
            if dashboard.log_step():
                releases.append(optimizer.released)
            if optimizer.steps_taken == end:
                break
    return releases


def resumed(folder: Any, saved: Any, pause: Any) -> None:
    """Write a run of seven steps that is continued from its checkpoint of step 3 for two more, in another file."""
    run = private()
    with PrivacyDashboard(folder, run[0], run[2]) as dashboard:
        steps(run, dashboard, 3)
        run[0].save_checkpoint(path=saved, module=run[1], optimizer=run[2])
        steps(run, dashboard, 4)
    pause()
    again = private()
    again[0].load_checkpoint(path=saved, module=again[1], optimizer=again[2])
    with PrivacyDashboard(folder, again[0], again[2]) as dashboard:
        steps(again, dashboard, 2)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    return events


def scalars(folder):
    events = read(folder)
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def raw_events(folder):
    return [event for path in Path(folder).glob("*tfevents*") for event in EventFileLoader(str(path)).Load()]


def metas(folder):
    return [json.loads(e.tensor_proto.string_val[0]) for e in read(folder).Tensors(tags.META_TAG)]


def statements(folder):
    return [e.tensor_proto.string_val[0].decode() for e in read(folder).Tensors(f"{tags.STATEMENT_TAG}/text_summary")]
