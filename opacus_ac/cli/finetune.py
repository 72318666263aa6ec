"""``opacus-ac finetune``: fine-tunes a chat model on private dialogues. Options are first checked without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields

from opacus_ac.cli.command import INTERRUPTED, OK, Command, add_option
from opacus_ac.integrations.finetune.arguments import EXIT_CODES, TRAINING_HELP, DataArguments, ModelArguments
from opacus_ac.integrations.finetune.demo import DATA_OPTIONS, demo_arguments
from opacus_ac.integrations.finetune.errors import OUTSIDE, outside
from opacus_ac.integrations.trainer.arguments import PrivacyArguments

PROG = "opacus-ac finetune"
USAGE = f"{PROG} (--demo | --train_file FILE --output_dir DIR (--target_epsilon E | --noise_multiplier S)) [options]"
_GROUPS: tuple[tuple[str, Iterable[tuple[str, str]]], ...] = (
    *(
        (title, [(field.name, field.metadata["help"]) for field in fields(kind)])
        for title, kind in (("data", DataArguments), ("model", ModelArguments), ("privacy", PrivacyArguments))
    ),
    ("training (transformers.TrainingArguments)", TRAINING_HELP.items()),
)


def _own_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--demo", action="store_true", help="a first run on 10,000 invented dialogues, into ./demo")
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; the command line overrides it")
    add_option(parser, "dry-run", action="store_true", help="say what the run would be and cost, and end")
    add_option(parser, "help-all", action="store_true", help="show the other options of TrainingArguments too")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows an option without a placeholder for its value, which the help text describes."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.nargs == "*" else super()._format_args(action, default_metavar)


def light_parser() -> argparse.ArgumentParser:
    """Return a parser that needs no torch. It serves for help, and to find out which options are given."""
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())
    parser = argparse.ArgumentParser(
        prog=PROG,
        usage=USAGE,
        description="Fine-tune a chat model on private dialogues with DP-Adam-AC.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    _own_options(parser)
    for title, options in _GROUPS:
        group = parser.add_argument_group(title)
        for name, text in options:
            # Only the presence of an option counts here. The full parser knows the types; a switch has no value.
            group.add_argument(f"--{name}", nargs="*", help=text)
            if "_" in name:
                spelling = f"--{name.replace('_', '-')}"
                group.add_argument(spelling, dest=name, nargs="*", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _with_demo(parser: argparse.ArgumentParser, options: argparse.Namespace, given: Sequence[str]) -> list[str]:
    """Return the options of the demo, followed by those that were given, which override them."""
    for name in (*DATA_OPTIONS, "config"):
        if getattr(options, name) is not None:
            parser.error(f"--demo brings its own data: leave out --{name}, or leave out --demo")
    own = demo_arguments()
    data = own[own.index("--train_file") + 1]
    print(f"demo: 10,000 invented dialogues stand for the private data: {data}", file=sys.stderr)
    return [*own, *given]


def run(arguments: Sequence[str]) -> int:
    """Check the options without torch, then parse them in full and run. Returns the exit code."""
    parser = light_parser()
    options = parser.parse_known_args(arguments)[0]
    if options.demo:
        arguments = _with_demo(parser, options, arguments)
    elif options.config is None and not options.help_all:
        missing = [name for name in ("train_file", "output_dir") if not getattr(options, name)]
        if missing:
            parser.error(f"--{missing[0]} is missing")
        if options.target_epsilon is None and options.noise_multiplier is None:
            parser.error("give --target_epsilon, or --noise_multiplier")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _own_options(own)
    words = own.parse_known_args(arguments)[1]
    try:
        return _help_all() if options.help_all else _checked_and_run(words, options)
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        found = _told(error)
        if found is None or options.debug:
            raise
        message, code = found
        print(f"{PROG}: error: {message}", file=sys.stderr)
        return code


def _help_all() -> int:
    from opacus_ac.integrations.finetune.job import full_parser

    full_parser(PROG, USAGE).print_help()
    return OK


def _checked_and_run(words: Sequence[str], options: argparse.Namespace) -> int:
    """Check what can be checked without torch, and then run."""
    from opacus_ac.integrations.finetune import early
    from opacus_ac.integrations.finetune.rows import notes

    checked = early.check(words, options.config, dry_run=options.dry_run)
    for line in notes(checked.rows.facts, on_terminal=sys.stderr.isatty()):
        print(f"note: {line}", file=sys.stderr)
    from opacus_ac.integrations.finetune import finetune
    from opacus_ac.integrations.finetune.job import parse

    job = parse(checked.words, None, prog=PROG, usage=USAGE)
    job.rows = checked.rows
    del checked  # the rows go with the job, which lets them go once they are tokenised
    return finetune.run(job, dry_run=options.dry_run)


def _told(error: Exception) -> tuple[str, int] | None:
    """Return message and exit code of an error that a user can act on; None for a defect."""
    code = getattr(error, "exit_code", None)
    if code is not None:
        return str(error), int(code)
    reason = outside(error)
    return None if reason is None else (reason, OUTSIDE)


COMMANDS = (
    Command(
        "finetune",
        "fine-tune a chat model on private dialogues",
        lambda parser: None,
        lambda options: run(options.rest),
        parses_all=True,
    ),
)
