"""Budget, report and checkpoints of ``PrivacyEngine``."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import opacus
from opacus.accountants import IAccountant
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from opacus_ac import accounting
from opacus_ac.accounting import FALSE_POSITIVE_RATES, AttackBounds, Event
from opacus_ac.accounting.opacus_accountants import checked
from opacus_ac.budget.account import Account
from opacus_ac.checkpoint import many_processes, one_process
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
        accountant: str | None = None,
        secure_mode: bool = False,
        ledger: str | os.PathLike[str] | None = None,
    ) -> None:
        accounting.register()
        with warnings.catch_warnings():
            # Opacus warns about torch's generator, which is not used here.
            warnings.filterwarnings("ignore", message="Secure RNG turned off")
            super().__init__(accountant=accountant or "vpld", secure_mode=False)
        self._chosen = accountant is not None
        self.accountant: IAccountant = checked(self.accountant)
        self.secure_mode = secure_mode  # Opacus's own would need torchcsprng, which cannot be installed
        self._account = Account(self.accountant, ledger)
        approximation = self._account.accountant.approximation
        if approximation is not None:
            warnings.warn(
                f"{approximation}: epsilon is reported as infinity. "
                'Use accountant="vpld" (the default), "vrdp" or "prv"',
                NotPrivateWarning,
                stacklevel=2,
            )
        self._optimizer: AdaptiveClipDPOptimizer | None = None
        self._loader: PrivateDataLoader | None = None
        self._undo: list[tuple[nn.Module, Callable[[], None]]] = []
        self._unknown_batches = 0

    # ---------------------------------------------------------------- budget

    def get_epsilon(self, delta: float) -> float:
        """Return the epsilon spent so far at ``delta``; infinity when no bound holds.

        It is never below that of :meth:`privacy_report`, and counts what other processes have added to the ledger.
        Where rates or noise may have followed from releases it is that of the privacy filter's whole budget.

        Raises:
            ValueError: If ``delta`` is negative.
            LedgerError: If the ledger is damaged.
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
            ValueError: If there is no target; use :meth:`make_private_with_epsilon`.
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
                distribution, which takes up to some seconds to compute, and what any attacker can do. False states the
                accountant's epsilon alone.

        Raises:
            ValueError: If nothing was made private yet, or ``delta`` is missing.
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
            attacks=self.attack_bounds() if tight else None,
            delta=delta,
            adjacency=account.adjacency(plan.sampling),
            history=account.history,
            notes=account.notes(delta, self._next_event()),
            unknown_batches=self._unknown_batches,
            ledger=None if account.ledger is None else account.ledger.summary,
        )

    def attack_bounds(self, rates: Sequence[float] = FALSE_POSITIVE_RATES) -> AttackBounds:
        """Return what any attacker can do against what was spent so far, at false-positive rates."""
        return self._account.attacks(rates)

    def accounts_for(self, optimizer: DPOptimizer | None) -> bool:
        """Return whether this engine accounts for an optimizer: for the one that it made private last."""
        return optimizer is not None and optimizer is self._optimizer

    # ---------------------------------------------------------------- taking hooks off

    def detach(self, model: nn.Module) -> nn.Module:
        """Remove every hook from ``model`` and return the bare model; its weights stay.

        Raises:
            ValueError: If this engine did not make the model private.
        """
        bare = getattr(model, "_module", model) if isinstance(model, AbstractGradSampleModule) else model
        for i, (module, undo) in enumerate(self._undo):
            if module is bare:
                undo()
                del self._undo[i]
                return module
        raise ValueError("this engine has no hooks on that model")

    # ---------------------------------------------------------------- checkpoints

    @property
    def reducer(self) -> Reducer:
        """The processes of the run; one before ``make_private``."""
        return LOCAL if self._optimizer is None else self._optimizer.reducer

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: DPOptimizer | None = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
        folder: bool = False,
        **schedulers: Any,
    ) -> None:
        """Save model, optimizer (with C, window, EMA, learning-rate multiplier, step), accountant and ledger's head.

        One process writes a file, which is replaced atomically and has a digest of its content. Several processes
        write a folder together: every rank calls this, between two steps. Any number of processes can continue from a
        folder.

        Args:
            path: file path, or a binary file object; for a folder a new path on a file system that all ranks see.
            module: model, wrapped or bare.
            optimizer: the private optimizer. A folder needs it.
            checkpoint_dict: further entries to save; not for a folder.
            module_state_dict_kwargs: for ``module.state_dict``; not for a folder.
            torch_save_kwargs: for ``torch.save``; not for a folder.
            folder: write a folder with one process too.
            **schedulers: ``noise_scheduler`` and ``grad_clip_scheduler`` of Opacus; not for a folder.

        Guarantees:
            Secret noise and sampling streams are never saved; in a folder also no seeded ones.

        Raises:
            ValueError: If the folder exists, or an argument is not for folders; on every rank.
        """
        options = {
            "checkpoint_dict": checkpoint_dict,
            "module_state_dict_kwargs": module_state_dict_kwargs,
            "torch_save_kwargs": torch_save_kwargs,
        }
        if folder or self.reducer.name != "local":
            made = self._run_of_folder(path, optimizer, {**options, **schedulers})
            many_processes.save(path, self._account, module, made)
            return
        one_process.save(
            path,
            self._account,
            self._sampling_stream(),
            module,
            optimizer,
            entries=checkpoint_dict or {},
            schedulers=_given(schedulers),
            module_options=module_state_dict_kwargs or {},
            save_options=torch_save_kwargs or {},
        )

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
        """Continue from :meth:`save_checkpoint`; a file may hold tensors and plain values only.

        What this engine has spent stays spent. With a ledger, the charges of the ledger count, whatever the checkpoint
        knows of. Without one, steps that the engine took after or beside the checkpoint are kept. Several processes
        continue from a folder only, and every rank calls this.

        Args:
            path: file path, binary file object, or folder. A folder must come from a trusted place: reading it can run
                code.
            module: model to load into, wrapped or bare.
            optimizer: the private optimizer to load into. A folder needs it.
            module_load_dict_kwargs: for ``module.load_state_dict``; not for a folder.
            torch_load_kwargs: for ``torch.load``; not for a folder.
            **schedulers: ``noise_scheduler`` and ``grad_clip_scheduler`` of Opacus; not for a folder.

        Returns:
            The further entries of the checkpoint.

        Raises:
            ValueError: If the checkpoint is damaged, or of other parameters, settings or another ledger; nothing was
                loaded.
            LedgerError: If the ledger does not contain what the checkpoint says it does.
        """
        if self.reducer.name != "local" or (isinstance(path, str | os.PathLike) and os.path.isdir(path)):
            options = {"module_load_dict_kwargs": module_load_dict_kwargs, "torch_load_kwargs": torch_load_kwargs}
            made = self._run_of_folder(path, optimizer, {**options, **schedulers})
            many_processes.load(path, self._account, module, made)
            return {}
        return one_process.load(
            path,
            self._account,
            self._sampling_stream(),
            module,
            optimizer,
            schedulers=_given(schedulers),
            module_options=module_load_dict_kwargs or {},
            load_options=torch_load_kwargs or {},
        )

    def _run_of_folder(
        self, path: Any, optimizer: DPOptimizer | None, options: Mapping[str, Any]
    ) -> AdaptiveClipDPOptimizer:
        """Return the private optimizer of a run that a folder can hold.

        Raises:
            ValueError: If ``path`` names no folder, an option is for files only, or the optimizer is not this engine's.
        """
        if not isinstance(path, str | os.PathLike):
            raise ValueError(f"a checkpoint of several processes is a folder: path must name one, got {path!r}")
        given = sorted(_given(options))
        if given:
            raise ValueError(
                f"a checkpoint in a folder has no place for {', '.join(given)}: leave it out, or save with one "
                "process and without folder=True"
            )
        if not isinstance(optimizer, AdaptiveClipDPOptimizer) or not self.accounts_for(optimizer):
            raise ValueError(
                "the optimizer is not the one that this engine made private last: pass model and optimizer of one "
                "make_private"
            )
        return optimizer

    def save_account(self, path: str | os.PathLike[str], **entries: Any) -> None:
        """Save the account alone, for a program that saves model and optimizer itself.

        Every rank calls this, and rank 0 writes.

        Args:
            path: path of the file.
            **entries: plain values that come under the digest of the file.
        """
        stream = self._sampling_stream()
        self.reducer.on_first(lambda: one_process.save_account(path, self._account, stream, entries))

    def read_account(self, path: str | os.PathLike[str], *needed: str) -> dict[str, Any]:
        """Return what :meth:`save_account` wrote, as this rank reads it; nothing is taken over.

        Args:
            path: path of the file.
            *needed: further entries that must be there.

        Raises:
            ValueError: If the file is damaged, has no such entries, or is of another kind of accountant.
        """
        return one_process.read_account(path, self._account, *needed, map_location="cpu")

    def check_account(self, state: Mapping[str, Any]) -> None:
        """Raise, on every rank, unless :meth:`load_account` would take over what :meth:`read_account` returned.

        Raises:
            ValueError: If it is of another ledger, or protects something else than this engine's charges.
            LedgerError: If the ledger does not contain what the file says it does.
        """
        self.reducer.on_first(lambda: one_process.check_account(state, self._account))

    def load_account(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`read_account` returned. Every rank calls this.

        What this engine has spent stays spent.
        """
        one_process.load_account(dict(state), self._account, self.reducer, self._sampling_stream())

    def _sampling_stream(self) -> RandomStream | None:
        sampler = None if self._loader is None else self._loader.batch_sampler
        return getattr(sampler, "stream", None)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
