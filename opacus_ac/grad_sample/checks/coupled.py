"""Finds layers whose forward pass couples records or writes to weights and buffers, trained or frozen."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


def coupling(module: nn.Module) -> str | None:
    """Return why a layer must not be used, with the remedy; None if it does not couple records."""
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        return (
            "it normalises by the mean and variance of the batch, so that every record changes the others, even if it "
            "is frozen or has no weights"
            + ("" if module.running_mean is None else ", and saves running statistics of private batches")
            + ". Replace it by GroupNorm or LayerNorm (opacus.validators.ModuleValidator.fix)"
            + ("" if module.running_mean is None else ", or keep it in evaluation mode while training: layer.eval()")
        )
    if isinstance(module, _InstanceNorm) and module.track_running_stats and module.training:
        return "it saves running statistics of private batches: use track_running_stats=False"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return (
            "max_norm rewrites the rows that a batch looks up in the forward pass, frozen or not, so that the weights "
            "tell which tokens occur. Set max_norm=None; rows may be rescaled once, before make_private"
        )
    return _power_iteration(module)


def _power_iteration(module: nn.Module) -> str | None:
    """Return why a layer with torch's spectral norm must not be used, with the remedy; None for other layers.

    Its two vectors come from the weight only. But every forward pass moves them, also one over a record by itself.
    """
    if isinstance(module, _SpectralNorm) and module.training and module._buffers:
        return (
            "spectral_norm moves its vectors by a power iteration in every forward pass, so that no record meets the "
            'same weight twice. In mode "bk", keep the vectors of now: put this parametrization in evaluation mode '
            "after every model.train(). In any mode, make the weight of now the layer's own with "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, name)"
        )
    if module.training and any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        return (
            "spectral_norm moves its vectors by a power iteration in every forward pass, so that no record meets the "
            "same weight twice. Make the weight of now the layer's own with torch.nn.utils.remove_spectral_norm(layer)"
        )
    return None


def check_records_apart(model: nn.Module) -> None:
    """Refuse a model with a layer whose forward pass couples records or saves statistics of them.

    Raises:
        ValueError: If there is such a layer. The message has all of them, with remedies.
    """
    found = [
        f"{name or 'the model itself'} ({type(m).__name__}): {problem}"
        for name, m in model.named_modules()
        if (problem := coupling(m)) is not None
    ]
    if found:
        raise ValueError("the records of a batch would not be apart:\n  " + "\n  ".join(found))
