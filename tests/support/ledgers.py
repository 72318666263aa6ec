"""Runs with a ledger, ledgers of a few charges, and what somebody may do to one."""

import json

import helpers
import torch
from helpers import classifier, loader, loss_of

from opacus_ac import PrivacyEngine
from opacus_ac.accounting import Event
from opacus_ac.budget import PrivacyLedger
from opacus_ac.budget.ledger import SECTOR
from opacus_ac.zeroth_order import ZerothOrderDPOptimizer, ZerothOrderSettings

SETTINGS = {"noise_multiplier": 1.0}


LAPLACE = {"zeroth_order": ZerothOrderSettings(num_directions=2, mechanism="laplace")}


def make(path, records=64, mechanism="gaussian", **kwargs):
    engine = PrivacyEngine(ledger=path, accountant="pure" if mechanism == "laplace" else "vrdp")
    model = classifier()
    arguments = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **(LAPLACE if mechanism == "laplace" else {}), **kwargs}
    call = engine.make_private_with_epsilon if "target_epsilon" in kwargs else engine.make_private
    if "target_epsilon" in kwargs:
        del arguments["noise_multiplier"]
    made = call(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        data_loader=loader(records, 16),
        **arguments,
    )
    return (engine, *made)


def train(model, optimizer, batches):
    """Train for the batches, by gradients or by the losses of records."""
    if not isinstance(optimizer, ZerothOrderDPOptimizer):
        helpers.train(model, optimizer, batches)
        return
    for batch in batches:
        optimizer.step(lambda: loss_of(model, batch, "none"))  # noqa: B023


def written(path, charges=3, mechanism="gaussian"):
    ledger = PrivacyLedger(path)
    for step in range(charges):
        with ledger.locked():
            ledger.charge(Event(1.0, 0.1 + step / 100, mechanism=mechanism), dataset_size=64, settings=SETTINGS)
    return ledger


def edit(lines, number, change):
    entry = json.loads(lines[number - 1])
    change(entry)
    text = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
    lines[number - 1] = text + b" " * (-(len(text) + 1) % SECTOR) + b"\n"
