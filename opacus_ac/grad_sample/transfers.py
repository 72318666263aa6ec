"""Transfers between the host and a device. The host waits for a device only where it needs values from there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_host(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape and type as one tensor ``[n, ...]`` on the CPU, with one transfer for each device."""
    places: dict[torch.device, list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault(tensor.device, []).append(place)
    parts = [torch.stack([tensors[place] for place in own]).cpu() for own in places.values()]
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([place for own in places.values() for place in own])
    return torch.cat(parts)[order.argsort()]


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU, in memory that is not pinned, on ``device``.

    The host does not wait for the work that a GPU has in hand, as it does in a blocking copy. CUDA reads memory that is
    not pinned before the call returns, so it may be written or freed afterwards.
    """
    if device.type == "cpu":
        return tensor
    return tensor.to(device, non_blocking=device.type == "cuda")
