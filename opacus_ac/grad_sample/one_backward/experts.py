"""The experts of transformers' mixtures, run so that every product with their stacked weights is seen.

transformers lets a library register a way of its own to run the experts. Ours sorts the rows by expert and multiplies
each stretch with its expert's matrix. It hands input and output of every product to whoever watches. What comes out is
the same.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import names_in_methods, written_type
from opacus_ac.grad_sample.transfers import on_device

_NAME = "opacus_ac"
_MODULE = "transformers.integrations.moe"
_SAYS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")


@dataclass(frozen=True)
class Product:
    """One product of rows with the stacked weights of experts.

    Attributes:
        weight: name of the stack ``[E, out, in]``, or ``[E, in, out]`` where the module is transposed.
        bias: name of the stack of biases ``[E, out]``, or None.
        inputs: ``[S, in]``, in the order of the experts.
        tokens: which row of the module's input each is, ``[S]``.
        counts: rows of each expert.
        rows: number of rows of the module's input.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    tokens: Tensor
    counts: list[int]
    rows: int

    def without_tensors(self) -> Product:
        """Return the same for one who holds the tensors otherwise."""
        return replace(self, inputs=_NOTHING, tokens=_NOTHING)


_NOTHING = torch.empty(0)

Watch = Callable[[Product, Tensor], Tensor]
"""Takes a product and its output ``[S, out]``, and returns what takes the output's place."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts of transformers as stacks, and lets the library choose how they run."""
    if not all(hasattr(module, name) for name in _SAYS) or not hasattr(module, "config"):
        return False
    return _MODULE in sys.modules and hasattr(written_type(module).forward, "__wrapped__")


def mixtures(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold experts directly: they hand ``[B T, d]``, record after record, to what is inside."""
    return [m for m in model.modules() if any(is_experts(child) for child in m.children())]


def holds_own_experts(module: nn.Module) -> bool:
    """Whether a module has stacks of experts that run in a way of their own, so that it must be run again as a whole.

    Rows that such experts are handed are repeated or sorted by expert, so nothing tells which records they are of.
    """
    for name, inner in module._modules.items():
        if inner is None or is_experts(inner):
            continue
        of_methods = _is_never_called(inner)
        stacks = inner.parameters(recurse=of_methods) if of_methods or name == "experts" else ()
        if any(p.dim() > 2 and p.requires_grad for p in stacks):
            return True
        if name == "experts" and any(_lends_its_parameters(part) for part in inner.children()):
            return True  # stacks [E J, d], of which the module around takes the rows of an expert
    return False


def _lends_its_parameters(module: nn.Module) -> bool:
    """Whether a module has trained parameters that none of its methods names, so that only others can use them."""
    own = {name for name, p in module._parameters.items() if p is not None and p.requires_grad}
    return bool(own) and not own & names_in_methods(module)


def _is_never_called(module: nn.Module) -> bool:
    """Whether the forward of a module does nothing but raise an error, so that others call its methods."""
    # Looked up without descriptors, because that of a traced module fails on its class.
    code = getattr(inspect.getattr_static(written_type(module), "forward", None), "__code__", None)
    return code is not None and code.co_names == ("NotImplementedError",)


class _Watched:
    """Stands in for an experts module's configuration while its forward starts, and says who watches."""

    _experts_implementation = _NAME

    def __init__(self, config: Any, watch: Watch) -> None:
        self.config, self.watch = config, watch


def watch(module: nn.Module, watcher: Watch) -> None:
    """Have the next call of an experts module hand its products to ``watcher``."""
    interface = sys.modules[_MODULE].ALL_EXPERTS_FUNCTIONS
    if _NAME not in interface:
        interface.register(_NAME, _forward)
    module.config = _Watched(module.config, watcher)  # type: ignore[assignment]


def unwatch(module: nn.Module) -> None:
    """Undo :func:`watch`, whether the call came or not."""
    config: Any = module.config
    if isinstance(config, _Watched):
        module.config = config.config


def _forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the experts on rows ``[N, d]``, each through the ``k`` experts of ``top_k_index`` ``[N, k]``."""
    watcher = module.config.watch
    unwatch(module)
    if module._is_expert_parallel:
        raise ValueError("experts are spread over processes, and per-sample gradients need all rows of a record in one")
    rows, choices = top_k_index.shape
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(chosen, minlength=module.num_experts).tolist()
    tokens = order // choices

    def product(name: str, inputs: Tensor) -> Tensor:
        bias = f"{name}_bias" if module.has_bias else None
        output = _by_expert(module, name, bias, inputs, counts)
        return watcher(Product(name, bias, inputs, tokens, counts, rows), output)

    states = product("gate_up_proj" if module.has_gate else "up_proj", hidden_states[tokens])
    states = module._apply_gate(states) if module.has_gate else module.act_fn(states)
    states = product("down_proj", states)
    if module.has_post_expert_norm:
        states = module.post_expert_norm(states)
    weighted = states * top_k_weights.reshape(-1)[order].unsqueeze(1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].view(rows, choices, -1).sum(1).to(hidden_states.dtype)


def _by_expert(module: Any, name: str, bias: str | None, inputs: Tensor, counts: list[int]) -> Tensor:
    weights = getattr(module, name)
    parts = []
    # Split, because the gradient of a slice is a tensor of the whole's size.
    for expert, rows in enumerate(inputs.split(counts)):
        if len(rows):
            weight = weights[expert].t() if module.is_transposed else weights[expert]
            parts.append(F.linear(rows, weight, None if bias is None else getattr(module, bias)[expert]))
    width = weights.shape[2 if module.is_transposed else 1]
    return torch.cat(parts) if parts else inputs.new_zeros(0, width)


def expert_of_rows(counts: list[int], device: torch.device) -> Tensor:
    """Return the expert of each row, ``[S]``, from the number of rows of each."""
    repeats = on_device(torch.tensor(counts), device)
    return torch.arange(len(counts), device=device).repeat_interleave(repeats, output_size=sum(counts))


def stretches(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield the experts that have rows, each with its stretch of rows."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(first, first + count)
        first += count
