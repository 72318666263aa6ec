"""``opacus-ac epsilon``, ``calibrate`` and ``plan``: the privacy cost of a planned run. Needs no torch."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from opacus_ac.cli.command import OK, Command, add_format, add_option

if TYPE_CHECKING:
    from opacus_ac.accounting import AttackBounds

_METHODS = {"vrdp": "rdp", "vpld": "pld"}
_SEARCHED = 12
"""Number of steps below which finding the learning rate takes too large a share of them (docs/automatic-rate.md)."""
_SHOWN_RATE = 0.01
"""The false-positive rate of the attacker in the table of ``plan``."""


def _sampling_options(parser: argparse.ArgumentParser) -> None:
    add_option(parser, "dataset-size", type=int, help="number of records N, a public constant")
    add_option(parser, "batch-size", type=float, help="expected batch size B")
    add_option(parser, "sample-rate", type=float, help="B / N, instead of both")
    add_option(parser, "steps", type=int, help="number of steps")
    add_option(parser, "epochs", type=float, help="passes over the data, instead of steps")
    add_option(parser, "delta", type=float, required=True, help="delta, well below 1 / N")
    add_option(
        parser,
        "sampling",
        choices=("poisson", "fixed_size", "truncated_poisson", "shuffled"),
        default="poisson",
        help="how batches are drawn (default poisson)",
    )
    add_option(parser, "max-batch-size", type=int, help="largest batch, of truncated_poisson")
    _accountant_option(parser)
    add_format(parser)


def _accountant_option(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser,
        "accountant",
        choices=tuple(_METHODS),
        default="vpld",
        help="vpld (privacy loss distribution, tighter, default) or vrdp (Renyi, a privacy filter)",
    )


def _rate(options: argparse.Namespace) -> float:
    if options.sample_rate is not None:
        if options.batch_size is not None:
            raise ValueError("give --sample-rate, or --dataset-size and --batch-size, not all")
        return float(options.sample_rate)
    if options.dataset_size is None or options.batch_size is None:
        raise ValueError("give --sample-rate, or both --dataset-size and --batch-size")
    if not 0 < options.batch_size <= options.dataset_size:
        raise ValueError(
            f"--batch-size {options.batch_size:g} must be > 0 and at most --dataset-size {options.dataset_size}"
        )
    return float(options.batch_size / options.dataset_size)


def _steps(options: argparse.Namespace, rate: float) -> int:
    if (options.steps is None) == (options.epochs is None):
        raise ValueError("give either --steps or --epochs")
    steps = options.steps if options.steps is not None else math.ceil(options.epochs / rate - 1e-9)
    if steps < 1:
        raise ValueError(f"a plan of {steps} steps costs nothing: give --steps or --epochs > 0")
    return int(steps)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments for the accounting functions."""
    rate = _rate(options)
    steps = _steps(options, rate)
    truncated = options.sampling == "truncated_poisson"
    if truncated and (options.dataset_size is None or options.max_batch_size is None):
        raise ValueError("--sampling truncated_poisson needs --dataset-size and --max-batch-size")
    if options.max_batch_size is not None and not truncated:
        raise ValueError("--max-batch-size belongs to --sampling truncated_poisson")
    if options.sampling == "shuffled":
        steps, rate = math.ceil(steps * rate - 1e-9), 1.0  # a pass is one charge at rate 1
    return {
        "sample_rate": rate,
        "steps": steps,
        "sampling": "poisson" if options.sampling == "shuffled" else options.sampling,
        "dataset_size": options.dataset_size if truncated else None,
        "max_batch_size": options.max_batch_size,
        "method": _METHODS[options.accountant],
    }


def _attacks(noise: float, plan: dict[str, Any]) -> AttackBounds:
    """Return what any attacker can do against the planned run."""
    from opacus_ac.accounting import Event, attack_bounds

    event = Event(noise, plan["sample_rate"], plan["sampling"], plan["dataset_size"], plan["max_batch_size"])
    return attack_bounds({event: plan["steps"]})


