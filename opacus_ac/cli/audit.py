"""``opacus-ac audit``: attacks the private step or a run, and prints each lower bound of epsilon beside the claim."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from opacus_ac.cli.command import OK, REFUTED, Command, add_format, add_option

if TYPE_CHECKING:
    from opacus_ac.audit.result import AuditResult

NAMES = ("canary", "noise", "scalars", "one-run", "usage", "poison", "coupling")
"""Names of :data:`opacus_ac.audit.table.AUDITS`, without importing it: help must not load torch."""
_OF_THE_STEP, _OF_A_RUN = 0.996, 0.95
"""Confidence of all verdicts together, by what is audited."""


def _arguments(parser: argparse.ArgumentParser) -> None:
    _step_options(parser.add_argument_group("the step that is audited"))
    _attack_options(parser.add_argument_group("the attacks"))
    _run_options(parser.add_argument_group("a run of yours, instead of the step"))
    add_format(parser)


def _run_options(group: argparse._ArgumentGroup) -> None:
    folder = "output folder of opacus-ac finetune: train a copy of the run with canaries, and guess which it saw"
    add_option(group, "run", default=None, metavar="FOLDER", help=folder)
    add_option(group, "train-file", default=None, help="where the private file is now (default: where it was)")
    add_option(group, "canaries", type=int, default=400, help="canaries, half of them trained on (default 400)")


def _step_options(group: argparse._ArgumentGroup) -> None:
    add_option(group, "mode", choices=("bk", "hooks", "functorch"), default="bk", help="gradient mode (default bk)")
    add_option(
        group,
        "clipping",
        choices=("percentile", "geometric", "raw_percentile", "flat", "automatic"),
        default="percentile",
        help="clip rule (default percentile); raw_percentile is the published rule, which is not private",
    )
    forward = "train with forward passes only, as in this paper (default: with gradients)"
    add_option(group, "zeroth-order", choices=("aggzo", "dpzero", "dp-zoso"), default=None, help=forward)
    add_option(group, "noise-multiplier", type=float, default=1.0, help="noise multiplier of a step (default 1)")
    add_option(group, "max-physical-batch-size", type=int, default=None, help="split batches (default: no split)")
    add_option(group, "fused-step", action="store_true", help="audit the step that applies gradients in turns")


def _attack_options(group: argparse._ArgumentGroup) -> None:
    add_option(group, "only", action="append", choices=NAMES, default=None, help="run this audit; may be given again")
    add_option(group, "steps", type=int, default=1000, help="observed steps of the canary audit (default 1000)")
    runs = "runs of the leak test, each with and without the record (default 100)"
    add_option(group, "runs", type=int, default=100, help=runs)
    target = "epsilon of the one-run audit's training run (default 1)"
    add_option(group, "target-epsilon", type=float, default=1.0, help=target)
    confidence = "of all verdicts together (default 0.996, 0.999 for each that may err; 0.95 with --run)"
    add_option(group, "confidence", type=float, default=None, help=confidence)
    add_option(group, "delta", type=float, default=1e-5, help="delta of every epsilon (default 1e-5)")
    seed = "for a run that can be repeated; default: the secret noise that users get"
    add_option(group, "seed", type=int, default=None, help=seed)


def _run(options: argparse.Namespace) -> int:
    """Run the audits and print each lower bound beside the claim."""
    results = _of_step(options) if options.run is None else [_of_run(options)]
    refuted = any(result.refuted for result in results)
    if options.format == "json":
        print(json.dumps({"refuted": refuted, "audits": [result.to_dict() for result in results]}, indent=2))
    else:
        print("\n\n".join(map(str, results)))
        print(f"\n{'A claim was REFUTED.' if refuted else 'No claim was refuted.'}")
    return REFUTED if refuted else OK


def _of_run(options: argparse.Namespace) -> AuditResult:
    """Audit a run of the user."""
    if options.only is not None:
        raise ValueError("--run audits a run as a whole, and --only chooses among audits of the step: give one of them")
    from opacus_ac.integrations.finetune.audit_run import audit_run

    return audit_run(
        options.run,
        train_file=options.train_file,
        canaries=options.canaries,
        confidence=_OF_A_RUN if options.confidence is None else options.confidence,
        seed=options.seed,
    )


def _of_step(options: argparse.Namespace) -> list[AuditResult]:
    """Audit the private step on a small model."""
    from opacus_ac.audit.table import Plan, run_audits

    settings = _clipping(options.clipping) | {
        "grad_sample_mode": options.mode,
        "max_physical_batch_size": options.max_physical_batch_size,
        "fused_step": options.fused_step,
        "zeroth_order": options.zeroth_order,
    }
    settings = {name: value for name, value in settings.items() if value is not None and value is not False}
    plan = Plan(
        noise_multiplier=options.noise_multiplier,
        steps=options.steps,
        runs=options.runs,
        target_epsilon=options.target_epsilon,
        confidence=_OF_THE_STEP if options.confidence is None else options.confidence,
        delta=options.delta,
        seed=options.seed,
        settings=settings,
    )
    return run_audits(plan, options.only)


def _clipping(rule: str) -> dict[str, Any]:
    """Return the arguments of ``make_private`` for a clip rule."""
    return {"clipping": rule} if rule in ("flat", "automatic") else {"clipping": "adaptive", "clip_policy": rule}


COMMANDS = (Command("audit", "try to refute what the private step, or a run of yours, claims", _arguments, _run),)
