"""The class of a subcommand, and options that several subcommands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OK, REFUTED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: nothing refuted, a claim refuted, bad usage or bad input, interrupted."""


@dataclass(frozen=True)
class Command:
    """One subcommand: a row of :data:`COMMANDS`.

    Attributes:
        name: the word that the user types.
        summary: one line of help.
        arguments: adds the options to the parser of the subcommand.
        run: does the work and returns the exit code. A ``ValueError`` is shown as bad usage.
        parses_all: whether the command has a parser of its own. ``run`` then gets all words after the name as
            ``options.rest``.
    """

    name: str
    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    parses_all: bool = False


def add_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup, name: str, **settings: Any) -> None:
    """Add the option ``--some-name``, which may also be spelled ``--some_name``."""
    spellings = [f"--{name}"] + ([f"--{name.replace('-', '_')}"] if "-" in name else [])
    parser.add_argument(*spellings, **settings)


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--format text|json``."""
    parser.add_argument("--format", choices=("text", "json"), default="text", help="output (default text)")
