"""The privacy settings of a Trainer run, for code and for ``HfArgumentParser``. Needs neither torch nor opacus."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from opacus_ac.engine.options import OPTIONS, option, shared

USUAL_BETA1 = 0.9
"""``adam_beta1`` of the ``TrainingArguments`` of who has named none."""
ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Values of ``optim`` whose momentum, or whose learning rate, this package may choose."""
_MODES = ("bk", "hooks")
_TIMES_CHANCE = 4.0  # a model of C classes that knows nothing has loss log C; few records have four times as much


_CLASSES_CLIPPED = 0.3  # where nearly all records are clipped, those that are right already pull as hard as the others


class Default(float):
    """A default that nobody has named. It is that of models of words. Models of few classes get another one."""


@dataclass
class PrivacyArguments:
    """The privacy settings of :class:`PrivateTrainer`, beside the ``TrainingArguments``.

    No field has the name of a field of ``TrainingArguments``, so ``HfArgumentParser((PrivacyArguments,
    TrainingArguments))`` makes one command line of both. Fields that are also arguments of ``make_private`` mean the
    same there. ``per_sample_max_grad_norm`` is its ``max_grad_norm``, the clipping norm C of the first step.

    Attributes:
        target_epsilon: epsilon of the whole run. The noise is chosen so that the planned steps spend it.
        noise_multiplier: noise multiplier of each step, instead of a target.
        target_delta: delta of the guarantee, well below 1 / N.
        dataset_size: public number of records N. The default is the number of rows (or users) of the training data,
            which is then published.
        target_clip_rate: fraction of records to be clipped. The default is 0.9, and 0.3 for a model that chooses among
            classes. Where nearly all records are clipped, those that are right already pull as hard as those that are
            wrong. Then the larger class wins, or the model grows too sure of itself.
        loss_bound: public bound of a record's loss, for the noisy loss in the log; 0 to release no loss. The default is
            10, and 4 log C for a model that chooses among C classes: the noise of the loss grows with the bound, and a
            loss by chance is log C. Set it for regression, whose losses are in units of your own.
        auto_learning_rate: whether :class:`opacus_ac.AutoAdam` finds the learning rate from what the run releases. The
            ``learning_rate`` of the ``TrainingArguments`` is its hint. Then the rate does not follow the clip rate, and
            no average of weights is kept unless ``ema_decay`` is set.
        planned_momentum: whether ``beta1`` follows from the planned number of steps
            (:func:`opacus_ac.optimizer.momentum.planned_beta1`), where the ``TrainingArguments`` have an AdamW with the
            usual ``adam_beta1`` of 0.9. Short private runs end lower with less momentum.
        evaluation_is_public: whether the evaluation data need no protection. Otherwise they are refused.
        average_weights: whether the averaged weights (EMA) are evaluated and saved, where there is an average. The
            default is the last weights, unless the run is so long that the average is known to be better
            (:func:`opacus_ac.optimizer.ema.average_is_better`).

    Raises:
        ValueError: If settings contradict each other, or one is out of its range.

    >>> PrivacyArguments(target_epsilon=4.0, dataset_size=10_000).loss_bound
    10.0
    """

    target_epsilon: float | None = option(None, "epsilon that the whole run may spend")
    target_delta: float = option(1e-5, "delta of the guarantee, well below 1 / N")
    noise_multiplier: float | None = option(None, "noise multiplier, instead of target_epsilon")
    dataset_size: int | None = shared("dataset_size")
    per_sample_max_grad_norm: float | None = option(None, "clipping norm C0 of the first step (default 1; paper: 3)")
    clipping: str = option("adaptive", "adaptive, flat (fixed C) or automatic (AUTO-S)")
    clip_policy: str | None = shared("clip_policy")
    target_clip_rate: float = shared("target_clip_rate", note="default 0.9, with classes 0.3", kind=Default)
    normalize: bool = shared("normalize")
    grad_sample_mode: str = option("bk", "bk (one backward pass) or hooks (as in Opacus)")
    fused_step: bool = shared("fused_step")
    loss_bound: float | None = shared(
        "loss_bound", default=Default(10.0), note="default 10, with C classes 4 log C; 0 for none"
    )
    lr_control: bool = shared("lr_control")
    ema_decay: float | None = shared("ema_decay", note="0 for none")
    auto_learning_rate: bool = option(False, "find the learning rate from releases; learning_rate is a hint")
    planned_momentum: bool = option(True, "adam_beta1 follows from the planned steps, unless it is set")
    average_weights: bool | None = option(
        None, "evaluate and save the averaged weights (default: the last ones, except after long runs)"
    )
    preset: str | None = shared("preset")
    sampling: str = option("poisson", "how batches are drawn: poisson, or shuffled (charged without amplification)")
    accountant: str = option("vpld", "vpld, vrdp (a privacy filter), or an accountant of Opacus: rdp, prv")
    secure_mode: bool = option(False, "harden the noise against floating-point attacks; slower")
    ledger: str | None = option(None, "path of the privacy ledger that all runs on this dataset share")
    run_registry: bool = option(True, "remember runs on the same data, to warn where their epsilons add up")
    evaluation_is_public: bool = option(False, "the evaluation data need no protection")

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError(
                "give either target_epsilon or noise_multiplier, got "
                f"{self.target_epsilon!r} and {self.noise_multiplier!r}"
            )
        if self.grad_sample_mode not in _MODES:
            raise ValueError(f'grad_sample_mode must be "bk" or "hooks", got {self.grad_sample_mode!r}')
        if not 0 < self.target_delta < 1:
            raise ValueError(f"target_delta must lie between 0 and 1, well below 1 / N, got {self.target_delta!r}")
        for name in ("target_epsilon", "per_sample_max_grad_norm", "dataset_size"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
        self.loss_bound = self.loss_bound or None  # a command line cannot say None
        self.ema_decay = self.ema_decay or None

    def bound_for(self, classes: int | None) -> float | None:
        """Return the loss bound for a model that chooses among so many classes; None as the number where it does not.

        >>> round(PrivacyArguments(noise_multiplier=1.0).bound_for(2), 3)
        2.773
        """
        if classes is None or classes < 2 or not isinstance(self.loss_bound, Default):
            # A plain float, because the bound is kept in checkpoints.
            return None if self.loss_bound is None else float(self.loss_bound)
        return min(float(self.loss_bound), _TIMES_CHANCE * math.log(classes))

    def clip_rate_for(self, classes: int | None) -> float:
        """Return the fraction of records to be clipped for a model that chooses among so many classes, as above.

        >>> PrivacyArguments(noise_multiplier=1.0).clip_rate_for(2)
        0.3
        """
        chooses = classes is not None and classes >= 2
        follows = self.clipping == "adaptive" and self.clip_policy != "fixed"  # else the rate moves no norm
        usual = isinstance(self.target_clip_rate, Default) and follows
        return _CLASSES_CLIPPED if chooses and usual else float(self.target_clip_rate)

    def engine_options(self, classes: int | None = None) -> dict[str, Any]:
        """Return the keyword arguments of ``make_private`` that these settings determine.

        Args:
            classes: number of classes among which the model chooses; None for other models.
        """
        names = (
            "clipping", "clip_policy", "normalize", "grad_sample_mode", "fused_step",
            "lr_control", "ema_decay", "preset", "sampling", "dataset_size",
        )  # fmt: skip
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        options["poisson_sampling"] = self.sampling != "shuffled"
        options["max_grad_norm"] = self.per_sample_max_grad_norm
        options["loss_bound"] = self.bound_for(classes)
        options["target_clip_rate"] = self.clip_rate_for(classes)
        if self.auto_learning_rate:
            options["lr_control"] = False
            if self.ema_decay == OPTIONS["ema_decay"].default:
                options["ema_decay"] = None  # the path is an average already
        return options
