"""The account side of the engine: what was spent, what may still be, what it says about that, and how it is kept."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import opacus
import torch
from opacus.accountants import IAccountant
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from opacus_ac import accounting
from opacus_ac.accounting import Event
from opacus_ac.accounting.opacus_accountants import CheckedGDPAccountant, checked
from opacus_ac.budget.account import Account, kept_terms
from opacus_ac.budget.charges import Terms
from opacus_ac.checkpoint import file as checkpoint
from opacus_ac.distributed.reducers import LOCAL, Reducer
from opacus_ac.engine.report import PrivacyReport, make_report
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.noise.streams import RandomStream
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.sampling.loader import PrivateDataLoader


class AccountedEngine(opacus.PrivacyEngine):
    """An engine with an account, for :class:`opacus_ac.PrivacyEngine`, which makes models private.

    Args:
        accountant: as there.
        secure_mode: as there.
        ledger: as there.
    """

    def __init__(
        self,
        *,
        accountant: str = "vrdp",
        secure_mode: bool = False,
        ledger: str | os.PathLike[str] | None = None,
    ) -> None:
        accounting.register()
        with warnings.catch_warnings():
            # Opacus warns about torch's generator, which is not used here.
            warnings.filterwarnings("ignore", message="Secure RNG turned off")
            super().__init__(accountant=accountant, secure_mode=False)
        self.accountant: IAccountant = checked(self.accountant)
        if isinstance(self.accountant, CheckedGDPAccountant):
            warnings.warn(
                'accountant="gdp" is an approximation by the central limit theorem, which can lie far below the truth: epsilon is '
                'reported as infinity. Use accountant="vrdp" (the default), "vpld" or "prv"',
                NotPrivateWarning,
                stacklevel=2,
            )
        self.secure_mode = secure_mode  # Opacus's own would need torchcsprng, which cannot be installed
        self._account = Account(self.accountant, ledger)
        self._optimizer: AdaptiveClipDPOptimizer | None = None
        self._loader: PrivateDataLoader | None = None
        self._undo: list[tuple[nn.Module, Callable[[], None]]] = []
        self._unknown_batches = 0

    def _look_ahead(self, event: Event) -> None:
        """Raise when ``event`` would exceed the target, before the work that leads to its release; charge nothing."""
        self._account.look_ahead(event)

    # ---------------------------------------------------------------- budget

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon spent so far at ``delta``; infinity when no bound holds.

        It is never below that of :meth:`privacy_report`, and counts what other processes have added to the ledger. Where rates
        or noise may have followed from releases it is that of the privacy filter's whole budget.

        Raises:
            ValueError: ``delta`` is negative.
            LedgerError: the ledger is damaged.
        """
        return self._account.epsilon(delta)

    @property
    def target_budget(self) -> tuple[float, float] | None:
        """The target (epsilon, delta); None without one."""
        guard = self._account.guard
        return None if guard is None else (guard.epsilon, guard.delta)

    def remaining_steps(self) -> int:
        """Return how many more steps the target budget allows at the next step's rate and noise.

        With ``poisson_sampling=False`` whole passes of the loader are counted.

        Raises:
            ValueError: there is no target; use :meth:`make_private_with_epsilon`.
        """
        guard = self._account.guard
        if guard is None or self._optimizer is None or self._loader is None:
            raise ValueError("there is no target budget: use make_private_with_epsilon")
        plan = self._loader.plan
        return self._account.remaining(self._next_event()) * (plan.steps_per_pass if plan.sampling == "shuffled" else 1)

    def _next_event(self) -> Event:
        """Return what the next step would be charged as."""
        assert self._optimizer is not None
        assert self._loader is not None
        plan = self._loader.plan
        return plan.event(self._optimizer.noise_multiplier, plan.sizes.rate(plan.step))

    # ---------------------------------------------------------------- report

    def privacy_report(self, delta: float | None = None, *, tight: bool = True) -> PrivacyReport:
        """Return the privacy statement of the run so far.

        Args:
            delta: delta to report at; by default the target's.
            tight: state the smallest epsilon that holds: beside the accountant's, with "vrdp", that of the privacy loss
                distribution, which takes up to some seconds to compute. False states the accountant's.

        Raises:
            ValueError: nothing was made private yet, or ``delta`` is missing.
        """
        if self._optimizer is None or self._loader is None:
            raise ValueError("nothing to report: call make_private first")
        if delta is None:
            if self.target_budget is None:
                raise ValueError("privacy_report needs delta=... when no target was set")
            delta = self.target_budget[1]
        plan, account = self._loader.plan, self._account
        bounds = account.bounds(delta, tight)
        return make_report(
            self._optimizer,
            plan,
            bounds=bounds,
            delta=delta,
            adjacency=account.adjacency(plan.sampling),
            history=account.history,
            notes=account.notes(delta, self._next_event()),
            unknown_batches=self._unknown_batches,
            ledger=None if account.ledger is None else account.ledger.summary,
        )

    # ---------------------------------------------------------------- taking hooks off

    def detach(self, model: nn.Module) -> nn.Module:
        """Remove every hook from ``model`` and return the bare model; its weights stay.

        Raises:
            ValueError: this engine did not make the model private.
        """
        bare = getattr(model, "_module", model) if isinstance(model, AbstractGradSampleModule) else model
        for i, (module, undo) in enumerate(self._undo):
            if module is bare:
                undo()
                del self._undo[i]
                return module
        raise ValueError("this engine has no hooks on that model")

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
        **schedulers: Any,
    ) -> None:
        """Save model, optimizer (with C, window, EMA, learning-rate multiplier, step), accountant and head of the ledger.

        A file is replaced atomically, and has a digest of its content. Secret noise and sampling streams are never saved.

        Args:
            path: file path, or a binary file object.
            module: model, wrapped or bare.
            optimizer: the private optimizer.
            checkpoint_dict: further entries to save.
            module_state_dict_kwargs: for ``module.state_dict``.
            torch_save_kwargs: for ``torch.save``.
            **schedulers: ``noise_scheduler`` and ``grad_clip_scheduler`` of Opacus.
        """
        self._refuse_several_processes()
        state = dict(checkpoint_dict or {})
        state["module_state_dict"] = module.state_dict(**(module_state_dict_kwargs or {}))
        if optimizer is not None:
            state["optimizer_state_dict"] = optimizer.state_dict()
        for name, scheduler in schedulers.items():
            if scheduler is not None:
                state[f"{name}_state_dict"] = scheduler.state_dict()
        self._write(state, path, **(torch_save_kwargs or {}))

    def load_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
        **schedulers: Any,
    ) -> dict[str, Any]:
        """Continue from :meth:`save_checkpoint`; the file may hold tensors and plain values only.

        What this engine has spent stays spent: with a ledger its charges count, whatever the checkpoint knows of; without
        one, steps that the engine took after, or beside, the checkpoint are kept.

        Args:
            path: file path or binary file object.
            module: model to load into, wrapped or bare.
            optimizer: the private optimizer to load into.
            module_load_dict_kwargs: for ``module.load_state_dict``.
            torch_load_kwargs: for ``torch.load``.
            **schedulers: ``noise_scheduler`` and ``grad_clip_scheduler`` of Opacus.

        Returns:
            The further entries of the checkpoint.

        Raises:
            ValueError: the checkpoint is damaged, or of other parameters, settings or another ledger; nothing was loaded.
        """
        self._refuse_several_processes()
        state: dict[str, Any] = torch.load(path, weights_only=True, **(torch_load_kwargs or {}))
        needed = tuple(f"{name}_state_dict" for name, scheduler in schedulers.items() if scheduler is not None)
        checkpoint.check(state, module, optimizer, self.accountant.mechanism(), self._account.settings, needed)
        self._account.check_checkpoint(state[checkpoint.LEDGER])
        self._account.check_terms(self._kept(state))
        for key in (checkpoint.DIGEST, checkpoint.LEDGER):
            del state[key]
        if optimizer is not None:
            optimizer.load_state_dict(state.pop("optimizer_state_dict"))
        module.load_state_dict(state.pop("module_state_dict"), **(module_load_dict_kwargs or {}))
        self._take_over(state)
        for name, scheduler in schedulers.items():
            if scheduler is not None:
                scheduler.load_state_dict(state.pop(f"{name}_state_dict"))
        return state

    @property
    def _ranks(self) -> Reducer:
        """The processes of the run."""
        return LOCAL if self._optimizer is None else self._optimizer.reducer

    def _write(self, state: dict[str, Any], path: Any, **torch_save_kwargs: Any) -> None:
        """Add the account to ``state`` and save it; of several processes rank 0 does so, which has the ledger."""
        stream = self._sampling_stream()
        state["privacy_accountant_state_dict"] = dict(self.accountant.state_dict())
        state["sampling_stream"] = {} if stream is None else stream.state_dict()
        state[checkpoint.ACCOUNT] = self._account.state_dict()
        state[checkpoint.SETTINGS] = self._account.settings
        state[checkpoint.LEDGER] = self._account.ledger_head
        state[checkpoint.NAME] = self._account.mark()
        state[checkpoint.DIGEST] = checkpoint.digest(state)
        checkpoint.write(state, path, **torch_save_kwargs)

    def _take_over(self, state: dict[str, Any]) -> None:
        """Continue account and seeded draws from what :meth:`_write` added, which is taken out; every rank has to call it."""
        terms, ranks = self._kept(state), self._ranks
        spent_before, name = state.pop("privacy_accountant_state_dict"), state.pop(checkpoint.NAME)
        state.pop(checkpoint.SETTINGS, None)
        state.pop(checkpoint.ACCOUNT, None)
        ranks.on_first(lambda: self._account.resume(spent_before, name, terms))
        self._account.join(ranks)
        stream, saved = self._sampling_stream(), state.pop("sampling_stream", {})
        if stream is not None:
            stream.load_state_dict(saved)

    @staticmethod
    def _kept(state: dict[str, Any]) -> Terms:
        """Return what holds for the charges of a checkpoint."""
        accountant = state["privacy_accountant_state_dict"]
        return kept_terms(accountant, state.get(checkpoint.ACCOUNT), state[checkpoint.SETTINGS])

    def _refuse_several_processes(self) -> None:
        if self._ranks.name != "local":
            raise ValueError(
                "a checkpoint of several processes is a folder that all of them write: use "
                "opacus_ac.checkpoint.save_checkpoint and load_checkpoint"
            )

    def _sampling_stream(self) -> RandomStream | None:
        sampler = None if self._loader is None else self._loader.batch_sampler
        return getattr(sampler, "stream", None)
