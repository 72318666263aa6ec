"""What ``make_private`` checks, chooses and attaches before the first step; on an error everything is taken off again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from opacus import GradSampleModule
from opacus.accountants import IAccountant
from opacus.grad_sample import AbstractGradSampleModule, GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.optim import Optimizer

from opacus_ac.account import check_accountant
from opacus_ac.allocation import GroupWeights, NoiseAllocation
from opacus_ac.clipping import ClipPolicy, build_policy, paper_policy
from opacus_ac.control import ClipRateControl
from opacus_ac.data import PrivateDataLoader
from opacus_ac.distributed.records import check_same_records
from opacus_ac.distributed.roles import check_alike, check_noise, check_wrappers, parameter_layout
from opacus_ac.grad_sample import check_model, expand_broadcast_embeddings, register_rules
from opacus_ac.grad_sample.alone import RecordsAlone
from opacus_ac.grad_sample.book_keeping import BookKeepingSource
from opacus_ac.grad_sample.capture import is_captured
from opacus_ac.grad_sample.coupled import check_records_apart
from opacus_ac.grad_sample.precision import check_environment
from opacus_ac.grad_sample.sources import GradientSource, PerSampleSource
from opacus_ac.integrations.peft import check_peft
from opacus_ac.integrations.transformers import use_record_loss
from opacus_ac.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.randomness import RandomStream, SecretStream, SeededStream
from opacus_ac.sampling import SAMPLING, SamplingPlan
from opacus_ac.statistics import DEFAULT_WEIGHT, StepStatistics, default_histogram_weight
from opacus_ac.users import UserRows
from opacus_ac.watch import ModelWatch
from opacus_ac.zeroth_order.optimizer import ZerothOrderDPOptimizer

Undo = Callable[[], None]


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ``ValueError`` when ``value`` is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not available: choose one of {', '.join(map(repr, choices))}")


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


def inner_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer to make private; one that was made private before is unwrapped, as by Opacus.

    Raises:
        ValueError: another optimizer is wrapped, whose wrapper decides by itself when it steps.
    """
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        raise ValueError(
            f"the optimizer is wrapped in {type(optimizer).__name__}, which may leave out steps that are charged: pass the optimizer inside (its "
            "attribute optimizer), and prepare what make_private returns"
        )
    return optimizer.original_optimizer if isinstance(optimizer, DPOptimizer) else optimizer


def named_parameters(module: nn.Module, optimizer: Optimizer) -> tuple[list[nn.Parameter], list[str]]:
    """Return the trainable parameters that the optimizer holds, and their names in ``module``."""
    names = {p: name for name, p in module.named_parameters()}
    held = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameters = [p for p in held if p.requires_grad]
    return parameters, [names[p] for p in parameters]


def random_streams(generator: torch.Generator | None, secure: bool = False) -> tuple[RandomStream, RandomStream]:
    """Return the streams of noise and of sampling.

    Raises:
        ValueError: a generator together with secure mode.
    """
    if secure and generator is not None:
        raise ValueError(
            "noise_generator with secure_mode=True: whoever knows its seed could remove the noise. Leave noise_generator "
            "out, or use secure_mode=False for tests"
        )
    noise: RandomStream = SecretStream(hardened=secure)
    if generator is not None:
        noise = SeededStream(generator)
    return noise, noise.fork(1)


def choose_sampling(sampling: str | None, poisson_sampling: bool, accountant: IAccountant) -> str:
    """Return the kind of sampling that the arguments of ``make_private`` describe.

    Raises:
        ValueError: an unknown kind, contradictory arguments, or a kind for which the accountant has no bound.
    """
    if sampling is None:
        sampling = "poisson" if poisson_sampling else "shuffled"
    check_choice("sampling", sampling, SAMPLING)
    if not poisson_sampling and sampling != "shuffled":
        raise ValueError(
            f"poisson_sampling=False keeps the loader's batches, sampling={sampling!r} draws others: give one"
        )
    check_accountant(accountant, sampling)
    return sampling


def public_settings(optimizer: AdaptiveClipDPOptimizer, plan: SamplingPlan) -> dict[str, Any]:
    """Return the settings of a run on which its guarantee depends, for ledger and checkpoint; plain values only."""
    return {
        "noise_multiplier": optimizer.mechanism.noise_multiplier,
        "max_grad_norm": optimizer.policy.initial_bound,
        "clip_policy": optimizer.policy.name,
        "inner_optimizer": type(optimizer.original_optimizer).__name__,
        "statistics": optimizer.statistics.configuration(),
        "sampling": plan.sampling,
        "dataset_size": plan.sizes.dataset_size,
        "expected_batch_size": plan.sizes.expected(0),
        "max_batch_size": plan.max_batch_size,
        "max_rows_per_user": plan.max_rows_per_user,
        **({} if optimizer.allocation is None else {"noise_allocation": optimizer.allocation.configuration()}),
        **({"zeroth_order": optimizer.public_settings()} if isinstance(optimizer, ZerothOrderDPOptimizer) else {}),
    }


