"""Command line ``opacus-ac``: a tree of subcommands, each one row of a table and one function.

Nothing here imports torch or opacus before a subcommand needs it, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opacus_ac._version import __version__

OK, REFUTED, BAD_USAGE = 0, 1, 2
"""Exit codes: nothing refuted, a claim refuted, bad usage."""


@dataclass(frozen=True)
class Command:
    """One subcommand: a row of :data:`COMMANDS`.

    Attributes:
        name: what the user types.
        summary: one line of help.
        arguments: adds the options to the subcommand's parser.
        run: does the work and returns the exit code; a ``ValueError`` is shown as bad usage.
    """

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1000, help="observed steps of the canary audit (default 1000)")
    parser.add_argument(
        "--runs", type=int, default=100, help="runs of the leak test, each with and without the record (default 100)"
    )
    parser.add_argument("--mode", choices=("bk", "hooks", "functorch"), default="bk", help="gradient mode (default bk)")
    parser.add_argument(
        "--clipping",
        choices=("percentile", "geometric", "raw_percentile", "flat", "automatic"),
        default="percentile",
        help="clip rule (default percentile); raw_percentile is the published rule, which is not private",
    )
    parser.add_argument("--noise-multiplier", type=float, default=1.0, help="noise multiplier of a step (default 1)")
    parser.add_argument(
        "--target-epsilon", type=float, default=1.0, help="epsilon of the one-run audit's training run (default 1)"
    )
    parser.add_argument("--max-physical-batch-size", type=int, default=None, help="split batches (default: no split)")
    parser.add_argument("--fused-step", action="store_true", help="audit the step that applies gradients in turns")
    parser.add_argument("--confidence", type=float, default=0.999, help="of each audit's verdict (default 0.999)")
    parser.add_argument("--delta", type=float, default=1e-5, help="delta of every epsilon (default 1e-5)")
    parser.add_argument(
        "--seed",
        type=int,
        default=None,
        help="for a run that can be repeated; default: the secret noise that users get",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="output (default text)")


def _audit(options: argparse.Namespace) -> int:
    """Run the three audits and print each lower bound beside its claim."""
    from opacus_ac.audit import canary_audit, one_run_audit, scalar_audit

    settings = _clipping(options.clipping) | {
        "grad_sample_mode": options.mode,
        "max_physical_batch_size": options.max_physical_batch_size,
        "fused_step": options.fused_step,
        "confidence": options.confidence,
        "delta": options.delta,
        "seed": options.seed,
    }
    noise = {"noise_multiplier": options.noise_multiplier}
    results = [
        canary_audit(steps=options.steps, **noise, **settings),
        scalar_audit(runs=options.runs, **noise, **settings),
        one_run_audit(target_epsilon=options.target_epsilon, **settings),
    ]
    refuted = any(result.refuted for result in results)
    if options.format == "json":
        print(json.dumps({"refuted": refuted, "audits": [result.to_dict() for result in results]}, indent=2))
    else:
        print("\n\n".join(map(str, results)))
        print(f"\n{'A claim was REFUTED.' if refuted else 'No claim was refuted.'}")
    return REFUTED if refuted else OK


def _clipping(rule: str) -> dict[str, Any]:
    """Return the arguments of ``make_private`` for a clip rule."""
    return {"clipping": rule} if rule in ("flat", "automatic") else {"clipping": "adaptive", "clip_policy": rule}


COMMANDS: tuple[Command, ...] = (
    Command("audit", "try to refute what the private step claims, on a small model", _audit_arguments, _audit),
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with a subparser for every row of :data:`COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="opacus-ac",
        description="DP-Adam-AC for Opacus.",
        epilog=f"exit codes: {OK} fine, {REFUTED} a claim was refuted, {BAD_USAGE} bad usage",
    )
    parser.add_argument("--version", action="version", version=f"opacus_ac {__version__}")
    children = parser.add_subparsers(title="commands", required=True, metavar="command")
    for command in COMMANDS:
        child = children.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(child)
        child.set_defaults(command=command, parser=child)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; argparse itself exits with 2 on bad usage."""
    options = build_parser().parse_args(arguments)
    try:
        code: int = options.command.run(options)
    except ValueError as error:
        print(f"{options.parser.prog}: error: {error}", file=sys.stderr)
        return BAD_USAGE
    return code
