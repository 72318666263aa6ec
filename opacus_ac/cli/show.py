"""``opacus-ac report`` and ``explain``: what a run has spent, and how the gradients of a model are computed."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opacus_ac.cli.command import OK, Command, add_format, add_option

if TYPE_CHECKING:
    from opacus_ac.accounting import Event
    from opacus_ac.budget.charges import Terms

REPORT_FILE = "privacy_report.json"


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, help=f"folder of a run (with {REPORT_FILE}), such a file, or a privacy ledger"
    )
    add_option(parser, "delta", type=float, help="delta, for a ledger")
    add_format(parser)


def _report(options: argparse.Namespace) -> int:
    path = options.path / REPORT_FILE if options.path.is_dir() else options.path
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the folder of a run, its {REPORT_FILE}, or a ledger")
    facts = _of_report(path) if path.suffix == ".json" else _of_ledger(path, options.delta)
    if options.format == "json":
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            shown = json.dumps(value) if isinstance(value, list | dict) else value
            print(f"{name.replace('_', ' '):26} {shown}")
    return OK


def _of_report(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if "epsilon" not in facts or "delta" not in facts:
            raise ValueError("it has no epsilon and delta")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a privacy report: {error}") from error
    return facts


def _of_ledger(path: Path, delta: float | None) -> dict[str, Any]:
    """Return the sum of the charges of a ledger, after a check of every line."""
    from opacus_ac.accounting import common_adjacency
    from opacus_ac.budget.charges import Terms
    from opacus_ac.budget.ledger import PrivacyLedger

    if delta is None:
        raise ValueError("a ledger has no delta: give --delta")
    ledger, terms = PrivacyLedger(path), Terms()
    for charge in ledger.entries():
        terms.take(charge, ledger.unit)
    counts: Counter[Event] = Counter(ledger.charges)
    notes = terms.notes()
    return {
        "epsilon": _epsilon(counts, terms, delta)
        if all(event.noise_multiplier > 0 for event in counts)
        else "infinity",
        "delta": delta,
        "protects": ledger.unit or "nothing yet",
        "neighbours": common_adjacency(terms.samplings) if counts else "none yet",
        "ledger": ledger.summary,
        "charges": [[repr(event), count] for event, count in counts.items()],
        **({"warnings": notes} if notes else {}),
    }


def _epsilon(counts: Counter[Event], terms: Terms, delta: float) -> float:
    """Return the epsilon of all charges of a ledger. They are of one mechanism."""
    from opacus_ac.accounting import PureDPAccountant, pld_epsilon
    from opacus_ac.budget.charges import renyi_epsilon

    if any(event.mechanism == "gaussian" for event in counts):
        if terms.adaptive:
            return max(renyi_epsilon(counts, delta), terms.limit_epsilon(delta))
        return pld_epsilon(counts, delta)
    accountant = PureDPAccountant()
    for event, count in counts.items():
        accountant.step_event(event, count)
    return accountant.get_epsilon(delta)


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="folder (or hub name) of a transformers causal language model; its configuration is enough"
    )
    add_option(parser, "mode", choices=("bk", "hooks", "functorch"), default="bk", help="gradient mode (default bk)")
    add_option(parser, "length", type=int, default=128, help="positions per record, for cost and memory (default 128)")


def _explain(options: argparse.Namespace) -> int:
    from transformers import AutoConfig, AutoModelForCausalLM

    from opacus_ac.grad_sample import explain, register_rules

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model)).train()
    register_rules(model)
    print(explain(model, mode=options.mode, length=options.length))
    return OK


COMMANDS = (
    Command("report", "what a run, or all runs of a ledger, have spent", _report_arguments, _report),
    Command("explain", "which rule every parameter takes, and what is refused", _explain_arguments, _explain),
)
