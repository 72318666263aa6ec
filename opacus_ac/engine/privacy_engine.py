"""PrivacyEngine: has the parts of the private step chosen, joined and attached to the model."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import Unpack

from opacus_ac._validate import positive
from opacus_ac.budget.advice import drowned, weak_promise
from opacus_ac.budget.planning import noise_for_target, planned_events
from opacus_ac.distributed.choose import choose_reducer
from opacus_ac.distributed.reducers import Reducer
from opacus_ac.engine.accounted_engine import AccountedEngine
from opacus_ac.engine.assemble import build_optimizer
from opacus_ac.engine.attach import attach
from opacus_ac.engine.checks import check_layers_of_opacus, check_model_and_optimizer
from opacus_ac.engine.options import OPACUS_NAMES, EngineNames, OptionNames, PrivateOptions
from opacus_ac.engine.parts import Job, choose_sampling, loader_settings, random_streams
from opacus_ac.engine.ranks import check_start, rank_streams
from opacus_ac.errors import NotPrivateWarning, PrivacyBudgetExceeded, SamplingWarning, WeakPrivacyWarning
from opacus_ac.noise.streams import RandomStream, SecretStream
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.optimizer.parameters import inner_optimizer, named_parameters
from opacus_ac.optimizer.state import public_settings
from opacus_ac.sampling.loader import PrivateDataLoader, private_loader
from opacus_ac.sampling.plan import SamplingPlan
from opacus_ac.zeroth_order.checks import check_not_random
from opacus_ac.zeroth_order.settings import zeroth_order_settings


class PrivacyEngine(AccountedEngine):
    """Drop-in for ``opacus.PrivacyEngine`` whose ``make_private`` yields DP-Adam-AC.

    Args:
        accountant: "vpld" (privacy loss distribution), the tightest for settings that are fixed before the run; "vrdp"
            (RDP for rates that vary), a privacy filter, for rates or noise that follow from releases under a target; a
            name known to Opacus ("rdp", "prv", "gdp"); or "pure" for Laplace noise. None for "vpld", or for "vrdp"
            where a target is given with a function as batch_size_schedule.
        secure_mode: sum four Gaussian draws per noise value, which defeats attacks on floating-point rounding and takes
            about four times as long to draw. Sums stay in float64 until the noise is in, so that a record more or less
            does not change how the others are rounded. In any mode, noise and batches come from a cryptographic
            generator (AES-256-CTR), whose key comes from the operating system.
        ledger: path of the privacy ledger, see :class:`opacus_ac.budget.ledger.PrivacyLedger`. Every charge is on disk
            before its release, so that runs on the same data add up and a crash cannot lose a charge. Use one ledger
            per dataset, for all runs.

    Raises:
        LedgerError: If the ledger is damaged. The message has its line.

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
        clipping: str = "adaptive",
        noise_generator: torch.Generator | None = None,
        grad_sample_mode: str = "bk",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        options: PrivateOptions | None = None,
        **named: Unpack[OptionNames],
    ) -> tuple[Any, AdaptiveClipDPOptimizer, PrivateDataLoader]:
        """Return (model, optimizer, loader) that train with DP-Adam-AC.

        What Opacus does not have is an option, of :class:`~opacus_ac.engine.PrivateOptions` and its groups: how C is
        chosen (:class:`~opacus_ac.engine.ClippingOptions`), what is released beside the gradient
        (:class:`~opacus_ac.engine.ReleaseOptions`), which records a step sees
        (:class:`~opacus_ac.engine.SamplingOptions`), what follows from a release
        (:class:`~opacus_ac.engine.UpdateOptions`), time and memory (:class:`~opacus_ac.engine.PerformanceOptions`). An
        option is given in ``options``, or by its name alone:
        ``make_private(..., target_clip_rate=0.5, ema_decay=None)``.

        Args:
            module: model in training mode.
            optimizer: inner optimizer over its parameters, AdamW in the paper.
            data_loader: loader with ``batch_size``, sequential or shuffled; batches become Poisson samples of rate
                batch_size / N, and a pass keeps its number of batches.
            noise_multiplier: ratio of the noise's standard deviation to the L2 sensitivity of a step's release.
            max_grad_norm: C0, default 1 (3 with ``preset="paper"``); the default policy finds C from any C0.
            criterion: ignored, as by Opacus outside its ghost modes.
            batch_first: whether the batch is the first dimension of the model's inputs.
            loss_reduction: "mean" or "sum" of the records' losses, as the loop computes it.
            poisson_sampling: False keeps the loader's batches and reports the bound that holds for them, without
                amplification by sampling.
            clipping: "adaptive", "flat" (fixed C, the noise of Opacus) or "automatic" (AUTO-S).
            noise_generator: seeded CPU generator for tests: noise, draws and dropout follow from its seed. The report
                then says that the run is not private.
            grad_sample_mode: "bk" (one backward pass, exact, no per-sample gradients of large layers; see
                ``opacus_ac.grad_sample.explain``), or "hooks" or "functorch", as in Opacus.
            wrap_model: as in Opacus for its modes: False attaches hooks to the model and returns the hooks object.
            rand_on_empty: ignored; an empty batch is a constant batch with weight zero.
            options: the options in groups. All ranks of a run on several processes pass the same; batch sizes are
                those of all ranks together.
            **named: single options by name, of groups that ``options`` leaves as they are.

        Returns:
            The model that was passed in (mode "bk") or what Opacus returns for its modes, an
            :class:`AdaptiveClipDPOptimizer`, and a :class:`PrivateDataLoader`.

        Raises:
            ValueError: If anything would make the guarantee wrong. The message has the remedy, and the inputs are
                unchanged.
            TypeError: If a name is no argument, or an option is given both ways. The message has the nearest name.
            opacus.validators.errors.UnsupportedModuleError: as in Opacus (BatchNorm, eval mode).
        """
        chosen = PrivateOptions.of(options, named, also=OPACUS_NAMES)
        job = Job(
            module=module, optimizer=inner_optimizer(optimizer), noise_multiplier=noise_multiplier, options=chosen,
            max_grad_norm=max_grad_norm, batch_first=batch_first, loss_reduction=loss_reduction, clipping=clipping,
            noise_generator=noise_generator, grad_sample_mode=grad_sample_mode, wrap_model=wrap_model,
            zeroth_order=zeroth_order_settings(chosen.zeroth_order),
            sampling=choose_sampling(chosen.sampling, poisson_sampling, self._account.accountant),
        )  # fmt: skip
        ranks = self._prepare_model(job, data_loader)
        loader, stream = self._prepare_data_loader(job, data_loader, ranks)
        private = build_optimizer(job, loader, stream, ranks, self.secure_mode)
        check_start(private, loader, job)
        return self._start(job, private, loader), private, loader

    def _prepare_model(self, job: Job, data_loader: DataLoader[Any]) -> Reducer:
        """Check model, optimizer and options; return the processes that train the model."""
        job.check_together(accountant=self._account.accountant.name, secure_mode=self.secure_mode)
        check_model_and_optimizer(job.module, job.optimizer)
        if job.zeroth_order is None and job.grad_sample_mode == "bk":
            check_layers_of_opacus(job.module)
        elif job.zeroth_order is None:
            self.validate(module=job.module, optimizer=job.optimizer, data_loader=data_loader)
        else:
            check_not_random(job.module)
        parameters, _ = named_parameters(job.module, job.optimizer)
        ranks = choose_reducer(job.options.performance.reducer, job.module, parameters)
        job.check_together(processes=ranks.name)
        return ranks

    def _prepare_data_loader(
        self, job: Job, data_loader: DataLoader[Any], ranks: Reducer
    ) -> tuple[PrivateDataLoader, RandomStream]:
        """Return the loader of this rank, and the stream of its noise."""
        options = job.options
        noise, draws = rank_streams(ranks, *random_streams(job.noise_generator, self.secure_mode))
        loader = private_loader(
            data_loader,
            sampling=job.sampling,
            stream=draws,
            max_physical_batch_size=options.performance.max_physical_batch_size,
            **loader_settings(options.sampling),
        )
        loader.split(ranks.rank, ranks.world)
        self._account.check_dataset(loader.plan.sizes.dataset_size, options.sampling.max_rows_per_user)
        return loader, noise

    def _start(self, job: Job, private: AdaptiveClipDPOptimizer, loader: PrivateDataLoader) -> Any:
        """Attach what the optimizer needs to the model, and account for its steps; return the model for the loop."""
        wrapped, undo = attach(job, private, loader.users)
        try:
            private.reducer.sync_module(job.module)
            if private.ema is not None:
                private.ema.reset()  # the weights of rank 0 are those that count
            self._adopt(private, loader)
        except BaseException:
            undo()
            raise
        self._undo.append((job.module, undo))
        return wrapped

    def _adopt(self, optimizer: AdaptiveClipDPOptimizer, loader: PrivateDataLoader) -> None:
        """Make this engine account for the steps of ``optimizer``."""
        if self.dataset is not None and self.dataset is not loader.dataset:
            warnings.warn(
                "this engine has accounted for another dataset object; its epsilon is the sum over both. Use a new "
                "PrivacyEngine for different people's data",
                stacklevel=4,
            )
        self._account.begin(public_settings(optimizer), by_function=loader.plan.sizes.is_function)
        self._account.join(optimizer.reducer)
        self.dataset: Any = loader.dataset
        self._optimizer, self._loader = optimizer, loader
        optimizer.charge, optimizer.look_ahead = self._account.charge, self._account.look_ahead
        optimizer.on_unknown_batch = self._warn_unknown_batch
        sizes, noise = loader.plan.sizes, optimizer.mechanism.noise_multiplier
        _warn_weak(drowned(noise, sizes.expected(0), sizes.dataset_size))
        if not optimizer.policy.is_private:
            warnings.warn(
                "clip_policy='raw_percentile' reads un-noised gradient norms: no finite epsilon holds, and infinity "
                "is reported. Use clip_policy='percentile' for the private version of the same rule",
                NotPrivateWarning,
                stacklevel=4,
            )
        if not optimizer.mechanism.stream.secret:
            warnings.warn(
                "noise_generator is seeded: whoever knows the seed can remove the noise. For tests only",
                NotPrivateWarning,
                stacklevel=4,
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
        options: PrivateOptions | None = None,
        **named: Unpack[EngineNames],
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
            options: as in :meth:`make_private`.
            **named: all other arguments of :meth:`make_private`.

        Raises:
            ValueError: As :meth:`make_private`; or if both or neither of ``epochs`` and ``steps`` are given, or the
                budget is impossible.
            TypeError: As :meth:`make_private`.
        """
        own: dict[str, Any] = {name: value for name, value in named.items() if name in OPACUS_NAMES}
        chosen = PrivateOptions.of(
            options,
            {name: value for name, value in named.items() if name not in own},
            also=OPACUS_NAMES,
            caller="make_private_with_epsilon",
        )
        plan, planned_steps = self._plan_run(chosen, own.get("poisson_sampling", True), data_loader, epochs, steps)
        _warn_weak(weak_promise(target_epsilon, target_delta, plan.sizes.dataset_size))
        may_become_filter = plan.sizes.is_function and not self._chosen and self._account.guard is None
        filtered = self._account.as_filter() if may_become_filter else None
        target = {"target_epsilon": target_epsilon, "target_delta": target_delta}
        accountant = (filtered or self._account).accountant
        noise_multiplier = noise_for_target(accountant, plan, steps=planned_steps, **target)
        parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "data_loader": data_loader}
        made = self.make_private(**parts, noise_multiplier=noise_multiplier, options=chosen, **own)
        if filtered is not None:
            self.accountant = self._account.become(filtered)
        if made[1].policy.is_private:
            planned = planned_events(plan, planned_steps, noise_multiplier)
            self._account.start_target(target_epsilon, target_delta, planned)
            self._warn_if_spent()
        return made

    def _warn_if_spent(self) -> None:
        """Say so when the target leaves no room for a step."""
        try:
            self._account.refresh()
            self._account.look_ahead(self._next_event())
        except PrivacyBudgetExceeded as reason:
            warnings.warn(
                f"the target is spent already, by earlier steps of this account, so no step can be taken: {reason}. "
                "Allow a larger target, or train on other records with an engine and a ledger of their own",
                WeakPrivacyWarning,
                stacklevel=3,
            )

    def _plan_run(
        self,
        options: PrivateOptions,
        poisson_sampling: bool,
        data_loader: DataLoader[Any],
        epochs: float | None,
        steps: int | None,
    ) -> tuple[SamplingPlan, int]:
        """Return the sampling plan of a run, and its number of steps."""
        if (epochs is None) == (steps is None):
            raise ValueError("give either epochs or steps")
        if self._account.accountant.steps:
            warnings.warn(
                "budget has been spent already: the noise is chosen as if none had, so training stops early",
                stacklevel=3,
            )
        sampling = choose_sampling(options.sampling, poisson_sampling, self._account.accountant)
        template = private_loader(
            data_loader, sampling=sampling, stream=SecretStream(), **loader_settings(options.sampling)
        )
        if steps is None:
            steps = math.ceil(positive(epochs=epochs) * len(template))
        return template.plan, steps


def _warn_weak(lines: list[str]) -> None:
    """Say what is weak about the promise of a run, to the caller of the engine."""
    for line in lines:
        warnings.warn(line, WeakPrivacyWarning, stacklevel=4)