def _stated(options: argparse.Namespace, plan: dict[str, Any], **values: float) -> int:
    """Print the values and the plan that they belong to."""
    from opacus_ac.accounting import ADJACENCY, attack_sentences

    attacks = _attacks(values["noise_multiplier"], plan)
    _warn(options, values.get("target_epsilon", values.get("epsilon")))
    facts = {
        **values,
        "delta": options.delta,
        "accountant": options.accountant,
        "sampling": options.sampling,
        "sample_rate": plan["sample_rate"],
        "charges": plan["steps"],
        "neighbours": ADJACENCY[options.sampling],
    }
    if options.format == "json":
        finite = {k: "infinity" if v == math.inf else v for k, v in facts.items()}
        print(json.dumps({**finite, "attacks": asdict(attacks)}, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name.replace('_', ' '):18} {value if isinstance(value, str | int) else format(value, '.6g')}")
        print(*attack_sentences(attacks), sep="\n")
    return OK


def _warn(options: argparse.Namespace, epsilon: float | None) -> None:
    """Print what is wrong with the promise that is asked about."""
    from opacus_ac.budget.advice import weak_promise

    for line in weak_promise(epsilon, options.delta, options.dataset_size):
        print(f"warning: {line}", file=sys.stderr)


def _epsilon_arguments(parser: argparse.ArgumentParser) -> None:
    add_option(
        parser,
        "noise-multiplier",
        type=float,
        required=True,
        help="ratio of the noise's standard deviation to the L2 sensitivity of the release",
    )
    _sampling_options(parser)


def _epsilon(options: argparse.Namespace) -> int:
    from opacus_ac.accounting import plan_epsilon

    plan = _plan(options)
    epsilon = plan_epsilon(options.noise_multiplier, delta=options.delta, **plan)
    return _stated(options, plan, epsilon=epsilon, noise_multiplier=options.noise_multiplier)


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    add_option(parser, "target-epsilon", type=float, required=True, help="epsilon not to be exceeded")
    _sampling_options(parser)


def _calibrate(options: argparse.Namespace) -> int:
    from opacus_ac.accounting import calibrate_noise_multiplier, plan_epsilon

    plan = _plan(options)
    noise = calibrate_noise_multiplier(target_epsilon=options.target_epsilon, target_delta=options.delta, **plan)
    epsilon = plan_epsilon(noise, delta=options.delta, **plan)
    return _stated(options, plan, noise_multiplier=noise, epsilon=epsilon, target_epsilon=options.target_epsilon)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_option(parser, "dataset-size", type=int, required=True, help="number of records N, a public constant")
    add_option(parser, "batch-size", type=int, nargs="+", required=True, help="expected batch sizes B to compare")
    add_option(parser, "target-epsilon", type=float, nargs="+", required=True, help="budgets to compare")
    add_option(parser, "delta", type=float, required=True, help="delta, well below 1 / N")
    add_option(parser, "epochs", type=float, nargs="+", help="passes over the data to compare (default 3)")
    add_option(parser, "steps", type=int, nargs="+", help="numbers of steps to compare, instead of passes")
    _accountant_option(parser)
    add_format(parser)


def _lengths(options: argparse.Namespace, rate: float) -> list[tuple[float, int]]:
    """Return the runs to compare at a sampling rate, as (passes over the data, steps)."""
    if options.steps is None:
        passes = options.epochs or [3.0]
        if min(passes) <= 0:
            raise ValueError(f"--epochs {min(passes):g} must be > 0")
        return [(each, max(1, math.ceil(each / rate - 1e-9))) for each in passes]
    if options.epochs is not None:
        raise ValueError("give either --steps or --epochs")
    if min(options.steps) < 1:
        raise ValueError(f"--steps {min(options.steps)} must be at least 1")
    return [(steps * rate, steps) for steps in options.steps]


def _plan_row(options: argparse.Namespace, epsilon: float, size: int, length: tuple[float, int]) -> dict[str, Any]:
    """Return the noise of a run with this budget, batch size and length, and what an attacker can do against it."""
    from opacus_ac.accounting import Event, attack_bounds, calibrate_noise_multiplier
    from opacus_ac.release.statistics import default_histogram_weight

    epochs, steps = length
    noise = calibrate_noise_multiplier(
        target_epsilon=epsilon,
        target_delta=options.delta,
        sample_rate=size / options.dataset_size,
        steps=steps,
        method=_METHODS[options.accountant],
    )
    attacks = attack_bounds({Event(noise, size / options.dataset_size): steps})
    one_step = noise * math.sqrt(1 + default_histogram_weight(noise, size) ** 2) / size
    return {
        "target_epsilon": epsilon,
        "epochs": epochs,
        "batch_size": size,
        "steps": steps,
        "noise_multiplier": noise,
        "noise_to_signal": one_step,
        "noise_to_signal_of_run": one_step / math.sqrt(steps),
        "advantage": attacks.advantage,
        "true_positive_rates": attacks.true_positive_rates,
    }


def _plan_table(options: argparse.Namespace) -> int:
    """Print noise multiplier, noise-to-signal and what an attacker can do for every combination."""
    from opacus_ac.accounting.attacks import percent

    for size in options.batch_size:
        if not 0 < size <= options.dataset_size:
            raise ValueError(f"--batch-size {size} must be > 0 and at most --dataset-size {options.dataset_size}")
    _warn(options, max(options.target_epsilon))
    lengths = {size: _lengths(options, size / options.dataset_size) for size in options.batch_size}
    rows = [
        _plan_row(options, epsilon, size, lengths[size][i])
        for epsilon in options.target_epsilon
        for i in range(len(lengths[options.batch_size[0]]))
        for size in options.batch_size
    ]
    if options.format == "json":
        print(json.dumps(rows, indent=2))
        return OK
    print(f"N = {options.dataset_size}, delta = {options.delta:g}, Poisson batches, {options.accountant}")
    print(
        f"{'epsilon':>8} {'epochs':>7} {'batch':>7} {'steps':>7} {'noise':>9} {'per step':>10} {'of the run':>11} "
        f"{'caught':>7}"
    )
    for row in rows:
        print(
            f"{row['target_epsilon']:8g} {row['epochs']:7.4g} {row['batch_size']:7d} {row['steps']:7d} "
            f"{row['noise_multiplier']:9.4f} {row['noise_to_signal']:10.6f} {row['noise_to_signal_of_run']:11.7f} "
            f"{percent(row['true_positive_rates'][_SHOWN_RATE]):>7}"
        )
    print("noise: noise multiplier. per step: std of the noise on a coordinate of the mean gradient, in units of C.")
    print("of the run: the same for the mean of all steps' gradients, per step / sqrt(steps)")
    print(f"caught: someone who flags {100 * _SHOWN_RATE:g} % of outsiders by mistake catches at most so many insiders")
    if any(row["steps"] < _SEARCHED for row in rows):
        print(f"--learning_rate auto takes some steps to find the rate: plan {_SEARCHED} steps or more for it")
    return OK


COMMANDS = (
    Command("epsilon", "what a planned run costs", _epsilon_arguments, _epsilon),
    Command("calibrate", "how much noise a budget needs", _calibrate_arguments, _calibrate),
    Command("plan", "compare batch sizes, epochs and budgets", _plan_arguments, _plan_table),
)
