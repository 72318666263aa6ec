"""Bags of embeddings: sums, means or maxima of rows of a table, bags as rows ``[B, L]`` or as one list with offsets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opacus_ac.grad_sample.one_backward.bounds import wide
from opacus_ac.grad_sample.one_backward.outer_products import Lookup, Rows, Term


@dataclass(frozen=True)
class Bags:
    """The ids of the bags of a batch.

    Attributes:
        ids: ``[B, L]``, filled up where bags differ in length.
        weights: ``[B, L]``, factor of each row; 0 where there is none.
    """

    ids: Tensor
    weights: Tensor


def bags_of(
    module: nn.EmbeddingBag,
    ids: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Bags:
    """Return the bags of one call of ``nn.EmbeddingBag``, whose arguments these are.

    Rows ``padding_idx`` are left out, as the layer does.
    """
    dtype = module.weight.dtype
    weights = torch.ones_like(ids, dtype=dtype) if per_sample_weights is None else per_sample_weights.detach().to(dtype)
    if ids.dim() == 1:
        assert offsets is not None
        starts = offsets[:-1] if module.include_last_offset else offsets
        bag = torch.bucketize(torch.arange(len(ids), device=ids.device), starts, right=True) - 1
        place = torch.arange(len(ids), device=ids.device) - starts[bag]
        length = int(place.max()) + 1 if len(ids) else 0
        flat = bag * length + place
        size = len(starts) * length
        weights = weights.new_zeros(size).index_put((flat,), weights).view(len(starts), length)
        ids = ids.new_zeros(size).index_put((flat,), ids).view(len(starts), length)
    if module.padding_idx is not None:
        weights = weights.masked_fill(ids == module.padding_idx, 0)
    if module.mode == "mean":
        weights = weights / (weights != 0).sum(1, keepdim=True).clamp(min=1)
    return Bags(ids, weights)


def bag_terms(module: nn.EmbeddingBag, bags: Bags, backprops: Tensor) -> list[tuple[nn.Parameter, Term]]:
    """Return what the bags add to the gradient of the table; backprops ``[B, D]``."""
    weight = module._parameters["weight"]
    if weight is None or not weight.requires_grad:
        return []
    if module.mode != "max":
        return [(weight, Lookup(bags.ids, backprops.unsqueeze(1) * bags.weights.to(backprops.dtype).unsqueeze(2)))]
    if not bags.ids.shape[1]:
        return [(weight, Rows(backprops.new_zeros(len(bags.ids), *weight.shape)))]
    entries = weight.detach()[bags.ids].masked_fill((bags.weights == 0).unsqueeze(2), -torch.inf)
    chosen = bags.ids.gather(1, entries.argmax(1))  # [B, D]
    values = wide(backprops).masked_fill((bags.weights == 0).all(1, keepdim=True), 0)  # an empty bag is zero
    rows = values.new_zeros(len(bags.ids), *weight.shape).scatter_add(1, chosen.unsqueeze(1), values.unsqueeze(1))
    return [(weight, Rows(rows))]


def embedding_bag(module: nn.EmbeddingBag, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients of ``nn.EmbeddingBag``.

    Args:
        module: the layer.
        activations: ids ``[B, L]``, or ids ``[N]`` and offsets ``[B]``.
        backprops: ``[B, D]``.

    Returns:
        ``[B, V, D]`` for the weight.
    """
    found: dict[nn.Parameter, Tensor] = {}
    for parameter, term in bag_terms(module, bags_of(module, *activations), backprops):
        if isinstance(term, Lookup):
            rows = term.right.new_zeros(len(term.ids), *parameter.shape)
            index = term.ids.unsqueeze(2).expand_as(term.right)
            found[parameter] = rows.scatter_add(1, index, term.right)
        elif isinstance(term, Rows):
            found[parameter] = term.values
    return found
