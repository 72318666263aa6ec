"""Every option of ``make_private`` once: its type, default, help text and range. Needs the standard library alone.

The command line and the Trainer's arguments read this list without loading torch. ``docs/options.md`` is made from it.
"""

# ruff: noqa: RUF009 (``option`` returns a dataclass field)

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, TypeVar

from opacus_ac._validate import count, fraction, not_negative, one_of, positive

if TYPE_CHECKING:
    import torch

    from opacus_ac.allocation.settings import NoiseAllocation
    from opacus_ac.clipping.policy import ClipPolicy
    from opacus_ac.distributed.reducers import Reducer
    from opacus_ac.sampling.plan import RateSchedule
    from opacus_ac.zeroth_order.settings import ZerothOrderSettings

Check = Callable[..., object]
T = TypeVar("T")


def option(default: Any, text: str, check: Check | None = None) -> Any:
    """Return a dataclass field with a help text, and a check that raises ``ValueError`` for a value out of range.

    None always passes.

    A range that the part of an option knows, such as the kinds of sampling, is checked there.
    """
    metadata: dict[str, Any] = {"help": text}
    if check is not None:
        metadata["check"] = check
    return field(default=default, metadata=metadata)


def _described(cls: type[T]) -> type[T]:
    """Add the help texts of the fields to the docstring of a class of options."""
    lines = [f"    {f.name}: {f.metadata['help']}." for f in fields(cls)]  # type: ignore[arg-type]
    cls.__doc__ = "\n".join([cls.__doc__ or "", "", "Args:", *lines])
    return cls


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Options that answer one question of a user; each is in its range."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None and "check" in one.metadata:
                one.metadata["check"](**{one.name: value})


@_described
@dataclass(frozen=True, kw_only=True)
class ClippingOptions(_Group):
    """Which clipping norm C a step uses."""

    clip_policy: str | ClipPolicy | None = option(
        None, 'rule for C with clipping="adaptive", by name or as an object (default: percentile)'
    )
    target_clip_rate: float = option(0.9, "fraction of records to be clipped", fraction)
    preset: str | None = option(None, '"paper" for the published constants', partial(one_of, ("paper",)))


@_described
@dataclass(frozen=True, kw_only=True)
class ReleaseOptions(_Group):
    """What a step releases beside the gradient."""

    histogram_weight: float | None = option(
        None,
        "weight a of the norm histogram, which costs the factor sqrt(1 + a^2) of noise (default: what the batch size "
        "needs, at which the noise grows by no more than a fiftieth)",
        not_negative,
    )
    loss_bound: float | None = option(
        None,
        "public bound to which each record's loss is clipped in the released noisy mean loss; without a bound no loss "
        "is released",
        positive,
    )
    loss_weight: float | None = option(
        None, "weight b of the released loss, as a is of the histogram (default: sqrt(0.0412))", positive
    )
    noise_allocation: NoiseAllocation | None = option(
        None,
        "an opacus_ac.allocation.NoiseAllocation spreads the noise over groups of parameters by public weights, at "
        "the same epsilon; without one the std is the same everywhere",
    )


@_described
@dataclass(frozen=True, kw_only=True)
class SamplingOptions(_Group):
    """Which records a step sees, and what a record is."""

    sampling: str | None = option(
        None,
        'how batches are drawn: "poisson"; "truncated_poisson", with at most max_batch_size records; "fixed_size", '
        'exactly batch_size records without replacement at each step; or "shuffled", the batches of the loader, '
        "charged without "
        "amplification (default: as poisson_sampling says)",
    )
    max_batch_size: int | None = option(None, 'largest logical batch, for sampling="truncated_poisson"', count)
    dataset_size: int | None = option(
        None,
        "public number of records N (default: rows, or users, of the data, which then counts as public)",
        count,
    )
    batch_size_schedule: RateSchedule | None = option(
        None,
        "expected batch size per step: a sequence of public numbers, or a function of the step, which may use past "
        "releases if there is a target epsilon (the budget is then a privacy filter)",
    )
    max_rows_per_user: int | None = option(
        None,
        "most rows of a user, where an item of the dataset is a user and a user is what is drawn, clipped and "
        "protected; without it a record is a row. N, batch sizes and the mean of the loss then count users, as "
        "opacus_ac.sampling.users describes",
    )


@_described
@dataclass(frozen=True, kw_only=True)
class UpdateOptions(_Group):
    """What follows from a release, free of privacy cost."""

    normalize: bool = option(True, "scale the gradient by C0 / C_t for the inner optimizer")
    lr_control: bool = option(True, "learning rate follows the released clip rate")
    ema_decay: float | None = option(0.999, "decay of the weight average; without a decay no average is kept")


@_described
@dataclass(frozen=True, kw_only=True)
class PerformanceOptions(_Group):
    """What changes time and memory, and no number."""

    max_physical_batch_size: int | None = option(None, "largest batch that reaches the model", count)
    fused_step: bool = option(
        False,
        "hold no more gradients at a time than the largest one takes: they are summed, noised, applied and forgotten "
        "in turns (AdamW, Adam and SGD; no .grad is left to look at)",
    )
    reducer: str | Reducer | None = option(
        None,
        'how several processes share a step: "ddp" (bare model, the same on every rank), "fsdp2" (a model under '
        'fully_shard), "local" (each for itself), or an object (default: what the model and torch.distributed say)',
    )


