"""Convolutions: Opacus's rule, on what the layer really convolves."""

from __future__ import annotations

import torch.nn.functional as F
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import Tensor, nn

from opacus_ac.grad_sample.module_replay import bare_twin

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def convolution(module: Convolution, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return per-sample gradients of a convolution of one, two or three dimensions.

    Opacus's rule reads the memory of its inputs as if the channels came first and the padding were zeros. So an input
    in another memory format (``channels_last``, a permuted view) is copied, and other padding is written out.

    Args:
        module: the layer, with any ``padding_mode``.
        activations: one input ``[B, C, ...]``, in any memory format.
        backprops: ``[B, O, ...]``.

    Returns:
        ``[B, *shape]`` for weight and bias.
    """
    inputs = activations[0]
    if module.padding_mode == "zeros":
        rows: dict[nn.Parameter, Tensor] = compute_conv_grad_sample(
            module, [inputs.contiguous()], backprops.contiguous()
        )
        return rows
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=module.padding_mode)
    twin = bare_twin(module)
    twin.padding, twin.padding_mode = (0,) * len(module.kernel_size), "zeros"
    owned = {id(p): module._parameters[name] for name, p in twin._parameters.items()}
    found = compute_conv_grad_sample(twin, [padded.contiguous()], backprops.contiguous())
    return {parameter: values for p, values in found.items() if (parameter := owned[id(p)]) is not None}
