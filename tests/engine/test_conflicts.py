"""Options that do not go together: each row of the one table is refused before anything is charged or touched."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import classifier, loader

from opacus_ac import AutoAdam, PrivacyEngine
from opacus_ac.allocation import NoiseAllocation
from opacus_ac.clipping.table import POLICIES
from opacus_ac.engine import checks
from opacus_ac.engine.checks import CONFLICTS, Choice, Conflict, check_together
from opacus_ac.engine.options import OPACUS_NAMES, OPTIONS
from opacus_ac.zeroth_order import ZerothOrderSettings

pytestmark = pytest.mark.filterwarnings("ignore::opacus_ac.errors.NotPrivateWarning")

#: Settings that are not arguments of ``make_private``.
DERIVED = {"processes", "inner_optimizer", "mechanism", "accountant", "secure_mode"}
#: A value for a row that refuses all values but some.
EXAMPLES: dict[str, Any] = {
    "processes": "ddp",
    "zeroth_order": "aggzo",
    "preset": "paper",
    "max_rows_per_user": 2,
    "noise_allocation": NoiseAllocation(source="dimension"),
    "ema_decay": 0.5,
    "clip_policy": "geometric",
    "max_batch_size": 20,
    "batch_size_schedule": [16],
    "sampling": "fixed_size",
    "noise_generator": torch.Generator().manual_seed(0),
    "accountant": "vrdp",
    "loss_bound": 5.0,
}


def values(choice: Choice) -> list[Any]:
    """Values of a choice to try: all that it names, or one that it does not."""
    if not choice.all_others:
        return list(choice.values)
    example = EXAMPLES[choice.name]
    assert choice.fits({choice.name: example}), f"EXAMPLES[{choice.name!r}] is not among those that are refused"
    return [example]


def arguments(name: str, value: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the engine and of ``make_private`` that give a setting a value."""
    if name in ("accountant", "secure_mode"):
        return {name: value}, {}
    if name == "processes":
        return {}, {"reducer": SimpleNamespace(name=value, rank=0, world=2)}
    if name == "inner_optimizer":
        return {}, {}  # the test builds it
    if name == "mechanism":
        laplace = ZerothOrderSettings(num_directions=2, mechanism="laplace")
        return ({"accountant": "pure"}, {"zeroth_order": laplace}) if value == "laplace" else ({}, {})
    if name == "sampling" and value == "shuffled":
        return {}, {"poisson_sampling": False}
    return {}, {name: value}


CASES = [
    pytest.param(row, first, second, id=f"{row.refused.name}={first!s:.20}, {row.beside.name}={second!s:.20}")
    for row in CONFLICTS
    for first in values(row.refused)
    for second in values(row.beside)
]


@pytest.mark.parametrize(("row", "first", "second"), CASES)
def test_what_does_not_go_together_is_refused_and_leaves_no_trace(row: Conflict, first, second, tmp_path):
    ours, theirs = arguments(row.refused.name, first), arguments(row.beside.name, second)
    engine = PrivacyEngine(ledger=tmp_path / "ledger", **{**theirs[0], **ours[0]} | _own(row, first, second))
    model = classifier().eval() if "zeroth_order" in ours[1] | theirs[1] else classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = AutoAdam if "inner_optimizer" in (row.refused.name, row.beside.name) else torch.optim.SGD
    inner = own(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=re.escape(row.why)) as error:
        engine.make_private(
            module=model, optimizer=inner, data_loader=loader(64, 16), noise_multiplier=1.0, **ours[1] | theirs[1]
        )
    assert row.remedy[1:] in str(error.value)
    assert str(error.value).startswith(row.refused.name) or row.refused.name == "processes"
    assert len(engine.accountant) == 0
    assert not (tmp_path / "ledger").exists() or "charge" not in (tmp_path / "ledger").read_text()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for part in model.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._backward_hooks
    assert all(p.requires_grad and not hasattr(p, "grad_sample") for p in model.parameters())
    PrivacyEngine().make_private(
        module=model.train(), optimizer=inner, data_loader=loader(64, 16), noise_multiplier=1.0, max_grad_norm=1.0
    )


def _own(row: Conflict, first: Any, second: Any) -> dict[str, Any]:
    """The accountant that a row names, whatever the other setting would need."""
    given = {row.refused.name: first, row.beside.name: second}
    return {name: given[name] for name in ("accountant",) if name in given}


def test_rows_name_settings_that_there_are():
    known = OPACUS_NAMES | set(OPTIONS) | DERIVED
    for row in CONFLICTS:
        assert {row.refused.name, row.beside.name} <= known
        assert row.why[0].islower() or row.why.startswith("Opacus")
        assert not row.why.endswith(".")
        assert not row.remedy.endswith(".")


def test_no_row_hides_another():
    pairs = [(row.refused, row.beside) for row in CONFLICTS]
    assert len(set(pairs)) == len(pairs)


def test_policies_that_need_a_histogram_are_refused_with_laplace_noise():
    (row,) = [row for row in CONFLICTS if row.refused.name == "clip_policy" and row.beside.name == "mechanism"]
    assert {"percentile", "geometric"} <= set(row.refused.values)
    assert set(row.refused.values) == {name for name, policy in POLICIES.items() if policy.needs_histogram}


def test_the_sampling_is_checked_before_the_noise_is_planned():
    model = classifier()
    with pytest.raises(ValueError, match="truncation needs a public size"):
        PrivacyEngine().make_private_with_epsilon(
            module=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data_loader=loader(64, 16),
            target_epsilon=1.0, target_delta=1e-3, steps=2, sampling="truncated_poisson",
        )  # fmt: skip


def test_a_row_is_all_that_it_takes(monkeypatch):
    """A new refusal is a line of the table; without its row a pair passes."""
    row = Conflict(
        Choice("normalize", (False,)), Choice("lr_control", (False,)), "one of them has to be on", "leave one out"
    )
    settings = {"normalize": False, "lr_control": False}
    check_together(settings)
    monkeypatch.setattr(checks, "CONFLICTS", (*CONFLICTS, row))
    with pytest.raises(
        ValueError, match=r"^normalize=False does not work with lr_control=False: one of them has to be on. Leave one"
    ):
        check_together(settings)
    check_together({"normalize": False})
    check_together({"normalize": False, "lr_control": True})