@dataclass(frozen=True, kw_only=True)
class PrivateOptions:
    """All options of ``make_private`` that Opacus does not have, grouped by the question that they answer.

    >>> options = PrivateOptions(clipping=ClippingOptions(target_clip_rate=0.5), update=UpdateOptions(ema_decay=None))
    >>> options.clipping.target_clip_rate
    0.5
    >>> PrivateOptions.of(None, {"target_clip_rate": 0.5, "ema_decay": None}) == options
    True
    """

    clipping: ClippingOptions = ClippingOptions()
    release: ReleaseOptions = ReleaseOptions()
    sampling: SamplingOptions = SamplingOptions()
    update: UpdateOptions = UpdateOptions()
    performance: PerformanceOptions = PerformanceOptions()
    zeroth_order: str | ZerothOrderSettings | None = option(
        None,
        "train with forward passes only, as these ZerothOrderSettings say, or a paper by name: aggzo, dpzero, dp-zo, "
        "dp-zoso or dp-zopo (default: train with gradients)",
    )

    @classmethod
    def of(
        cls,
        options: PrivateOptions | None,
        named: Mapping[str, Any],
        *,
        also: Iterable[str] = (),
        caller: str = "make_private",
    ) -> PrivateOptions:
        """Return the options that a call describes, grouped and by name.

        Args:
            options: the grouped ones.
            named: single ones by name.
            also: other arguments of the caller, one of which a misspelled name may have meant.
            caller: name of the caller.

        Raises:
            TypeError: If a name is unknown or its group is in ``options`` too, or ``options`` is of another type.
            ValueError: If a value is out of range.
        """
        start = cls() if options is None else options
        if not isinstance(start, cls):
            raise TypeError(f"options={options!r} is no PrivateOptions: from opacus_ac.engine import PrivateOptions")
        given: dict[str, dict[str, Any]] = {}
        for name, value in named.items():
            if name not in OPTIONS:
                raise TypeError(f"{caller}() has no argument {name!r}{_nearest(name, [*OPTIONS, *also])}")
            attribute = OPTIONS[name].group or name
            if getattr(start, attribute) is not cls.__dataclass_fields__[attribute].default:
                raise TypeError(
                    f"{name!r} is given by name, and options={cls.__name__}({attribute}=...) decides it too: give it "
                    "in one of them"
                )
            given.setdefault(attribute, {})[name] = value
        alone = given.pop("zeroth_order", {})
        return replace(
            start, **{group: replace(getattr(start, group), **values) for group, values in given.items()}, **alone
        )


class Option(NamedTuple):
    """What the list says about one option."""

    name: str
    group: str | None
    """Attribute of :class:`PrivateOptions` that has it; None for an attribute itself."""
    type: str
    default: Any
    help: str


def _options() -> Iterator[Option]:
    for one in fields(PrivateOptions):
        if isinstance(one.default, _Group):
            yield from (
                Option(f.name, one.name, str(f.type), f.default, f.metadata["help"]) for f in fields(one.default)
            )
        else:
            yield Option(one.name, None, str(one.type), one.default, one.metadata["help"])


OPTIONS: Mapping[str, Option] = MappingProxyType({one.name: one for one in _options()})
"""Every option by its name, which no other group has."""


def shared(name: str, *, note: str = "", **other: Any) -> Any:
    """Return a field with default and help text of the option ``name``, for arguments elsewhere that mean the same.

    Args:
        name: name of the option.
        note: what else holds there, for the help text.
        **other: ``default=``, where it has to be another one there; ``kind=``, a type that tells the default from an
            equal value that somebody named.
    """
    text = OPTIONS[name].help
    default = other.get("default", OPTIONS[name].default)
    return option(other["kind"](default) if "kind" in other else default, f"{text} ({note})" if note else text)


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a question for the end of a message; nothing where no known name is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ". docs/options.md lists all of them"


class OptionNames(TypedDict, total=False):
    """The options by name, as keyword arguments; a test holds the list to that of the groups."""

    clip_policy: str | ClipPolicy | None
    target_clip_rate: float
    preset: str | None
    histogram_weight: float | None
    loss_bound: float | None
    loss_weight: float | None
    noise_allocation: NoiseAllocation | None
    sampling: str | None
    max_batch_size: int | None
    dataset_size: int | None
    batch_size_schedule: RateSchedule | None
    max_rows_per_user: int | None
    normalize: bool
    lr_control: bool
    ema_decay: float | None
    max_physical_batch_size: int | None
    fused_step: bool
    reducer: str | Reducer | None
    zeroth_order: str | ZerothOrderSettings | None


class EngineNames(OptionNames, total=False):
    """The options and the arguments of Opacus by name, for ``make_private_with_epsilon``."""

    max_grad_norm: float | None
    criterion: Any
    batch_first: bool
    loss_reduction: str
    poisson_sampling: bool
    clipping: str
    noise_generator: torch.Generator | None
    grad_sample_mode: str
    wrap_model: bool
    rand_on_empty: bool


OPACUS_NAMES = frozenset(EngineNames.__annotations__) - frozenset(OPTIONS)
"""Arguments of ``make_private`` with a default that are no options."""
