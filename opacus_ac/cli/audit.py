"""``opacus-ac audit``: attacks on the private step, each lower bound beside its claim."""

from __future__ import annotations

import argparse
import json
from typing import Any

from opacus_ac.cli.command import OK, REFUTED, Command, add_format, add_option


def _arguments(parser: argparse.ArgumentParser) -> None:
    add_option(parser, "steps", type=int, default=1000, help="observed steps of the canary audit (default 1000)")
    add_option(
        parser,
        "runs",
        type=int,
        default=100,
        help="runs of the leak test, each with and without the record (default 100)",
    )
    add_option(parser, "mode", choices=("bk", "hooks", "functorch"), default="bk", help="gradient mode (default bk)")
    add_option(
        parser,
        "clipping",
        choices=("percentile", "geometric", "raw_percentile", "flat", "automatic"),
        default="percentile",
        help="clip rule (default percentile); raw_percentile is the published rule, which is not private",
    )
    add_option(parser, "noise-multiplier", type=float, default=1.0, help="noise multiplier of a step (default 1)")
    add_option(
        parser,
        "target-epsilon",
        type=float,
        default=1.0,
        help="epsilon of the one-run audit's training run (default 1)",
    )
    add_option(parser, "max-physical-batch-size", type=int, default=None, help="split batches (default: no split)")
    add_option(parser, "fused-step", action="store_true", help="audit the step that applies gradients in turns")
    add_option(parser, "confidence", type=float, default=0.999, help="of each audit's verdict (default 0.999)")
    add_option(parser, "delta", type=float, default=1e-5, help="delta of every epsilon (default 1e-5)")
    add_option(
        parser,
        "seed",
        type=int,
        default=None,
        help="for a run that can be repeated; default: the secret noise that users get",
    )
    add_format(parser)


def _run(options: argparse.Namespace) -> int:
    """Run the audits and print each lower bound beside its claim."""
    from opacus_ac.audit import canary_audit, noise_audit, one_run_audit, scalar_audit

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
        noise_audit(steps=max(50, options.steps * 2 // 5), **noise, **settings),
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


COMMANDS = (Command("audit", "try to refute what the private step claims, on a small model", _arguments, _run),)
