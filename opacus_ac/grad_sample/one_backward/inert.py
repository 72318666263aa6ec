"""What the hooks of a capture become in a pickled model: they do nothing."""

from __future__ import annotations

from typing import Any


def inert() -> Any:
    """Return the object that replaces a hook in a pickled model; see ``Capture.__reduce__``."""
    return _Inert()


class _Inert:
    def _start(self, *_: Any) -> None: ...

    def _end(self, *_: Any) -> None: ...

    def _before(self, *_: Any) -> None: ...

    def _enter(self, *_: Any) -> None: ...

    def _after(self, *_: Any) -> None: ...
