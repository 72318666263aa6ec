"""Embeddings: a lookup, which may be multiplied by a constant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import bare_twin, call_forward, map_tensors, to_double
from opacus_ac.grad_sample.one_backward.bounds import wide
from opacus_ac.grad_sample.one_backward.outer_products import Lookup, Rows, Term


def unsupported(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    """Return the reason why this embedding cannot be trained privately; None if it can."""
    if module.max_norm is not None:
        return "max_norm rewrites rows of the weight in the forward pass, without noise"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq divides by counts over the whole batch, so records are coupled"
    return None


def scale_of(module: nn.Module) -> Tensor | float:
    """Return the constant by which the rows are multiplied (``embed_scale``, or 1)."""
    scale = getattr(module, "embed_scale", 1.0)
    if isinstance(scale, Tensor):
        weight = module._parameters["weight"]
        return scale.detach() if weight is None else scale.detach().to(weight.dtype)
    return float(scale)


def lookup_terms(module: nn.Module, ids: Tensor, backprops: Tensor) -> list[tuple[nn.Parameter, Term]]:
    """Return the term that one lookup adds to the gradient of the table.

    As in autograd, the row ``padding_idx`` gets no gradient.

    Args:
        module: the layer.
        ids: ``[B, ...]``.
        backprops: ``[B, ..., D]``.
    """
    assert isinstance(module, nn.Embedding)
    weight = module._parameters["weight"]
    if weight is None or not weight.requires_grad:
        return []
    scale = scale_of(module)
    values = backprops if isinstance(scale, float) and scale == 1.0 else backprops * scale
    return table_terms(weight, ids, values, module.padding_idx)


def table_terms(
    weight: nn.Parameter, ids: Tensor, values: Tensor, padding_idx: int | None
) -> list[tuple[nn.Parameter, Term]]:
    """Return the term that rows ``ids`` ``[B, ...]`` add to the gradient of a table.

    Args:
        weight: the table ``[V, D]``.
        ids: ``[B, ...]``.
        values: gradient at the rows, ``[B, ..., D]``.
        padding_idx: the row that gets no gradient, or None.
    """
    if padding_idx is not None:
        values = values.masked_fill((ids == padding_idx).unsqueeze(-1), 0)
    batch = ids.shape[0]
    flat = ids.reshape(batch, -1 if ids.numel() else 0)
    if (
        len(weight) <= flat.shape[1]
    ):  # as for relative positions, of which there are T^2: the gradient is the smaller one
        return [(weight, Rows(_written_down(flat, wide(values), weight.shape)))]
    return [(weight, Lookup(flat, values.reshape(batch, -1, values.shape[-1])))]


def ids_by_record(ids: Tensor, backprops: Tensor) -> Tensor:
    """Return ids ``[B, ...]``, if they came as ``[1, ...]`` or as positions ``[T]`` for all records."""
    if ids.dim() + 1 < backprops.dim():
        ids = ids.unsqueeze(0)
    return ids.expand(backprops.shape[:-1])


def _written_down(ids: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Return the gradients of a table ``[V, D]``, ``[B, V, D]``, from ids ``[B, n]`` and values ``[B, ..., D]``."""
    batch, (rows, width) = ids.shape[0], shape
    # One flat index_add over B * V rows needs no index tensor [B, n, D], and no special case for an empty batch.
    first = torch.arange(batch, device=ids.device) * rows
    grad = torch.zeros(batch * rows, width, device=values.device, dtype=values.dtype)
    grad.index_add_(0, (ids + first.unsqueeze(1)).reshape(-1), values.reshape(-1, width))
    return grad.view(batch, rows, width)


def embedding(module: nn.Embedding, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return per-sample gradients of ``nn.Embedding`` and of scaled word embeddings.

    As in autograd, and unlike in Opacus's own sampler, the row ``padding_idx`` gets no gradient, even where that id is
    an ordinary token.

    Args:
        module: the layer; ``embed_scale``, if present, multiplies its output.
        activations: one integer tensor of ids ``[B, ...]``.
        backprops: ``[B, ..., D]``.

    Returns:
        ``[B, V, D]`` for the weight.

    Raises:
        ValueError: If the layer has ``max_norm`` or ``scale_grad_by_freq``.
    """
    reason = unsupported(module)
    if reason is not None:
        raise ValueError(f"{type(module).__name__}: {reason}")
    weight = module._parameters["weight"]
    if weight is None or not weight.requires_grad:
        return {}
    ids = activations[0]
    scale = scale_of(module)
    values = backprops if isinstance(scale, float) and scale == 1.0 else backprops * scale
    if module.padding_idx is not None:
        values = values.masked_fill((ids == module.padding_idx).unsqueeze(-1), 0)
    batch = ids.shape[0]
    flat = ids.reshape(batch, -1 if ids.numel() else 0)
    return {weight: _written_down(flat, values, weight.shape)}


def is_scaled_lookup(module: nn.Module) -> bool:
    """Say whether ``module`` computes ``embed_scale * weight[ids]``, from a float64 test with eight of its rows.

    The test runs on the processor. A forward that looks up other rows than ``ids`` (OPT's, which counts positions) may
    ask for one that is not there. The processor raises an exception; a GPU would fail at every later call.
    """
    if not isinstance(module, nn.Embedding) or module.weight.is_meta or unsupported(module) is not None:
        return False
    rows = min(8, module.weight.shape[0])
    twin = bare_twin(module)
    map_tensors(twin, lambda t: to_double((t[:rows] if t.shape == module.weight.shape else t).cpu()))
    twin.num_embeddings = rows
    if twin.padding_idx is not None:
        twin.padding_idx = min(twin.padding_idx, rows - 1)
    ids = torch.arange(2 * rows).remainder(rows).view(2, rows)
    try:
        with torch.no_grad():
            output = call_forward(twin, ids)
            expected = twin.weight[ids] * scale_of(twin)
    except Exception:  # a forward with other arguments is not of this family
        return False
    same_shape = isinstance(output, Tensor) and output.shape == expected.shape
    return same_shape and torch.allclose(output.double(), expected, rtol=1e-6, atol=1e-9)
