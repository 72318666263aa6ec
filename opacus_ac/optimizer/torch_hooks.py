"""What a private optimizer has in common with torch's optimizers beside the step: hooks, and what becomes of copies."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, MutableMapping
from typing import Any, NoReturn

from torch.optim import Optimizer

Hooks = MutableMapping[int, Callable[..., Any]]

_STEP = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
_STATE = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class TorchHooks:
    """The hooks of ``torch.optim.Optimizer`` for an optimizer around another one.

    Args:
        optimizer: the other one.
        **options: further arguments of the next class.

    Guarantees:
        Hooks of ``register_step_pre_hook`` and ``register_step_post_hook`` run once for every release, before and after
        it is applied. They find released gradients only. Hooks on state dicts run where the inner optimizer makes and
        reads them.
    """

    _optimizer_step_pre_hooks: Hooks
    _optimizer_step_post_hooks: Hooks

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        self._share_hooks(optimizer)
        super().__init__(optimizer, **options)  # type: ignore[call-arg]  # that of Opacus's optimizer

    def _share_hooks(self, inner: Optimizer | None) -> None:
        """Have no hooks on steps, and those of ``inner`` on state dicts."""
        for name in _STEP + _STATE:
            known = None if inner is None or name in _STEP else inner.__dict__.get(name)
            self.__dict__[name] = OrderedDict() if known is None else known

    def _patch_step_function(self) -> None:
        """Leave ``step`` as it is. torch would replace it, for the whole class, by one that calls the hooks."""

    def _run_before(self) -> None:
        for hook in list(self._optimizer_step_pre_hooks.values()):
            if hook(self, (self,), {}) is not None:
                raise ValueError("a hook before the step returned arguments for it, and a private step takes none")

    def _run_after(self) -> None:
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self, (self,), {})

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be pickled, because a copy would take steps with known noise, for which nobody would account.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a private optimizer cannot be pickled: its noise is secret, and nobody would account for the steps of a "
            "copy. Save optimizer.state_dict(), or call engine.save_checkpoint"
        )
