"""What ``make_private`` checks before it changes anything; first of all, that the options go together."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.validators import ModuleValidator
from opacus.validators.errors import UnsupportedModuleError
from torch import nn
from torch.optim import Optimizer

from opacus_ac.clipping.table import POLICIES
from opacus_ac.distributed.choose import check_wrappers
from opacus_ac.engine.options import OPTIONS
from opacus_ac.grad_sample.one_backward.capture import is_captured
from opacus_ac.grad_sample.precision import check_environment
from opacus_ac.optimizer.parameters import named_parameters


class Choice(NamedTuple):
    """Some values of a setting."""

    name: str
    values: tuple[Any, ...]
    all_others: bool = False
    """Whether all values but these are meant."""

    def fits(self, settings: Mapping[str, Any]) -> bool:
        """Return whether ``settings`` have one of the values."""
        if self.name not in settings:
            return False
        value = settings[self.name]
        return any(value is one or value == one for one in self.values) != self.all_others


def _one(name: str, *values: Any) -> Choice:
    return Choice(name, values)


def _other(name: str, *values: Any) -> Choice:
    return Choice(name, values, all_others=True)


class Conflict(NamedTuple):
    """Two choices that do not go together.

    Attributes:
        refused: the choice that the message begins with.
        beside: the choice that it does not go with.
        why: the reason.
        remedy: what to do instead.
    """

    refused: Choice
    beside: Choice
    why: str
    remedy: str

    def message(self, settings: Mapping[str, Any]) -> str:
        """Return what a user reads."""
        refused, beside = (_said(choice.name, settings[choice.name]) for choice in (self.refused, self.beside))
        return f"{refused} does not work with {beside}: {self.why}. {self.remedy[0].upper()}{self.remedy[1:]}"


def _said(name: str, value: Any) -> str:
    """Return a setting in words; objects by the name of the setting alone."""
    if name == "processes":
        return f"several processes ({value})"
    return f"{name}={value!r}" if value is None or isinstance(value, str | int | float) else name


_SEVERAL = _other("processes", "local")
_FORWARD_ONLY = _other("zeroth_order", None)
_HOOKS = _one("grad_sample_mode", "hooks", "functorch")
_NOT_ADAPTIVE = _one("clipping", "flat", "automatic")
_LAPLACE = _one("mechanism", "laplace")
_AUTO = _one("inner_optimizer", "AutoAdam")
_NO_GRADIENTS = "forward passes give no gradients that it could apply to"

CONFLICTS = (
    Conflict(
        _HOOKS,
        _SEVERAL,
        "Opacus's hooks keep per-sample gradients on parameters that are replaced or reduced",
        "use grad_sample_mode='bk'",
    ),
    Conflict(
        _one("sampling", "shuffled"),
        _SEVERAL,
        "every process would shuffle for itself, and a record could be on two of them",
        "use poisson_sampling=True, or sampling='fixed_size'",
    ),
    Conflict(
        _one("fused_step", True),
        _SEVERAL,
        "gradients are exchanged in buckets",
        "use fused_step=False",
    ),
    Conflict(
        _one("clip_policy", "raw_percentile"),
        _SEVERAL,
        "it reads the norms of one process only",
        "use clip_policy='percentile'",
    ),
    Conflict(
        _other("max_rows_per_user", None),
        _SEVERAL,
        "users have not been divided among processes",
        "use one process, or rows as records",
    ),
    Conflict(
        _other("noise_allocation", None),
        _SEVERAL,
        "weights per parameter have no place in the shared buckets",
        "use noise_allocation=None",
    ),
    Conflict(
        _FORWARD_ONLY,
        _one("processes", "fsdp2", "hsdp"),
        "each rank would move its shard along a direction of its own",
        "leave fully_shard out: forward passes need no gradients and no optimizer state, and every rank has the whole "
        "model",
    ),
    Conflict(
        _other("preset", None),
        _FORWARD_ONLY,
        "it has the constants of a method with gradients",
        'name the paper in zeroth_order="..."',
    ),
    Conflict(_one("fused_step", True), _FORWARD_ONLY, _NO_GRADIENTS, "leave it out"),
    Conflict(_other("noise_allocation", None), _FORWARD_ONLY, _NO_GRADIENTS, "leave it out"),
    Conflict(_HOOKS, _FORWARD_ONLY, _NO_GRADIENTS, "leave it out"),
    Conflict(
        _AUTO,
        _FORWARD_ONLY,
        "it finds its rate from inner products of released gradients, and forward passes release none",
        "use torch.optim.SGD or AdamW, with a learning rate",
    ),
    Conflict(
        _one("fused_step", True),
        _AUTO,
        "it measures all released gradients of a step before it moves the first weight",
        "use fused_step=False, or torch.optim.AdamW with a learning rate",
    ),
    Conflict(
        _other("ema_decay", None, OPTIONS["ema_decay"].default),
        _FORWARD_ONLY,
        "there the settings decide whether an average is kept, which takes a copy of the trained weights",
        "give ZerothOrderSettings(ema_decay=...)",
    ),
    Conflict(
        _other("clip_policy", None),
        _NOT_ADAPTIVE,
        "both say how C is chosen",
        "use clipping='adaptive' with a policy",
    ),
    Conflict(
        _other("preset", None),
        _NOT_ADAPTIVE,
        "the paper's rule for C is adaptive",
        "use clipping='adaptive'",
    ),
    Conflict(
        _one("poisson_sampling", False),
        _other("sampling", "shuffled"),
        "the one keeps the loader's batches, the other draws new ones",
        "give one",
    ),
    Conflict(
        _other("max_batch_size", None),
        _other("sampling", "truncated_poisson"),
        "only truncated Poisson sampling has a largest batch",
        "leave it out, or use sampling='truncated_poisson'",
    ),
    Conflict(
        _one("max_batch_size", None),
        _one("sampling", "truncated_poisson"),
        "truncation needs a public size",
        "give max_batch_size",
    ),
    Conflict(
        _other("batch_size_schedule", None),
        _one("sampling", "shuffled"),
        "the loader's own batches have the size that they have",
        "use poisson_sampling=True, or another sampling that draws batches",
    ),
    Conflict(
        _one("batch_first", False),
        _one("grad_sample_mode", "bk"),
        "it needs the records in the first dimension",
        "pass batch_first=True, or grad_sample_mode='hooks'",
    ),
    Conflict(
        _other("noise_generator", None),
        _one("secure_mode", True),
        "whoever knows its seed could remove the noise",
        "leave noise_generator out, or use secure_mode=False for tests",
    ),
    Conflict(
        _LAPLACE,
        _other("accountant", "pure"),
        "it has no bound for Laplace noise",
        "use PrivacyEngine(accountant='pure')",
    ),
    Conflict(
        _one("accountant", "pure"),
        _one("mechanism", "gaussian"),
        "it accounts for Laplace noise only",
        "use zeroth_order=ZerothOrderSettings(mechanism='laplace'), or the accountant 'vrdp'",
    ),
    Conflict(
        _one("clip_policy", *(name for name, policy in POLICIES.items() if policy.needs_histogram)),
        _LAPLACE,
        "it needs a norm histogram, which has no room in a Laplace release",
        "use clip_policy='fixed'",
    ),
    Conflict(
        _other("loss_bound", None),
        _LAPLACE,
        "a Laplace release holds no norm histogram and no loss",
        "leave it out",
    ),
)
"""Every two choices that ``make_private`` refuses together.

