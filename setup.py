"""The package is described in setup.cfg. Added here are the links that need the address of the repository.

A package index shows the README alone, so its links to files of the repository must be absolute there. Without an
address (``url`` in setup.cfg) they stay as they are.
"""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PAGES = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md", "Security": "SECURITY.md"}


def described(readme, address):
    """Return a README whose links to files of the repository are absolute."""

    def absolute(link):
        kind = "raw" if link[1] else "blob"  # a picture is loaded, a page is looked at
        return f"{link[1] or ''}]({address}/{kind}/main/{link[2]}"

    return re.sub(r"(!\[[^\]]*)?\]\((?![a-z]+:|#)([^)\s]+)", absolute, readme)


def settings():
    """Return what setup.cfg leaves open."""
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    address = config["metadata"].get("url", "").rstrip("/")
    if not address:
        return {}
    own = dict(line.split(" = ") for line in config["metadata"]["project_urls"].strip().splitlines())
    pages = {name: f"{address}/blob/main/{page}" for name, page in PAGES.items()}
    return {
        "project_urls": {"Source": address, "Issues": f"{address}/issues", **pages, **own},
        "long_description": described((ROOT / "README.md").read_text(encoding="utf-8"), address),
    }


setup(**settings())
