"""What two ranks run under the reference: as it is, and with faults planted that only several processes can have."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from distributed_cases import Tokens, language_model, prepare
from distributed_noise import noise_before_sum
from planted import FAULTS, Fault
from reference import DELTA, Violation
from surfaces import TIGHT, Oracle, SurfaceReference, some, watched_surface
from tiny_models import record_losses

from opacus_ac.distributed import reducers

STEPS, SIX = 12, 6
"""Steps of two passes, and of one, which is enough to find a fault."""


def _added_again(original: Any) -> Any:
    def sum_with_noise(flat: torch.Tensor, group: Any, noise: Any) -> None:
        original(flat, group, noise)
        flat += noise.std * noise.scale * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))

    return sum_with_noise


def _one_rank_only(original: Any) -> Any:
    def sum_with_noise(flat: torch.Tensor, group: Any, noise: Any) -> None:
        original(flat, group, replace(noise, std=0.0) if group.rank == 1 else noise)

    return sum_with_noise


def _own_records_only(original: Any) -> Any:
    return noise_before_sum


RANKS_FAULTS = {
    fault.name: fault
    for fault in (
        Fault("noise is added twice", ((reducers, "sum_with_noise", _added_again),), frozenset({"noise"})),
        Fault(
            "one rank adds no noise", ((reducers, "sum_with_noise", _one_rank_only),), frozenset({"noise", "charge"})
        ),
        Fault(
            "each rank adds noise to its own sum",
            ((reducers, "sum_with_noise", _own_records_only),),
            frozenset({"draws", "noise"}),
        ),
        *(fault for fault in FAULTS if fault.name in ("half the noise is drawn", "one charge in five is lost (D)")),
    )
}


def _loss(model: Any, record: dict[str, torch.Tensor]) -> torch.Tensor:
    return record_losses(model, {**record, "attention_mask": torch.ones_like(record["input_ids"])}).mean()


def under_reference(rank: int, world: int, fault: AbstractContextManager[None], steps: int) -> dict[str, Any]:
    """Take whole passes; return what was found, and what this rank reports."""
    data, model = Tokens(), language_model()
    records = [{name: tensor[None] for name, tensor in data[i].items()} for i in range(len(data))]
    reference = SurfaceReference(Oracle(model, records, _loss), rank=rank, world=world)
    reported = []
    with fault, watched_surface(reference):
        engine, model, optimizer, loader = prepare(
            model, data, noise_multiplier=1.0, noise_generator=None, max_grad_norm=0.5
        )
        while optimizer.steps_taken < steps:
            for batch in loader:
                optimizer.zero_grad()
                model(**batch).loss.backward()
                before = optimizer.steps_taken
                optimizer.step()
                if optimizer.steps_taken > before:
                    reported.append(engine.get_epsilon(DELTA))
        found, report = None, engine.privacy_report(DELTA).epsilon
        try:
            reference.finish(steps)
            reference.check_reports(some(reported))
            reference.check_reports({steps: report}, factor=TIGHT)
        except Violation as violation:
            found = (violation.kind, str(violation))
    return {
        "found": found,
        "reported": reported,
        "report": report,
        "records": [sorted(release.records) for release in reference.releases],
        "applied": (reference.applied.squares, reference.applied.count),
        "drawn": reference.tally.count,
    }


def surface_ranks(rank: int, world: int) -> dict[str, Any]:
    return under_reference(rank, world, nullcontext(), STEPS)


def case_of(fault: Fault) -> str:
    """Return the name of the case with a fault planted."""
    return "surface_" + "".join(c if c.isalnum() else "_" for c in fault.name)


def _with(fault: Fault) -> Callable[[int, int], dict[str, Any]]:
    return lambda rank, world: under_reference(rank, world, fault.planted(), SIX)


globals().update({case_of(fault): _with(fault) for fault in RANKS_FAULTS.values()})