Settings have the names of its arguments. Beside them there are ``sampling``, as it follows from ``poisson_sampling``
too; ``mechanism``, "gaussian" or "laplace", which ``zeroth_order`` decides; ``processes``, the name of the reducer;
``inner_optimizer``, "AutoAdam" or "another"; and ``accountant`` and ``secure_mode`` of the engine.
"""


def check_together(settings: Mapping[str, Any]) -> None:
    """Check that settings go together. Those that are not among ``settings`` are taken to go with all others.

    Raises:
        ValueError: If two of them do not; the message has the reason and the remedy.
    """
    for conflict in CONFLICTS:
        if conflict.refused.fits(settings) and conflict.beside.fits(settings):
            raise ValueError(conflict.message(settings))


_DEVICES = ("cpu", "cuda")
"""Types of devices that random masks, autocast and precision are handled for. ROCm's are "cuda" too."""

_NOT_A_DEVICE = {
    "mps": "which has no float64, and norms and noise are computed in it",
    "meta": "where weights have no values",
}
_UNHANDLED = "where masks would come from a generator with a public seed, and autocast would reach the norms"


def _check_device(name: str, device: torch.device) -> None:
    """Refuse a device on which a step would not be exact, or not private."""
    if device.type not in _DEVICES:
        raise ValueError(
            f"{name} is on the device {device}, {_NOT_A_DEVICE.get(device.type, _UNHANDLED)}: move the model to the "
            "processor (use_cpu=True in TrainingArguments) or to a CUDA device first"
        )


