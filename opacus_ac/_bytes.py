"""The bytes of tensors, for digests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def raw_bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the bytes of a tensor's values in their order, on the CPU, ``[numel * itemsize]``.

    >>> raw_bytes(torch.tensor([[1, 2]], dtype=torch.int16).t()).tolist()
    [1, 0, 2, 0]
    """
    flat = tensor.detach()
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).cpu().reshape(-1)
    if flat.numel() and flat.stride(0) != 1:
        flat = torch.empty(flat.shape, dtype=flat.dtype).copy_(flat)
    return flat.view(torch.uint8).numpy()
