"""Checks of values on a device, whose outcomes come to the host together."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from opacus_ac.grad_sample.transfers import on_host


class LateChecks:
    """Checks whose outcomes stay on the device until :meth:`verify`.

    A check that is looked at at once makes the host wait for the device, for each layer. What was computed from the
    checked values must not be used before :meth:`verify` has returned.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[Tensor, Callable[[], Exception]]] = []

    def note(self, holds: Tensor, error: Callable[[], Exception]) -> None:
        """Note a check.

        Args:
            holds: one truth value, on any device.
            error: returns what is raised if it is false.
        """
        self._noted.append((holds, error))

    def verify(self) -> None:
        """Look at all checks, in one transfer, and forget them.

        Raises:
            Exception: The error of the first check that does not hold.
        """
        noted, self._noted = self._noted, []
        if noted:
            held = on_host([holds for holds, _ in noted]).tolist()
            for holds, (_, error) in zip(held, noted, strict=True):
                if not holds:
                    raise error()
