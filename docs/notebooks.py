"""Write the notebooks of examples/notebooks from pages of the documentation: ``python docs/notebooks.py``.

A page's Python becomes the cells with code, and all else the text between them. So page and notebook say the same, and
a test runs the cells.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
FOLDER = DOCS.parent / "examples" / "notebooks"
PAGES = {"quickstart.md": "quickstart.ipynb", "from-opacus.md": "from_opacus.ipynb"}
_PYTHON = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s]+)")


def _cell(kind: str, text: str) -> dict[str, Any]:
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "metadata": {}, "source": text.strip("\n").splitlines(keepends=True), **code}


def notebook(page: str) -> dict[str, Any]:
    """Return the notebook of a page, in the form of nbformat 4.4."""
    text = (DOCS / page).read_text(encoding="utf-8").replace(f"]({Path('..', 'examples', 'notebooks')}/", "](")
    text = _LINK.sub(lambda link: link[1] + (link[2] if link[2].endswith(".ipynb") else f"../../docs/{link[2]}"), text)
    pieces = _PYTHON.split(text)  # text, code, text, ...
    cells = [_cell("code" if number % 2 else "markdown", piece) for number, piece in enumerate(pieces) if piece.strip()]
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 4,
    }


def code(path: Path) -> list[str]:
    """Return the code of a notebook, cell by cell."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def main() -> None:
    """Write all notebooks."""
    FOLDER.mkdir(exist_ok=True)
    for page, name in PAGES.items():
        text = json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n"
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
