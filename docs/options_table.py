"""Prints the tables of docs/options.md; ``python docs/options_table.py --write`` puts them into the page."""

from __future__ import annotations

import sys
from pathlib import Path

from opacus_ac.engine.options import OPTIONS, PrivateOptions

PAGE = Path(__file__).with_name("options.md")
MARK = "<!-- The rest of this page is written by docs/options_table.py. -->"


def tables() -> str:
    """Return one table per group, in the order of ``PrivateOptions``."""
    parts: list[str] = []
    for attribute, field in PrivateOptions.__dataclass_fields__.items():
        group = type(field.default).__name__ if attribute not in OPTIONS or OPTIONS[attribute].group else None
        title = f"`{attribute}=`" if group is None else f"`{attribute}=` {group}"
        found = [one for one in OPTIONS.values() if (one.group or one.name) == attribute]
        rows = [f"| `{one.name}` | `{cell(one.type)}` | `{one.default!r}` | {cell(one.help)} |" for one in found]
        said = [] if group is None else [type(field.default).__doc__.split("\n")[0], ""]
        parts += [f"## {title}", "", *said, "| name | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join(parts)


def cell(text: str) -> str:
    """Return text that can stand in a cell of a table."""
    return text.replace("|", "\\|")


def page(text: str) -> str:
    """Return the page with the tables as they are now."""
    return text.split(MARK)[0] + f"{MARK}\n\n{tables()}"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(tables())
