"""What make_private checks before it changes anything."""

from __future__ import annotations

import itertools

import torch
from opacus.grad_sample import AbstractGradSampleModule
from torch import nn
from torch.optim import Optimizer

from opacus_ac.budget.accountants import AccountantAdapter
from opacus_ac.distributed.choose import check_wrappers
from opacus_ac.distributed.same_records import check_same_records
from opacus_ac.engine.parts import Job
from opacus_ac.engine.ranks import check_alike, check_noise, parameter_layout
from opacus_ac.grad_sample.one_backward.capture import is_captured
from opacus_ac.grad_sample.precision import check_environment
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.parameters import named_parameters
from opacus_ac.optimizer.state import public_settings
from opacus_ac.sampling.loader import PrivateDataLoader
from opacus_ac.zeroth_order.settings import ZerothOrderSettings

_NO_FLOAT64 = {
    "mps": "which has no float64, and norms and noise are computed in it",
    "meta": "where weights have no values",
}


def check_model_and_optimizer(module: nn.Module, optimizer: Optimizer) -> None:
    """Raise ``ValueError`` for a model and optimizer that cannot be made private; change nothing."""
    hooked = any(hasattr(m, "autograd_grad_sample_hooks") for m in module.modules())
    if isinstance(module, AbstractGradSampleModule) or hooked or is_captured(module):
        raise ValueError(
            "the model is private already (it carries per-sample gradient hooks): pass the original model, or call "
            "engine.detach(model) first"
        )
    check_wrappers(module)
    if any(type(m).__name__ == "OptimizedModule" for m in module.modules()):
        raise ValueError(
            "the model was compiled with torch.compile, which decides what runs before the hooks can: pass the original "
            "model (its attribute _orig_mod)"
        )
    own = set(module.parameters())
    held = list(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))
    if any(p not in own for p in held):
        raise ValueError(
            "Module parameters are different than optimizer Parameters: build the optimizer from model.parameters() "
            "of the model that you pass"
        )
    trainable, names = named_parameters(module, optimizer)
    if not trainable:
        raise ValueError("the optimizer holds no trainable parameter: every one has requires_grad=False")
    for parameter, name in zip(trainable, names, strict=True):
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is trained in {parameter.dtype}: sums of clipped gradients would round beyond C. Keep "
                "trainable weights in float32 (frozen weights may be bfloat16)"
            )
        if parameter.device.type in _NO_FLOAT64:
            raise ValueError(
                f"{name} is on the device {parameter.device}, {_NO_FLOAT64[parameter.device.type]}: move the model to the "
                "processor (use_cpu=True in TrainingArguments) or to a CUDA device first"
            )
    check_environment({p.device.type for p in trainable})


def check_start(optimizer: AdaptiveClipDPOptimizer, loader: PrivateDataLoader, job: Job) -> None:
    """Check that all ranks begin the same run. With one process there is nothing to check.

    Raises:
        ValueError: If they do not, on every rank.
    """
    if optimizer.reducer.world == 1:
        return
    generator = job.noise_generator
    settings = {
        **public_settings(optimizer),
        "reducer": optimizer.reducer.name,
        "normalize": optimizer.normalize,
        "lr_control": optimizer.control is not None,
        "ema_decay": None if optimizer.ema is None else optimizer.ema.decay,
        "max_physical_batch_size": job.options.performance.max_physical_batch_size,
        "loss_reduction": optimizer.loss_reduction,
        "seed of noise_generator": None if generator is None else generator.initial_seed(),
        "batches in a pass": len(loader),
        "number of records": len(loader.dataset),  # type: ignore[arg-type]
        **optimizer.measurement.compared_at_start(),
        **parameter_layout(*named_parameters(job.module, optimizer.original_optimizer)),
    }
    check_alike(optimizer.reducer, settings)
    check_same_records(optimizer.reducer, loader.dataset)
    check_noise(optimizer.reducer, optimizer.mechanism.stream)


def check_mechanism(accountant: AccountantAdapter, settings: ZerothOrderSettings | None) -> None:
    """Raise ``ValueError`` when the accountant takes the noise for another than it is."""
    noise = "gaussian" if settings is None else settings.mechanism
    if noise == accountant.noise:
        return
    if noise == "laplace":
        raise ValueError(
            f"the accountant {accountant.name!r} has no bound for mechanism='laplace': use "
            'PrivacyEngine(accountant="pure")'
        )
    raise ValueError(
        'accountant="pure" accounts for Laplace noise only: use '
        'zeroth_order=ZerothOrderSettings(mechanism="laplace"), or the accountant "vrdp"'
    )