def check_start(
    optimizer: AdaptiveClipDPOptimizer,
    loader: PrivateDataLoader,
    module: nn.Module,
    max_physical_batch_size: int | None,
    generator: torch.Generator | None,
) -> None:
    """Raise ``ValueError``, on every rank, unless all ranks begin the same run; with one process there is nothing to check."""
    if optimizer.reducer.world == 1:
        return
    settings = {
        **public_settings(optimizer, loader.plan),
        "reducer": optimizer.reducer.name,
        "normalize": optimizer.normalize,
        "lr_control": optimizer.control is not None,
        "ema_decay": None if optimizer.ema is None else optimizer.ema.decay,
        "max_physical_batch_size": max_physical_batch_size,
        "loss_reduction": optimizer.loss_reduction,
        "seed of noise_generator": None if generator is None else generator.initial_seed(),
        "batches in a pass": len(loader),
        "number of records": len(loader.dataset),  # type: ignore[arg-type]
        **_direction_seed(optimizer),
        **parameter_layout(*named_parameters(module, optimizer.original_optimizer)),
    }
    check_alike(optimizer.reducer, settings)
    check_same_records(optimizer.reducer, loader.dataset)
    check_noise(optimizer.reducer, optimizer.mechanism.stream)


def _direction_seed(optimizer: AdaptiveClipDPOptimizer) -> dict[str, Any]:
    """Return the seed of the directions that the caller gave, where there are directions."""
    if not isinstance(optimizer, ZerothOrderDPOptimizer):
        return {}
    return {"direction_seed": optimizer.settings.direction_seed}


def choose_policy(
    clipping: str,
    clip_policy: str | ClipPolicy | None,
    preset: str | None,
    max_grad_norm: float | None,
    target_clip_rate: float,
    expected_batch_size: float,
) -> ClipPolicy:
    """Return the clip policy that the arguments of ``make_private`` describe."""
    if preset not in (None, "paper"):
        raise ValueError(f'unknown preset {preset!r}: the only one is "paper"')
    if clipping != "adaptive" and (clip_policy is not None or preset is not None):
        raise ValueError(f"clipping={clipping!r} has no clip_policy or preset: use clipping='adaptive' with them")
    if isinstance(clip_policy, ClipPolicy):
        return clip_policy
    if preset == "paper":
        bound = 3.0 if max_grad_norm is None else max_grad_norm
        return paper_policy(clip_policy or "percentile", bound, expected_batch_size)
    name = {"flat": "fixed", "automatic": "automatic"}.get(clipping) or clip_policy or "percentile"
    bound = 1.0 if max_grad_norm is None else max_grad_norm
    return build_policy(name, bound, target_clip_rate, expected_batch_size)


def choose_control(
    lr_control: bool, policy: ClipPolicy, target_clip_rate: float, preset: str | None
) -> ClipRateControl | bool:
    """Return the learning-rate control; the paper's reads each clip rate as it is."""
    if not lr_control:
        return False
    target = getattr(policy, "target_clip_rate", target_clip_rate)
    return ClipRateControl(target, smoothing=0.0 if preset == "paper" else 0.9)


def choose_statistics(
    clipping: str,
    policy: ClipPolicy,
    noise_multiplier: float,
    expected_batch_size: float,
    histogram_weight: float | None,
    loss_bound: float | None,
    loss_weight: float | None,
    allocation: GroupWeights | None = None,
) -> StepStatistics:
    """Return what a step releases beside the gradient.

    "flat" and "automatic" release the gradient alone, with exactly the noise of Opacus, unless a loss or a paid noise allocation
    is asked for; a policy that reads un-noised norms needs no histogram.
    """
    if histogram_weight is None:
        histogram_weight = default_histogram_weight(noise_multiplier, expected_batch_size)
    return StepStatistics(
        histogram=clipping == "adaptive" and policy.is_private,
        histogram_weight=histogram_weight,
        loss_bound=loss_bound,
        loss_weight=DEFAULT_WEIGHT if loss_weight is None else loss_weight,
        **({} if allocation is None else allocation.statistics()),
    )


def choose_allocation(
    module: nn.Module, optimizer: Optimizer, noise_allocation: NoiseAllocation | None
) -> GroupWeights | None:
    """Return the weights that the run starts with; None for equal ones."""
    if noise_allocation is None:
        return None
    if not isinstance(noise_allocation, NoiseAllocation):
        raise ValueError(
            f"noise_allocation={noise_allocation!r} is no NoiseAllocation: from opacus_ac.allocation import NoiseAllocation"
        )
    return noise_allocation.start(*named_parameters(module, optimizer))


