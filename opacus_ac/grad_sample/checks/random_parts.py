"""Finds dropout in modules that mode "bk" runs again on single records, and that would not repeat themselves."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from opacus_ac.grad_sample.module_replay import names_in_methods


def random_part(module: nn.Module) -> str | None:
    """Return why a second run of a module would not return the same, with the remedy; None if nothing tells so."""
    for path, part, user in _parts(module, "", None):
        rate = _rate(part, user) if part.training else 0.0
        if rate > 0:
            attribute = "p" if isinstance(part, _DropoutNd) else "dropout"
            return (
                f"it has no rule and is run again on single records, and {path or type(part).__name__} drops other "
                f"values each time ({attribute}={rate:g}). Set that to 0, or freeze the layer with "
                "requires_grad_(False); dropout between layers that have rules may stay"
            )
    return None


def _parts(
    module: nn.Module, path: str, user: tuple[nn.Module, str] | None
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, str] | None]]:
    """Yield the parts of a module, each with its path and with the module whose methods use it, under which name."""
    yield path, module, user
    for name, child in module.named_children():
        in_container = isinstance(module, nn.ModuleList | nn.ModuleDict) and user is not None
        yield from _parts(child, f"{path}.{name}" if path else name, user if in_container else (module, name))


def _rate(part: nn.Module, user: tuple[nn.Module, str] | None) -> float:
    """Return the share of values that a part drops whenever it is called; 0 if it is not known to be called."""
    if isinstance(part, nn.MultiheadAttention):
        return float(part.dropout)
    if isinstance(part, nn.RNNBase):
        return float(part.dropout) if part.num_layers > 1 else 0.0
    if not isinstance(part, _DropoutNd) or user is None:
        return 0.0
    module, name = user
    called = isinstance(module, nn.Sequential) or name in names_in_methods(module)
    return float(part.p) if called else 0.0
