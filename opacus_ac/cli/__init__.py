"""The command line ``opacus-ac``: each subcommand is one row of a table and one function.

torch and opacus are imported only when a subcommand needs them, so that help and usage errors appear at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence

from opacus_ac._version import __version__
from opacus_ac.cli import audit, finetune, plans, result, show
from opacus_ac.cli.command import BAD_USAGE, OK, REFUTED, Command

__all__ = ["BAD_USAGE", "COMMANDS", "OK", "REFUTED", "Command", "build_parser", "main"]

BROKEN_PIPE = 128 + 13
"""Exit code after the reader of the output has closed the pipe, as shells report it."""

COMMANDS: tuple[Command, ...] = (
    *finetune.COMMANDS,
    *result.COMMANDS,
    *plans.COMMANDS,
    *show.COMMANDS,
    *audit.COMMANDS,
)
"""The subcommands, in the order in which help lists them."""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with a subparser for every row of :data:`COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="opacus-ac",
        description="DP-Adam-AC for Opacus.",
        epilog=f"exit codes: {OK} success, {REFUTED} a claim was refuted, {BAD_USAGE} bad usage or input; finetune has "
        "more",
    )
    parser.add_argument("--version", action="version", version=f"opacus_ac {__version__}")
    children = parser.add_subparsers(title="commands", required=True, metavar="command")
    for command in COMMANDS:
        child = children.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(child)
        child.set_defaults(command=command, parser=child)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: words of the command line; by default those of the process.

    Raises:
        SystemExit: If argparse refuses the arguments (code 2), or has printed help (code 0).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    for command in COMMANDS:
        if command.parses_all and [command.name] == list(arguments[:1]):
            return command.run(argparse.Namespace(rest=list(arguments[1:])))
    options, rest = build_parser().parse_known_args(arguments)
    if rest:
        options.parser.error(f"there is no option {' '.join(rest)}{_meant(rest[0], options.parser)}")
    try:
        code: int = options.command.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout at its end
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        print(f"{options.parser.prog}: error: {error}", file=sys.stderr)
        return BAD_USAGE
    return code


def _meant(word: str, parser: argparse.ArgumentParser) -> str:
    """Return a question for the end of a message: the option of a parser that a misspelt word may have meant."""
    wanted = word.partition("=")[0].replace("_", "-")
    near = difflib.get_close_matches(wanted, [name for name in parser._option_string_actions if "_" not in name], n=1)
    return f": did you mean {near[0]}?" if near else ""
