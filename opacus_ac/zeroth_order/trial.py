"""The first look at a closure: whether it gives the same losses again, and how many digits they lose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from opacus_ac.zeroth_order.arithmetic import ClosureError, Evaluation
from opacus_ac.zeroth_order.rounding import SAFETY, WIDE


def try_closure(
    closure: Callable[[], Tensor], module: nn.Module, *, wide: bool, single: bool, loss: float, slack: float
) -> None:
    """Raise ``ValueError`` for a closure whose differences would not be those of its records alone.

    It is called at the weights as they are: three times for losses in float64, of which one is in the model's own
    types, and twice for records by themselves.

    Args:
        closure: computes the losses of the batch in hand.
        module: the model.
        wide: whether losses are computed in float64.
        single: whether records are computed by themselves.
        loss: size up to which losses count in full.
        slack: by how much a loss may be off.

    Raises:
        ClosureError: If it draws at random, writes into the model or replaces its buffers, or if its losses are others
            when it is called again with the same weights.
        ValueError: If rounding moves its losses by more than there is room for, or it cannot be computed in float64.
    """
    buffers = dict(module.named_buffers())
    own = Evaluation(module, wide=False)
    native = own(closure, watched=True)
    found = _in_float64(closure, module) if wide else native
    again = Evaluation(module, wide=wide)(closure, watched=True)
    eps = WIDE if wide else own.coarsest
    for name, buffer in module.named_buffers():
        if buffers.get(name) is not buffer:
            raise ClosureError(
                f"the closure replaces the buffer {name}, in which a batch would leave something for the next one: "
                "keep the model from changing its buffers, or call it once before make_private where it only makes "
                "them at its first call"
            )
    if not _agree(found, again, SAFETY * eps, loss):
        raise ClosureError(
            "the closure gave other losses when it was called again with the same weights, so something was changed "
            "by the call before: it has to compute the losses of the same records, in the same order, each time. Take "
            "the batch outside of the closure, draw nothing at random in it, and keep no state"
        )
    if single:
        return
    if not wide:
        _check_native(closure, module, native, SAFETY * eps, loss)
    elif not _agree(native, found, SAFETY * own.coarsest, 0.0, slack / WIDE * own.coarsest):
        raise ValueError(
            "rounding moves the losses by more than C has room for, in float64 too, and by who else is in the batch: "
            "activations or a term of the loss are very much larger than the loss. Use a larger max_grad_norm or "
            "smoothing, or max_physical_batch_size=1"
        )


def _in_float64(closure: Callable[[], Tensor], module: nn.Module) -> Tensor:
    try:
        return Evaluation(module, wide=True)(closure)
    except ClosureError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"the closure cannot be computed in float64 ({type(error).__name__}: {error}), and in its own types "
            "records would change each other's losses by rounding: use max_physical_batch_size=1, which computes each "
            "record by itself, or ZerothOrderSettings(precision='native') with a C and a smoothing that leave room "
            "for it"
        ) from error


def _check_native(
    closure: Callable[[], Tensor], module: nn.Module, native: Tensor, relative: float, loss: float
) -> None:
    """Refuse losses that lose more digits in the model's own types than they are taken to."""
    try:
        exact = _in_float64(closure, module)
    except ValueError:
        return  # then the caller's word for it is all there is
    if not _agree(native, exact, relative, loss):
        raise ValueError(
            "rounding moves the losses by more than their size accounts for, and by who else is in the batch: leave "
            "precision at its default, which computes them in float64, or use max_physical_batch_size=1"
        )


def _agree(first: Tensor, second: Tensor, relative: float, loss: float, absolute: float = 0.0) -> bool:
    """Return whether losses ``[B]`` differ by at most ``relative * max(size, loss)``, or by at most ``absolute``."""
    if first.shape != second.shape:
        return False
    finite = first.isfinite() & second.isfinite()
    if not absolute and not torch.equal(first.isfinite(), second.isfinite()):
        return False  # the model's own types may overflow where float64 does not
    room = (relative * first.abs().clamp(min=loss)).clamp(min=absolute)
    return bool(((first - second).abs() <= room)[finite].all())
