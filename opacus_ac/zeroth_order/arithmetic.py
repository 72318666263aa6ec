"""Runs a closure operation by operation: in float64, and stopped before it draws at random or changes the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_WIDER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}
_PICKS = {
    torch.ops.aten.embedding.default,
    torch.ops.aten.index_select.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.gather.default,
}
"""Operations that copy values: what they pick is made wider, not the table that they pick from."""

_COPIES = {torch.ops.aten.clone.default, torch.ops.aten._to_copy.default}
"""Copies keep their type unless they are asked for another: a batch is known by its content."""


class ClosureError(ValueError):
    """A closure does what would break the guarantee; it is stopped before."""


def _wider(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(_WIDER[value.dtype]) if value.dtype in _WIDER else value
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value


class ClosureWatch(TorchDispatchMode):
    """Watches the operations of a closure, and does them in float64 where asked for.

    Args:
        module: the model, whose weights and buffers nothing may write into.
        wide: do every operation in float64, whatever its arguments are. What is written in place keeps its type.

    Raises:
        ClosureError: If an operation draws at random, or would write into the model. It has not been done then.
    """

    def __init__(self, module: nn.Module, *, wide: bool) -> None:
        super().__init__()
        self._wide = wide
        self.coarsest = torch.finfo(torch.float64).eps
        """eps of the coarsest floating-point type that anything was computed in, or read from."""
        self._held: dict[int, str] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            address = _address(tensor)
            if address:
                self._held[address] = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and not _draws_nothing(func, args, kwargs):
            raise ClosureError(
                f"the closure draws at random ({func}), so that the two losses of a direction differ by more than the "
                "weights, and a record's by who else is in the batch: call model.eval() before the step, set dropout "
                "to 0, and draw nothing in the closure"
            )
        if not self._wide:
            floats = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
            self.coarsest = max([self.coarsest, *(torch.finfo(t.dtype).eps for t in floats)])
        if not func._schema.is_mutable:
            return func(*args, **kwargs) if not self._wide else self._widely(func, args, kwargs)
        written = _written(func, args, kwargs)
        for tensor in written:
            if _address(tensor) in self._held:
                raise ClosureError(
                    f"the closure writes into {self._held[_address(tensor)]} ({func}), which would leave private data "
                    "in the model without noise: leave out max_norm of embeddings, running statistics, and any other "
                    "state that a forward pass changes"
                )
        if self._wide and written and written[0].dtype in _WIDER:
            dtype = written[0].dtype
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))
        elif self._wide:
            kept = {id(t) for t in written}
            args, kwargs = tree_map(lambda x: x if id(x) in kept else _wider(x), (args, kwargs))
        return func(*args, **kwargs)

    def _widely(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func.is_view or (func in _COPIES and kwargs.get("dtype") is None):
            return func(*args, **kwargs)
        if func not in _PICKS:
            args, kwargs = tree_map(_wider, (args, kwargs))
        return tree_map_only(Tensor, _wider, func(*args, **kwargs))


class _Mixed(TorchFunctionMode):
    """Makes arguments of two types wider before torch compares them; those of one type are made so later."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "_")
        if not name.endswith(("_", "_as")) and "out" not in kwargs:
            dtypes = {t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()}
            if len(dtypes) > 1:
                args, kwargs = tree_map(_wider, (args, kwargs))
        return func(*args, **kwargs)


@contextlib.contextmanager
def _wide_recurrent(module: nn.Module) -> Iterator[None]:
    """Let recurrent layers compute in float64: they compare types by themselves, and oneDNN has no float64 for them."""
    layers = [inner for inner in module.modules() if isinstance(inner, nn.RNNBase)]
    enabled: bool = torch._C._get_mkldnn_enabled()
    held = [layer._flat_weights for layer in layers]
    hooks = [layer.register_forward_pre_hook(lambda _, args: tree_map(_wider, args)) for layer in layers]
    try:
        torch._C._set_mkldnn_enabled(False)
        for layer, weights in zip(layers, held, strict=True):
            layer._flat_weights = [None if w is None else w.detach().double() for w in weights]
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
        for layer, weights, hook in zip(layers, held, hooks, strict=True):
            layer._flat_weights = weights
            hook.remove()


def unwatched() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which nothing is watched or done in another type than its own."""
    return _disable_current_modes()


def _address(tensor: Tensor) -> int:
    """Return where the memory of a tensor begins; 0 where it has none."""
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return 0


def _arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the arguments of an operation with what its schema says of them."""
    for i, described in enumerate(func._schema.arguments):
        if i < len(args) or described.name in kwargs:
            yield described, args[i] if i < len(args) else kwargs[described.name]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation writes into."""
    found = [
        value
        for described, value in _arguments(func, args, kwargs)
        if described.alias_info is not None and described.alias_info.is_write
    ]
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _draws_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Return whether an operation that may draw at random does not, or draws from the closure's own generator."""
    given = {described.name: value for described, value in _arguments(func, args, kwargs)}
    if given.get("generator") is not None:
        return True  # what it draws has to be the same again
    named = [given[name] for name in ("dropout_p", "dropout") if name in given]
    named += [given["p"]] if "train" in given and "p" in given else []
    off = [given[name] in (False, None) for name in ("train", "training") if name in given]
    if not named and not off:
        # Attention whose dropout is left at its default, 0.
        return any(described.name == "dropout_p" for described in func._schema.arguments)
    return any(off) or (bool(named) and all(value == 0 for value in named))


class Evaluation:
    """Computes the losses of the records of the batch in hand, in float64 or in the model's own types.

    Args:
        module: the model.
        wide: compute in float64.

    Attributes:
        coarsest: eps of the coarsest type in which the last watched call computed.
    """

    def __init__(self, module: nn.Module, *, wide: bool) -> None:
        self.module, self.wide = module, wide
        self.coarsest = 0.0

    @torch.no_grad()
    def __call__(self, closure: Callable[[], Tensor], *, watched: bool = False) -> Tensor:
        """Return the losses of the records, ``[B]`` float64 on the CPU.

        Args:
            closure: computes them.
            watched: look at each operation also where it need not be made wider.

        Raises:
            ClosureError: If the closure draws at random, or would write into the model.
            ValueError: If it does not return one loss per record.
        """
        # Autocast keeps its copies of the weights while it is on, and they would not move with the weights.
        torch.clear_autocast_cache()
        with contextlib.ExitStack() as stack:
            if self.wide:
                stack.enter_context(_wide_recurrent(self.module))
                stack.enter_context(_Mixed())
            if self.wide or watched:
                watch = stack.enter_context(ClosureWatch(self.module, wide=self.wide))
                stack.callback(lambda: setattr(self, "coarsest", watch.coarsest))
            losses = closure()
        if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.numel():
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"the closure must return one loss per record, a tensor of shape [B], got {shape}: a mean over the "
                "batch cannot be clipped per record. Use reduction='none', or "
                "opacus_ac.zeroth_order.record_losses(model, batch)"
            )
        return losses.detach().double().cpu()
