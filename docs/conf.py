"""Sphinx settings. Build: ``sphinx-build -W --keep-going -n docs build/html``."""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from pathlib import Path

from docutils.nodes import Element, TextElement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # BitNet layers of transformers compile on import otherwise
sys.path.insert(0, str(ROOT))

from opacus_ac import __version__  # noqa: E402

project = "opacus_ac"
author = "opacus_ac developers"
copyright = "opacus_ac developers, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx_copybutton", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
highlight_language = "none"  # fences without a language are formulas
nitpicky = True
# The build asks no other site for its names, and these have no page here.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|opacus|transformers|lightning|numpy|trl)\..*"),
    (r"py:.*", r"(argparse|collections|contextlib|os|pathlib|typing_extensions)\..*"),
    (r"py:.*", r"(Unpack|RateSchedule)"),
]

myst_heading_anchors = 3  # links to sections, as GitHub has them
myst_enable_extensions = ["deflist", "html_image"]
copybutton_prompt_text = "$ "  # of a block that shows a command and its output, the command is copied

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Guarantees"]
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"opacus_ac {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

#: Files outside of docs/ that have a page: links to them are links to the page.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CODE_OF_CONDUCT.md": "code-of-conduct.md",
}
_BADGES = re.compile(r"^\[!\[.*\n\n", re.MULTILINE)  # pictures from another address, of which the site has none
_INCLUDE = re.compile(r"```\{include\} \.\./(\S+)\n```\n")
_LINK = re.compile(r"(\]\()([^)#\s]+)")


def _target(path: str) -> str:
    """A link target of a file in the repository's root, as a page in docs/ has it."""
    if re.match(r"[a-z]+:", path):
        return path
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}")


def _as_page(text: str) -> str:
    return _LINK.sub(lambda link: link[1] + _target(link[2]), _BADGES.sub("", text))


def read_source(app: Sphinx, docname: str, content: list[str]) -> None:
    """Include files of the root, and let links that work on GitHub work in the site."""

    def included(found: re.Match[str]) -> str:
        app.env.note_dependency(str(ROOT / found[1]))
        return _as_page((ROOT / found[1]).read_text(encoding="utf-8"))

    text = _LINK.sub(lambda link: link[1] + PAGES.get(link[2].removeprefix("../"), link[2]), content[0])
    content[0] = _INCLUDE.sub(included, text)


def keep_first_line(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in the first line of an attribute's docstring for its type."""
    if what in {"attribute", "data", "property"} and lines:
        lines[:0] = ["..", ""]


def refer(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: TextElement) -> Element | None:
    """Short names link to the one entry that ends so; inner names that exist, but have no entry, are text."""
    name = node["reftarget"]
    if node.get("refdomain") != "py":
        return None
    if "." not in name and not node.get("refspecific"):
        node["refspecific"] = True
        domain = env.domains["py"]
        return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], name, node, text)
    try:
        pkgutil.resolve_name(name if name.startswith("opacus_ac.") else "")
    except (ValueError, ImportError, AttributeError):
        return None
    return text


def setup(app: Sphinx) -> None:
    """Connect the handlers."""
    app.connect("missing-reference", refer)
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)  # before napoleon's
    app.connect("source-read", read_source)
