"""What a private optimizer is made of: parts that describe and save themselves."""

from __future__ import annotations

import copy
from typing import Any, ClassVar


class Part:
    """A part of a private optimizer, such as the clip policy or the average of the weights.

    Ledger, report and checkpoint ask the parts one by one, so that a part with a setting, or with a state, overrides a
    method here and needs no other edit. A state has plain values, such as JSON can hold, except for the two kinds of
    entries that the class names.

    Attributes:
        by_parameter: entries of the state that have a tensor, or None, for each trained parameter.
        of_one_process: entries of the state that are of this process alone, such as that of a seeded stream. A
            checkpoint of several processes does not hold them.
    """

    by_parameter: ClassVar[tuple[str, ...]] = ()
    of_one_process: ClassVar[tuple[str, ...]] = ()

    def public_settings(self) -> dict[str, Any]:
        """Return the settings on which the guarantee depends, for ledger and checkpoint; plain values."""
        return {}

    def released(self) -> list[str]:
        """Return in words what the part adds to every release, for the report."""
        return []

    def warnings(self) -> list[str]:
        """Return what a reader of the report must know of the part."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` needs to continue."""
        return {}

    def check_state(self, state: Any) -> None:
        """Raise unless :meth:`load_state_dict` would take over ``state``; change nothing. By default a copy loads it.

        Raises:
            ValueError: If the state is of a part with other settings.
        """
        copy.deepcopy(self).load_state_dict(state)

    def load_state_dict(self, state: Any) -> None:
        """Continue from a state that :meth:`check_state` has accepted."""
