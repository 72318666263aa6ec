"""The privacy settings of a Trainer run, for code and for ``HfArgumentParser``; imports neither torch nor opacus."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from opacus_ac.engine.options import option, shared

_MODES = ("bk", "hooks")


@dataclass
class PrivacyArguments:
    """What :class:`PrivateTrainer` needs to know beside the ``TrainingArguments``; no field has a name of theirs.

    ``HfArgumentParser((PrivacyArguments, TrainingArguments))`` makes a command line of both. What ``make_private`` also takes
    has the meaning that it has there; ``per_sample_max_grad_norm`` is its ``max_grad_norm``, the C of the first step.

    Attributes:
        target_epsilon: epsilon of the whole run; the noise is chosen to spend it in the planned steps.
        noise_multiplier: the noise itself, instead of a target.
        target_delta: delta, well below 1 / N.
        dataset_size: public N; by default the number of rows, or users, of the training data, which then counts as public.
        loss_bound: public bound of a record's loss in the noisy loss; 0 for no loss.
        evaluation_is_public: whether the evaluation data need no protection; without it they are refused.
        average_weights: whether the weight average is what is evaluated and saved, where there is one.

    Raises:
        ValueError: settings that contradict each other or lie outside their range.

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
    target_clip_rate: float = shared("target_clip_rate")
    normalize: bool = shared("normalize")
    grad_sample_mode: str = option("bk", "bk (one backward pass) or hooks (as in Opacus)")
    fused_step: bool = shared("fused_step")
    loss_bound: float | None = shared("loss_bound", default=10.0, note="0 for none")
    lr_control: bool = shared("lr_control")
    ema_decay: float | None = shared("ema_decay", note="0 for none")
    average_weights: bool = option(True, "evaluate and save the averaged weights")
    preset: str | None = shared("preset")
    sampling: str = option("poisson", "how batches are drawn: poisson, or shuffled (charged without amplification)")
    accountant: str = option("vrdp", "vrdp, vpld (tighter), or an accountant of Opacus: rdp, prv, gdp")
    secure_mode: bool = option(False, "harden the noise against floating-point attacks; slower")
    ledger: str | None = option(None, "path of the privacy ledger that all runs on this dataset share")
    evaluation_is_public: bool = option(False, "the evaluation data need no protection")

    def __post_init__(self) -> None:
        if (self.target_epsilon is None) == (self.noise_multiplier is None):
            raise ValueError(
                f"give either target_epsilon or noise_multiplier, got {self.target_epsilon!r} and {self.noise_multiplier!r}"
            )
        if self.grad_sample_mode not in _MODES:
            raise ValueError(f'grad_sample_mode must be "bk" or "hooks", got {self.grad_sample_mode!r}')
        if not 0 < self.target_delta < 1:
            raise ValueError(f"target_delta must lie between 0 and 1, well below 1 / N, got {self.target_delta!r}")
        for name in ("target_epsilon", "per_sample_max_grad_norm", "dataset_size"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
        self.loss_bound = self.loss_bound or None  # 0 on a command line, which cannot say None
        self.ema_decay = self.ema_decay or None

    def engine_options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``make_private`` that these settings determine."""
        names = (
            "clipping", "clip_policy", "target_clip_rate", "normalize", "grad_sample_mode", "fused_step", "loss_bound",
            "lr_control", "ema_decay", "preset", "sampling", "dataset_size",
        )  # fmt: skip
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        options["poisson_sampling"] = self.sampling != "shuffled"
        options["max_grad_norm"] = self.per_sample_max_grad_norm
        return options