def choose_source(
    module: nn.Module,
    optimizer: Optimizer,
    mode: str,
    loss_reduction: str,
    batch_first: bool,
    users: UserRows | None = None,
    secure: bool = False,
) -> GradientSource:
    """Return where the optimizer gets norms and clipped sums from, in secure mode exact ones; nothing is attached yet."""
    parameters, names = named_parameters(module, optimizer)
    count = None if users is None else users.drawn
    if mode != "bk":
        return PerSampleSource(parameters, names, loss_reduction, count, exact_sums=secure)
    if not batch_first:
        raise ValueError(
            'grad_sample_mode="bk" needs the records in the first dimension: pass batch_first=True, or '
            'grad_sample_mode="hooks"'
        )
    return BookKeepingSource(module, parameters, names, loss_reduction, count, exact_sums=secure)


def attach(
    module: nn.Module,
    optimizer: AdaptiveClipDPOptimizer,
    *,
    mode: str,
    batch_first: bool,
    loss_reduction: str,
    wrap_model: bool,
    users: UserRows | None = None,
) -> tuple[Any, Undo]:
    """Attach loss, broadcast and gradient hooks to the model.

    Returns:
        The model itself in mode "bk", what Opacus returns in its modes, and a function that takes everything off again.

    Raises:
        ValueError: a layer whose per-sample gradients cannot be exact; nothing stays attached.
    """
    undo: list[Undo] = []

    def take_off() -> None:
        while undo:
            undo.pop()()

    try:
        check_peft(module)
        check_records_apart(module)
        register_rules(module)
        check_model(module, mode=mode)
        undo.append(use_record_loss(module, optimizer.tape, loss_reduction, users))
        undo.append(expand_broadcast_embeddings(module).remove)
        undo.append(lambda: _remove_opacus_hooks(module))
        if isinstance(optimizer.source, BookKeepingSource):
            undo.append(optimizer.source.attach())
            wrapped: Any = module
            pause: Callable[[], AbstractContextManager[None]] = optimizer.source.paused
        else:
            wrapped = (GradSampleModule if wrap_model else GradSampleHooks)(
                module,
                batch_first=batch_first,
                loss_reduction=loss_reduction,
                strict=False,  # check_model has refused every buffer that is not a constant of a layer with a rule
                force_functorch=mode == "functorch",
            )
            pause = partial(_hooks_off, wrapped)
        undo.append(observe(module, optimizer, named_parameters(module, optimizer.original_optimizer)[0]))
        undo.append(lambda: optimizer.source.clear(sums=True))
        # The last hooks: what they see is what the model returns.
        optimizer.alone = RecordsAlone(
            module,
            *named_parameters(module, optimizer.original_optimizer),
            lambda: optimizer.steps_taken,
            optimizer.tape,
            mean=loss_reduction == "mean",
            batch_first=batch_first,
            users=users,
            pause=pause,
            keeps_length=lambda tensors: optimizer.plan is not None and optimizer.plan.keeps_length(tensors),
        )
        assert optimizer.watch is not None
        optimizer.alone.as_before = optimizer.watch.as_before
        undo.append(optimizer.alone.remove)
    except BaseException:
        take_off()
        raise
    return wrapped, take_off


class _Eyes:
    """The hooks by which the optimizer sees every forward pass of exactly this model object; copies of the model have none."""

    def __init__(self, module: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> None:
        self._module, self._optimizer = id(module), optimizer

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook before the forward pass."""
        if id(module) == self._module:
            self._optimizer.see(module, args, kwargs)

    def after(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Hook after it, also where it failed."""
        if id(module) == self._module:
            self._optimizer.seen(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Eyes:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Blind, ()


class _Blind:
    """What the hooks become in a pickled model."""

    def before(self, *_: Any) -> None: ...

    def after(self, *_: Any) -> None: ...


def observe(module: nn.Module, optimizer: AdaptiveClipDPOptimizer, trained: Sequence[nn.Parameter]) -> Undo:
    """Have the optimizer see which batch goes into the model, and whether the model changes; return what undoes it."""
    optimizer.watch = ModelWatch(module, trained, moves=isinstance(optimizer, ZerothOrderDPOptimizer))
    eyes = _Eyes(module, optimizer)
    handles = [
        module.register_forward_pre_hook(eyes.before, prepend=True, with_kwargs=True),
        module.register_forward_hook(eyes.after, always_call=True),
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


@contextmanager
def _hooks_off(wrapped: Any) -> Iterator[None]:
    """Switch Opacus's hooks off for a while."""
    before, wrapped.hooks_enabled = wrapped.hooks_enabled, False
    try:
        yield
    finally:
        wrapped.hooks_enabled = before


def _remove_opacus_hooks(module: nn.Module) -> None:
    """Remove what Opacus attached, complete or not."""
    for handle in getattr(module, "autograd_grad_sample_hooks", []):
        handle.remove()
    if hasattr(module, "autograd_grad_sample_hooks"):
        del module.autograd_grad_sample_hooks
    for inner in module.modules():
        if not inner._backward_hooks:
            inner._is_full_backward_hook = None
        for name in ("ft_compute_sample_grad", "activations", "max_batch_len"):
            if name in inner.__dict__:
                delattr(inner, name)
    for parameter in module.parameters():
        for name in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
            if hasattr(parameter, name):
                delattr(parameter, name)


def expect_finite(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
