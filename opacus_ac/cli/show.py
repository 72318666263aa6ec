"""``opacus-ac report`` and ``explain``: what a run has spent, and how the gradients of a model are computed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from opacus_ac.cli.command import OK, Command, add_format, add_option
from opacus_ac.integrations.trained.folder import PRIVACY_REPORT, RunFolder
from opacus_ac.integrations.trained.status import RunStatus, ledger_facts, read_report, run_status
from opacus_ac.models.default_model import check_model_folder, is_offline


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", type=Path, help=f"folder of a run, finished or not, a {PRIVACY_REPORT}, or a privacy ledger"
    )
    add_option(parser, "delta", type=float, help="delta, for a ledger")
    add_format(parser)
    parser.add_argument("--json", dest="format", action="store_const", const="json", help="as --format json")


def _report(options: argparse.Namespace) -> int:
    path = options.path
    if not path.exists():
        raise ValueError(f"{path} does not exist: give the folder of a run, its {PRIVACY_REPORT}, or a ledger")
    if path.is_dir():
        status = run_status(RunFolder.at(path), options.delta)
    elif path.suffix == ".json":
        status = RunStatus("a privacy report", read_report(path), None)
    else:
        status = RunStatus("a ledger", ledger_facts(path, options.delta), None)
    print(json.dumps(status.to_dict(), indent=2) if options.format == "json" else status)
    return OK


def _explain_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="folder (or hub name) of a transformers causal language model; its configuration is enough"
    )
    add_option(parser, "mode", choices=("bk", "hooks", "functorch"), default="bk", help="gradient mode (default bk)")
    add_option(parser, "length", type=int, default=128, help="positions per record, for cost and memory (default 128)")


def _explain(options: argparse.Namespace) -> int:
    reason = check_model_folder(options.model, offline=is_offline(), tokenizer=False)
    if reason is not None:
        raise ValueError(f"cannot load the model {options.model!r}: {reason}")
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
