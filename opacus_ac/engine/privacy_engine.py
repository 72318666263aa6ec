"""PrivacyEngine: builds the parts of the private step and hands them to each other."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from opacus_ac._validate import not_negative, one_of
from opacus_ac.allocation.settings import NoiseAllocation
from opacus_ac.budget.guard import BudgetGuard
from opacus_ac.budget.planning import noise_for_target, planned_events
from opacus_ac.clipping.policy import ClipPolicy
from opacus_ac.distributed.choose import choose_reducer
from opacus_ac.distributed.reducers import Reducer
from opacus_ac.engine.accounted_engine import AccountedEngine
from opacus_ac.engine.attach import attach, observe
from opacus_ac.engine.checks import check_mechanism, check_model_and_optimizer, check_start
from opacus_ac.engine.parts import (
    choose_allocation,
    choose_control,
    choose_policy,
    choose_sampling,
    choose_source,
    choose_statistics,
    public_settings,
    random_streams,
)
from opacus_ac.engine.ranks import check_options, rank_streams
from opacus_ac.engine.zeroth_order import build_zeroth_order
from opacus_ac.errors import NotPrivateWarning, SamplingWarning
from opacus_ac.noise.streams import SecretStream
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.parameters import inner_optimizer, named_parameters
from opacus_ac.sampling.loader import PrivateDataLoader, private_loader
from opacus_ac.sampling.plan import RateSchedule
from opacus_ac.zeroth_order.settings import ZerothOrderSettings, zeroth_order_settings

MODES = ("bk", "hooks", "functorch")
CLIPPING = ("adaptive", "flat", "automatic", "zo")


class PrivacyEngine(AccountedEngine):
    """Drop-in for ``opacus.PrivacyEngine`` whose ``make_private`` yields DP-Adam-AC.

    Args:
        accountant: "vrdp" (RDP for rates that vary), or a name known to Opacus ("rdp", "prv", "gdp"); "pure" for Laplace noise.
        secure_mode: make every Gaussian of four, against attacks on the low-order bits of floating-point noise, about four
            times as slow to draw; and form sums in float64 until the noise is in, so that a record more or less does not
            change how the others are rounded. Noise and batches come from a cryptographic generator (AES-256-CTR, keyed by the
            operating system) in any case.
        ledger: path of the privacy ledger, see :class:`opacus_ac.budget.ledger.PrivacyLedger`: every charge is on disk before its
            release, runs on the same data add up, and a crash cannot lose one. Use one ledger per dataset, for all runs.

    Raises:
        LedgerError: the ledger is damaged; the message has its line.

    References:
        arXiv 2510.05288.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from opacus_ac import PrivacyEngine
    >>> model = torch.nn.Linear(4, 2)
    >>> data = TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
    >>> engine = PrivacyEngine()
    >>> model, optimizer, loader = engine.make_private(
    ...     module=model, optimizer=torch.optim.AdamW(model.parameters()), data_loader=DataLoader(data, batch_size=16),
    ...     noise_multiplier=1.0, max_grad_norm=1.0)
    >>> for x, y in loader:
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(model(x), y).backward()
    ...     _ = optimizer.step()
    >>> engine.get_epsilon(delta=1e-3) > 0
    True
    """

    # ---------------------------------------------------------------- make_private

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float | None = None,
        criterion: Any = None,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        sampling: str | None = None,
        max_batch_size: int | None = None,
        dataset_size: int | None = None,
        clipping: str = "adaptive",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "bk",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        max_physical_batch_size: int | None = None,
        batch_size_schedule: RateSchedule | None = None,
        clip_policy: str | ClipPolicy | None = None,
        target_clip_rate: float = 0.9,
        normalize: bool = True,
        lr_control: bool = True,
        ema_decay: float | None = 0.999,
        fused_step: bool = False,
        histogram_weight: float | None = None,
        loss_bound: float | None = None,
        loss_weight: float | None = None,
        preset: str | None = None,
        max_rows_per_user: int | None = None,
        noise_allocation: NoiseAllocation | None = None,
        zeroth_order: str | ZerothOrderSettings | None = None,
        reducer: str | Reducer | None = None,
    ) -> tuple[Any, AdaptiveClipDPOptimizer, PrivateDataLoader]:
        """Return (model, optimizer, loader) that train with DP-Adam-AC.

        Args:
            module: model in training mode.
            optimizer: inner optimizer over its parameters, AdamW in the paper.
            data_loader: loader with ``batch_size``, sequential or shuffled; batches become Poisson samples of rate
                batch_size / N, and a pass keeps its number of batches.
            noise_multiplier: std of the noise over the joint sensitivity of a step's release.
            max_grad_norm: C0, default 1 (3 with ``preset="paper"``); the default policy finds C from any C0.
            criterion: ignored, as by Opacus outside its ghost modes.
            batch_first: whether the batch is the first dimension of the model's inputs.
            loss_reduction: "mean" or "sum" of the records' losses, as the loop computes it.
            poisson_sampling: False keeps the loader's batches and reports the bound that holds for them, without
                amplification by sampling.
            sampling: "poisson"; "truncated_poisson", with at most ``max_batch_size`` records; "fixed_size", exactly
                batch_size records drawn without replacement at each step; "shuffled", as ``poisson_sampling=False``. Each has
                a bound of its own, which the report names. By default as ``poisson_sampling`` says.
            max_batch_size: largest logical batch, for ``sampling="truncated_poisson"``.
            dataset_size: public N for Poisson sampling, where the number of records itself is not to be public.
            clipping: "adaptive", "flat" (fixed C, the noise of Opacus), "automatic" (AUTO-S), "zo" (forward passes only).
            noise_generator: seeded CPU generator for tests; the report then says that the run is not private.
            grad_sample_mode: "bk" (one backward pass, exact, no per-sample gradients of large layers; see
                ``opacus_ac.grad_sample.explain``), or "hooks" or "functorch", as in Opacus.
            wrap_model: as in Opacus for its modes: False attaches hooks to the model and returns the hooks object.
            rand_on_empty: ignored; an empty batch is a constant batch with weight zero.
            max_physical_batch_size: largest batch that reaches the model; a memory choice that changes no result.
            batch_size_schedule: expected batch size per step: a sequence of public numbers or a function of the step, which
                may use past releases if there is a target epsilon (the budget is then a privacy filter).
            clip_policy: policy name or object for ``clipping="adaptive"``; "percentile" by default.
            target_clip_rate: fraction of records to be clipped.
            normalize: scale the gradient by C0 / C_t for the inner optimizer.
            lr_control: learning rate follows the clip rate.
            ema_decay: decay of the weight average, None for none.
            fused_step: hold no more gradients at a time than the largest one takes: they are summed, noised, applied
                and forgotten in turns, which with mode "bk" and one physical batch per step leaves the gradient memory of one layer.
                For AdamW, Adam and SGD; no ``.grad`` is left to look at. The same numbers.
            histogram_weight: ``a`` of the norm histogram, which costs ``sqrt(1 + a^2)`` of noise: by default what the batch size
                needs, at most 2 % (:func:`opacus_ac.release.statistics.default_histogram_weight`).
            loss_bound: release a noisy mean loss, each record's loss clipped to this public bound; None for none.
            loss_weight: ``b`` of the loss; default sqrt(0.0412).
            preset: "paper" for the published constants.
            max_rows_per_user: by default a record is a row. With a number K an item of the dataset is a user with at most K
                rows, and what is drawn, clipped and protected is a user: N, batch sizes and the mean of the loss count
                users, and the loss of a user is a function of that user's rows (see :mod:`opacus_ac.sampling.users`,
                :func:`opacus_ac.loss.per_user_loss` and ``opacus_ac.integrations.finetune.chat_users``).
            noise_allocation: spread the noise over groups of parameters by public weights, at the same epsilon
                (:class:`opacus_ac.allocation.NoiseAllocation`); None for the same std everywhere.
            zeroth_order: settings of ``clipping="zo"``, or a paper's by name; "aggzo" by default.
            reducer: how several processes share a step: "ddp" (bare model, the same on every rank), "fsdp2" (a model under
                ``fully_shard``), "local" (each for itself), or an object; by default what model and ``torch.distributed`` say.
                All ranks pass the same arguments; batch sizes are those of all ranks together.

        Returns:
            the model that was passed in (mode "bk") or what Opacus returns for its modes, an :class:`AdaptiveClipDPOptimizer`, a :class:`PrivateDataLoader`.

        Raises:
            ValueError: anything that would make the guarantee wrong, with the remedy; the inputs are unchanged.
            opacus.validators.errors.UnsupportedModuleError: as in Opacus (BatchNorm, eval mode).
        """
        one_of(MODES, grad_sample_mode=grad_sample_mode)
        one_of(CLIPPING, clipping=clipping)
        one_of(("mean", "sum"), loss_reduction=loss_reduction)
        inner = inner_optimizer(optimizer)
        check_model_and_optimizer(module, inner)
        settings = zeroth_order_settings(clipping, zeroth_order)
        check_mechanism(self.accountant, settings)
        if settings is None:
            self.validate(module=module, optimizer=inner, data_loader=data_loader)
        not_negative(noise_multiplier=noise_multiplier)
        ranks = choose_reducer(reducer, module, named_parameters(module, inner)[0])
        sampling = choose_sampling(sampling, poisson_sampling, self.accountant)
        check_options(
            ranks,
            {
                "grad_sample_mode": grad_sample_mode,
                "sampling": sampling,
                "fused_step": fused_step,
                "clip_policy": getattr(clip_policy, "name", clip_policy),
                "clipping": clipping,
                "max_rows_per_user": max_rows_per_user is not None,
                "noise_allocation": noise_allocation is not None,
            },
        )
        noise_stream, sampling_stream = rank_streams(ranks, *random_streams(noise_generator, self.secure_mode))
        loader = private_loader(
            data_loader,
            sampling=sampling,
            stream=sampling_stream,
            max_physical_batch_size=max_physical_batch_size,
            schedule=batch_size_schedule,
            max_batch_size=max_batch_size,
            dataset_size=dataset_size,
            max_rows_per_user=max_rows_per_user,
        )
        loader.split(ranks.rank, ranks.world)
        self._account.check_dataset(loader.plan.sizes.dataset_size, max_rows_per_user)
        expected = loader.plan.sizes.expected(0)
        if settings is not None:
            measured = build_zeroth_order(
                module,
                inner,
                settings,
                loader.plan,
                noise_stream,
                noise_multiplier=noise_multiplier,
                max_grad_norm=max_grad_norm,
                clip_policy=clip_policy,
                target_clip_rate=target_clip_rate,
                loss_reduction=loss_reduction,
                normalize=normalize,
                lr_control=lr_control,
                histogram_weight=histogram_weight,
                loss_bound=loss_bound,
                loss_weight=loss_weight,
                reducer=ranks,
                max_physical_batch_size=max_physical_batch_size,
                unused={
                    "preset": preset,
                    "fused_step": fused_step,
                    "ema_decay": ema_decay,
                    "mode": grad_sample_mode,
                    "noise_allocation": noise_allocation,
                },
            )
            measured.check_budget = self._look_ahead
            check_start(measured, loader, module, max_physical_batch_size, noise_generator)
            ranks.sync_module(module)
            if measured.ema is not None:
                measured.ema.reset()  # the weights of rank 0 are those that count
            self._undo.append((module, observe(module, measured, measured.coordinates.parameters)))
            self._adopt(measured, loader)
            return module, measured, loader
        policy = choose_policy(clipping, clip_policy, preset, max_grad_norm, target_clip_rate, expected)
        allocation = choose_allocation(module, inner, noise_allocation)
        private = AdaptiveClipDPOptimizer(
            inner,
            noise_multiplier=noise_multiplier,
            max_grad_norm=policy.initial_bound,
            expected_batch_size=expected,
            loss_reduction=loss_reduction,
            clip_policy=policy,
            target_clip_rate=target_clip_rate,
            statistics=choose_statistics(
                clipping, policy, noise_multiplier, expected, histogram_weight, loss_bound, loss_weight, allocation
            ),
            normalize=normalize and preset != "paper",
            lr_control=choose_control(lr_control, policy, target_clip_rate, preset),
            ema_decay=ema_decay,
            fused_step=fused_step,
            source=choose_source(
                module, inner, grad_sample_mode, loss_reduction, batch_first, loader.users, self.secure_mode
            ),
            plan=loader.plan,
            stream=noise_stream,
            allocation=allocation,
            reducer=ranks,
        )
        check_start(private, loader, module, max_physical_batch_size, noise_generator)
        wrapped, undo = attach(
            module,
            private,
            mode=grad_sample_mode,
            batch_first=batch_first,
            loss_reduction=loss_reduction,
            wrap_model=wrap_model,
            users=loader.users,
        )
        if loader.plan.sampling != "shuffled" and grad_sample_mode != "bk":
            wrapped.forbid_grad_accumulation()
        ranks.sync_module(module)
        if private.ema is not None:
            private.ema.reset()  # the weights of rank 0 are those that count
        self._undo.append((module, undo))
        self._adopt(private, loader)
        return wrapped, private, loader

    def _adopt(self, optimizer: AdaptiveClipDPOptimizer, loader: PrivateDataLoader) -> None:
        """Make this engine account for the steps of ``optimizer``."""
        if self.dataset is not None and self.dataset is not loader.dataset:
            warnings.warn(
                "this engine has accounted for another dataset object; its epsilon is the sum over both. Use a new "
                "PrivacyEngine for different people's data",
                stacklevel=3,
            )
        self.dataset: Any = loader.dataset
        self._optimizer, self._loader = optimizer, loader
        self._account.begin(public_settings(optimizer, loader.plan), by_function=loader.plan.sizes.is_function)
        self._account.join(optimizer.reducer)
        optimizer.charge = self._account.charge
        optimizer.on_unknown_batch = self._warn_unknown_batch
        if not optimizer.policy.is_private:
            warnings.warn(
                "clip_policy='raw_percentile' reads un-noised gradient norms: no finite epsilon holds, and infinity "
                "is reported. Use clip_policy='percentile' for the private version of the same rule",
                NotPrivateWarning,
                stacklevel=3,
            )
        if not optimizer.mechanism.stream.secret:
            warnings.warn(
                "noise_generator is seeded: whoever knows the seed can remove the noise. For tests only",
                NotPrivateWarning,
                stacklevel=3,
            )

    def _warn_unknown_batch(self) -> None:
        self._unknown_batches += 1
        if self._unknown_batches == 1:
            warnings.warn(
                "optimizer.step() on a batch that the private loader did not just draw: it is charged at sample "
                "rate 1, without amplification. Take one step per batch of the loader that make_private returned",
                SamplingWarning,
                stacklevel=6,
            )

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: Optimizer,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: float | None = None,
        steps: int | None = None,
        **kwargs: Any,
    ) -> tuple[Any, AdaptiveClipDPOptimizer, PrivateDataLoader]:
        """Return what :meth:`make_private` returns, with the noise that spends (epsilon, delta) in ``epochs``.

        Args:
            module: as in :meth:`make_private`.
            optimizer: as in :meth:`make_private`.
            data_loader: as in :meth:`make_private`.
            target_epsilon: largest epsilon; the step that would exceed it raises before anything is released.
            target_delta: delta, well below 1 / N.
            epochs: passes of the loader; or give ``steps``.
            steps: number of steps.
            **kwargs: all other arguments of :meth:`make_private`.

        Raises:
            ValueError: as :meth:`make_private`; both or neither of ``epochs`` and ``steps``; impossible budget.
        """
        if (epochs is None) == (steps is None):
            raise ValueError("give either epochs or steps")
        if len(self.accountant) > 0:
            warnings.warn(
                "budget has been spent already: the noise is chosen as if none had, so training stops early",
                stacklevel=2,
            )
        sampling = choose_sampling(kwargs.get("sampling"), kwargs.get("poisson_sampling", True), self.accountant)
        template = private_loader(
            data_loader,
            sampling=sampling,
            stream=SecretStream(),
            schedule=kwargs.get("batch_size_schedule"),
            max_batch_size=kwargs.get("max_batch_size"),
            dataset_size=kwargs.get("dataset_size"),
            max_rows_per_user=kwargs.get("max_rows_per_user"),
        )
        if steps is None:
            assert epochs is not None
            steps = math.ceil(epochs * len(template))
        noise_multiplier = noise_for_target(
            self.accountant,
            template.plan,
            steps=steps,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
        )
        made = self.make_private(
            module=module, optimizer=optimizer, data_loader=data_loader, noise_multiplier=noise_multiplier, **kwargs
        )
        if made[1].policy.is_private:
            planned = planned_events(template.plan, steps, noise_multiplier)
            self._account.guard = BudgetGuard(self.accountant, target_epsilon, target_delta, planned)
        return made