_RUN_AGAIN = (nn.MultiheadAttention, nn.LSTM, nn.GRU)
"""Layers that Opacus has replacements for. Mode "bk" runs them again on single records."""


def check_layers_of_opacus(module: nn.Module) -> None:
    """Refuse what Opacus refuses, other than layers that mode "bk" runs again.

    Raises:
        UnsupportedModuleError: If a layer is left over.
    """
    validators = ModuleValidator.VALIDATORS
    # The LSTM of P-tuning runs on one prompt for all records, and what it returns is not followed.
    prompts = {id(m) for p in module.modules() if type(p).__name__ == "PromptEncoder" for m in p.modules()}
    again = [m for m in module.modules() if type(m) in _RUN_AGAIN and id(m) not in prompts]
    excused = {str(error) for m in again for error in validators[type(m)](m)}
    left = [error for error in ModuleValidator.validate(module) if str(error) not in excused]
    if left:
        raise UnsupportedModuleError(left)


def _check_layers(module: nn.Module) -> None:
    """Refuse layers that take no hooks, and trained ones that hooks do not see or whose gradients are sparse."""
    for name, part in module.named_modules():
        trained = any(p.requires_grad for p in part.parameters())
        if isinstance(part, torch.jit.RecursiveScriptModule) or (trained and isinstance(part, torch.jit.ScriptModule)):
            raise ValueError(
                f"{name or 'the model'} was scripted or traced with torch.jit, whose layers cannot be told apart: pass "
                "the Python module that it was made of, and script the trained model later"
            )
        if trained and isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse:
            raise ValueError(
                f"{name or 'the model'} ({type(part).__name__}) has sparse=True, and with noise no entry of its "
                "gradient is zero: set sparse=False"
            )


def check_model_and_optimizer(module: nn.Module, optimizer: Optimizer) -> None:
    """Raise ``ValueError`` for a model and optimizer that cannot be made private; change nothing."""
    hooked = any(hasattr(m, "autograd_grad_sample_hooks") for m in module.modules())
    if isinstance(module, AbstractGradSampleModule) or hooked or is_captured(module):
        raise ValueError(
            "the model is private already (it carries per-sample gradient hooks): pass the original model, or call "
            "engine.detach(model) first. To train its parts with different settings, pass one optimizer that has a "
            "param group for each part"
        )
    check_wrappers(module)
    if any(type(m).__name__ == "OptimizedModule" for m in module.modules()):
        raise ValueError(
            "the model was compiled with torch.compile, which decides what runs before the hooks can: pass the "
            "original model (its attribute _orig_mod)"
        )
    _check_layers(module)
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
        _check_device(name, parameter.device)
    for name, parameter in module.named_parameters():
        if not parameter.is_meta:  # frozen weights may be there while a library keeps them on disk
            _check_device(name, parameter.device)
    check_environment({p.device.type for p in trainable})
