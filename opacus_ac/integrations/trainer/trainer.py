"""A transformers ``Trainer`` whose every step is one accounted private step."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy, TrainOutput

from opacus_ac.engine.parts import public_settings
from opacus_ac.engine.privacy_engine import PrivacyEngine
from opacus_ac.engine.report import PrivacyReport
from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.grad_sample.alone.isolated import is_coarse
from opacus_ac.integrations.public_rows import PrivateRows, same_rows_of_one
from opacus_ac.integrations.trainer import checkpoint as trainer_checkpoint
from opacus_ac.integrations.trainer.arguments import PrivacyArguments
from opacus_ac.integrations.trainer.callback import PrivacyCallback, RunComplete, release_values
from opacus_ac.integrations.trainer.checks import raise_for, refusals, refuse_bases, refused_evaluation
from opacus_ac.integrations.trainer.ranks import RanksTrainer, refused_processes
from opacus_ac.integrations.trainer.record_checks import check_some_records
from opacus_ac.integrations.trainer.released import ReleasedLog
from opacus_ac.integrations.trainer.silent import LOSS_KEYS, PRIVATE_KEYS
from opacus_ac.models.transformers import averages_tokens, use_record_loss
from opacus_ac.optimizer.loss_tape import LossTape
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.sampling.loader import LogicalBatches, PrivateDataLoader

PRIVACY_REPORT = "privacy_report.json"


def _items(dataset: Any) -> str:
    """Say what the items of a dataset are."""
    return "rows" if getattr(dataset, "max_rows_per_user", None) is None else "users"


class PrivateTrainer(RanksTrainer):
    """``transformers.Trainer`` with DP-Adam-AC: a Trainer step is one Poisson batch, one accounted release.

    The expected batch size is ``per_device_train_batch_size * gradient_accumulation_steps``, times the number of processes; the
    first factor alone is what reaches the model at a time, a memory choice. Steps, schedules, evaluation, checkpoints and
    callbacks are the Trainer's. Under ``torchrun`` every process has the whole model, and rank 0 writes.

    Args:
        model: a model, on which the loss is made a mean over records.
        args: ``TrainingArguments``; a copy of them is used.
        privacy: privacy settings.
        data_collator: as in ``Trainer``.
        train_dataset: the private records: one row is what is protected, or, of a ``UserDataset``, one user with all rows; batch
            sizes then count users.
        eval_dataset: public data; see ``PrivacyArguments.evaluation_is_public``.
        processing_class: as in ``Trainer``.
        noise_generator: seeded CPU generator for tests; the report then says that the run is not private.
        **kwargs: the other arguments of ``Trainer``.

    Attributes:
        engine: the :class:`PrivacyEngine`.
        private_optimizer: the private optimizer, from the first use of the training data on; None before.
        was_complete: whether :meth:`train` found nothing left to do.
        public_keys: names that a subclass may log in training because their values are public constants.

    Guarantees:
        Logs, progress bar, ``trainer_state.json``, event files and checkpoints hold releases and public constants only; the
        training loss among them is the noisy one. What else a subclass or a callback logs while training is refused. The seed of the ``TrainingArguments`` has no part in noise and draws.

    Raises:
        ValueError: settings that cannot be made private, all reasons in one message, before anything is changed.

    References:
        arXiv 2510.05288.
    """

    public_keys: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        refuse_bases(cls)

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        privacy: PrivacyArguments,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        noise_generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else copy.copy(args)
        options = {"data_collator": data_collator, **kwargs}
        parts = {"model": model, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
        self._rows = PrivateRows(train_dataset)
        found = refusals(args=args, privacy=privacy, options=options, rows=self._rows, **parts)
        raise_for(found + refused_processes(args, model), "this training")
        self.privacy = privacy
        self.expected_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.gradient_accumulation_steps = 1  # the physical batches of a step are taken inside training_step
        args.max_grad_norm = 0.0
        args.ignore_data_skip = True  # a resumed run draws new batches
        self.engine = PrivacyEngine(
            accountant=privacy.accountant, secure_mode=privacy.secure_mode, ledger=privacy.ledger
        )
        self.private_optimizer: AdaptiveClipDPOptimizer | None = None
        self._private_loader: PrivateDataLoader | None = None
        self._batches: LogicalBatches | None = None
        self._noise_generator = noise_generator
        self._saving_checkpoint = False
        self.was_complete = False
        self._unsealed: Path | None = None  # a checkpoint that lacks its privacy state
        self._independent = False
        super().__init__(args=args, processing_class=processing_class, **parts, **options)
        self._gate = ReleasedLog(self)
        self._shows = PrivacyCallback(self)
        self.add_callback(self._shows)

    # ---------------------------------------------------------------- making it private

    def _make_private(self) -> tuple[AdaptiveClipDPOptimizer, PrivateDataLoader]:
        """Return the private optimizer and loader; build them at the first call."""
        if self.private_optimizer is None or self._private_loader is None:
            template = self._template_loader()
            super().create_optimizer()
            self.model.train()
            options = self.privacy.engine_options()
            options.update(
                module=self.model,
                optimizer=self.optimizer,
                data_loader=template,
                max_physical_batch_size=self.args.per_device_train_batch_size,
                noise_generator=self._noise_generator,
                wrap_model=False,
                max_rows_per_user=getattr(self.train_dataset, "max_rows_per_user", None),
            )
            if self.privacy.noise_multiplier is not None:
                made = self.engine.make_private(noise_multiplier=self.privacy.noise_multiplier, **options)
            else:
                assert self.privacy.target_epsilon is not None
                made = self.engine.make_private_with_epsilon(
                    target_epsilon=self.privacy.target_epsilon,
                    target_delta=self.privacy.target_delta,
                    steps=self._planned_steps(),
                    **options,
                )
            self.private_optimizer, self._private_loader = made[1], made[2]
            self.optimizer = self.private_optimizer
        return self.private_optimizer, self._private_loader

    def _template_loader(self) -> DataLoader[Any]:
        """Return an ordinary loader of the training data, with the columns that the model takes."""
        if self.train_dataset is None:
            raise ValueError("training needs train_dataset=")
        dataset, collate = self.train_dataset, self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        self._collate = collate
        if self.privacy.dataset_size is None:
            warnings.warn(
                f"the number of {_items(dataset)}, N = {len(dataset)}, is published as part of the guarantee: set a public dataset_size "
                "in the PrivacyArguments if it is not to be",
                stacklevel=2,
            )
        return DataLoader(
            dataset,
            batch_size=self.expected_batch_size,
            shuffle=True,
            collate_fn=collate,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )

    def _planned_steps(self) -> int:
        """Return the number of steps of the whole run, from public constants."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        records = self.privacy.dataset_size or len(self.train_dataset)
        return math.ceil(self.args.num_train_epochs * math.ceil(records / self.expected_batch_size))

    def create_optimizer(self, model: Any = None) -> Any:
        """Return the private optimizer around the one that the arguments describe."""
        self._make_private()
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Return the private draws: an item is a logical batch, which :meth:`training_step` takes."""
        loader = self._make_private()[1]
        if self._batches is None:
            self._batches = LogicalBatches(loader)  # one, which ends the pass of a run that an error ended
        return self._batches

    def num_examples(self, dataloader: Any) -> int:
        """Return the public N for the training data, as in ``Trainer`` for others."""
        if isinstance(dataloader, LogicalBatches):
            return dataloader.loader.plan.sizes.dataset_size
        return int(super().num_examples(dataloader))

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the expected size of a logical batch."""
        return self.expected_batch_size

    # ---------------------------------------------------------------- the step

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Train as ``Trainer.train`` does; stop, saved, before a step that would exceed the budget.

        Resuming a run that has taken all of its steps takes none, charges nothing, and warns.

        Returns:
            ``training_loss`` is the mean of the noisy losses, NaN when none is released.

        Raises:
            ValueError: a checkpoint without privacy state, damaged, or of other settings; nothing was loaded.
            PrivacyBudgetExceeded: not one step fits into the budget.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # token ids need no gradient
            try:
                return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            except RunComplete:
                return self._nothing_left()
            except PrivacyBudgetExceeded as reason:
                if self.state.global_step == self._initial_global_step:
                    raise
                return self._stop(reason)
            finally:
                self._gate.close()

    def _nothing_left(self) -> TrainOutput:
        """End a resumed run that was complete: weights and account are those of the checkpoint, and nothing was charged."""
        self.was_complete = True
        step = self.state.global_step
        warnings.warn(
            f"the run is complete: its {self.state.max_steps} steps were taken before the checkpoint of step {step}, so nothing was "
            "done and nothing charged. To train on, start a run of its own from the saved weights",
            stacklevel=4,
        )
        self._shows.close()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(step, math.nan, {})

    def _stop(self, reason: PrivacyBudgetExceeded) -> TrainOutput:
        """End the run after its last step that was taken."""
        warnings.warn(f"stopped after step {self.state.global_step}: {reason}", stacklevel=4)
        self._make_private()[0].zero_grad()
        self.control.should_log, self.control.should_evaluate = True, False
        self.control.should_save = self.args.save_strategy != SaveStrategy.NO
        started = time.time()
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model, None, self.state.epoch, None, started, self._get_learning_rate()
        )
        self.control.should_training_stop = True
        return self._finalize_training(None, 0, started)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Take the forward and backward passes of a logical batch; the Trainer then steps the optimizer.

        Returns:
            Zero, because the noisy loss is known after the optimizer's step, and added then.
        """
        optimizer, _ = self._make_private()
        self._check_independence(model, optimizer)
        model.train()
        for batch, last in inputs:
            optimizer.zero_grad()
            optimizer.tape.take()  # losses that an interrupted step left behind
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(batch))
            self._check_loss(optimizer)
            self.accelerator.backward(loss)
            if not last:
                optimizer.step()
        return torch.zeros((), device=self.args.device)

    def _check_independence(self, model: nn.Module, optimizer: AdaptiveClipDPOptimizer) -> None:
        """Refuse, before the first step, a loss or model that couples the records of a batch."""
        loader = self._make_private()[1]
        if self._independent or len(loader.dataset) < 2:  # type: ignore[arg-type]
            return
        # Lower precision rounds a loss by more than records that couple may change it; a frozen base may be in it, too.
        lower = self.args.bf16 or torch.get_float32_matmul_precision() != "highest" or is_coarse(model, ())
        tolerances = {"rtol": 2e-2, "floor": 2e-2} if lower else {}
        model.eval()
        self._gate.checking = True
        try:
            with self.compute_loss_context_manager():
                check_some_records(
                    lambda batch: self.compute_loss(model, self._prepare_inputs(batch)),
                    loader.dataset,
                    self._collate,
                    loader.users,
                    **tolerances,
                )
        except AssertionError:  # its message has losses of records
            raise ValueError(
                f"{type(model).__name__} cannot be made private: its loss of a batch is not the mean of the losses of its "
                "records alone. The loss or the model couples records, so clipping would not bound what one of them does: "
                "make the loss a mean over records (see opacus_ac.testing.check_records_independent)"
            ) from None
        finally:
            self._gate.checking = False
            optimizer.tape.take()
        self._independent = True

    def _check_loss(self, optimizer: AdaptiveClipDPOptimizer) -> None:
        """Refuse a loss that did not come from the model's loss per record, where it has one."""
        losses = optimizer.tape.take()
        if losses is not None:
            optimizer.record_losses(losses)
        elif averages_tokens(self.model) or self.privacy.loss_bound is not None:
            raise ValueError(
                f"compute_loss of {type(self).__name__} bypassed the model's loss per record: call the model with labels and "
                "return its .loss, or give a loss per record [B] to private_optimizer.record_losses and return its mean"
            )

    # ---------------------------------------------------------------- evaluation, logs

    def ema_weights(self) -> Any:
        """Return a context in which the model has the averaged weights, if they are wanted and there are any."""
        if self.private_optimizer is None or not self.privacy.average_weights:
            return nullcontext()
        return self.private_optimizer.ema_weights()

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on public data, with the averaged weights.

        Raises:
            ValueError: the data were not declared public, or have rows of the training data.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):  # a name of one of them
            data = self.eval_dataset[data]  # type: ignore[index]
        self._check_public(data, "evaluation")
        with self._gate.evaluating():
            return dict(super().evaluate(eval_dataset, *args, **kwargs))

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict on public data, with the averaged weights; refuses what :meth:`evaluate` refuses."""
        self._check_public(test_dataset, "prediction")
        with self._gate.evaluating():
            return super().predict(test_dataset, *args, **kwargs)

    def _check_public(self, data: Any, what: str) -> None:
        if self._rows.dataset is not self.train_dataset:
            self._rows = PrivateRows(self.train_dataset)
        raise_for(refused_evaluation(self.privacy, self._rows, data), what)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate: the loss is the mean over records, before and after training.

        Raises:
            ValueError: the loader is one of the training data.
        """
        data = getattr(getattr(dataloader, "loader", dataloader), "dataset", None)
        if data is not None and same_rows_of_one(data, self.train_dataset):
            self._check_public(self.train_dataset, "evaluation")
        undo = None
        if self.private_optimizer is None:
            self.share_weights()
            undo = use_record_loss(self.model, LossTape())
        try:
            with self.ema_weights():
                return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            if undo is not None:
                undo()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what is public: the values of the last release join the training log, those of the Trainer's own leave it.

        Raises:
            ValueError: a value that is no release, no public constant, and not of an evaluation.
        """
        if self._gate.checking:
            return
        for key in PRIVATE_KEYS if self.privacy.loss_bound is not None else PRIVATE_KEYS + LOSS_KEYS:
            logs.pop(key, None)
        if self.private_optimizer is not None and "learning_rate" in logs:
            self._gate.values = release_values(self.private_optimizer.released, self.get_epsilon())
            logs.update(self._gate.values)
        super().log(logs, None)

    def save_state(self) -> None:
        """Save ``trainer_state.json``, once all of its log is known to be public."""
        self._gate.look(whole=True)
        super().save_state()

    def _finalize_training(self, *args: Any) -> TrainOutput:
        self._shows.close()
        output = super()._finalize_training(*args)
        loss = output.training_loss if self.privacy.loss_bound is not None else math.nan
        return TrainOutput(output.global_step, loss, output.metrics)

    def get_epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon spent so far, at ``delta`` or the target's."""
        return self.engine.get_epsilon(self.privacy.target_delta if delta is None else delta)

    def privacy_report(self, delta: float | None = None) -> PrivacyReport:
        """Return the privacy statement of the run so far, at ``delta`` or the target's."""
        return self.engine.privacy_report(self.privacy.target_delta if delta is None else delta)

    # ---------------------------------------------------------------- saving, resuming

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the averaged weights, and beside them the privacy report; a checkpoint has the weights as they are."""
        with nullcontext() if self._saving_checkpoint else self.ema_weights():
            super().save_model(output_dir, _internal_call)
        if self.private_optimizer is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            (folder / PRIVACY_REPORT).write_text(self.privacy_report().to_json(), encoding="utf-8")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, and last what proves that all of its files belong together."""
        self._gate.look(whole=True)
        self._saving_checkpoint = True
        try:
            with trainer_checkpoint.sealing(self.state, self._seal, writes=self.args.should_save):
                super()._save_checkpoint(*args, **kwargs)
        finally:
            self._saving_checkpoint = False
        self.engine.reducer.on_first(lambda: None)  # no rank reads the folder before it is whole

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimizer, whose state has C, window and averages, and know that this folder is to be resumed from."""
        super()._save_optimizer_and_scheduler(output_dir)
        self._unsealed = Path(output_dir)

    def _seal(self) -> None:
        folder, self._unsealed = self._unsealed, None
        if folder is not None:
            trainer_checkpoint.save(self.engine, folder, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights, once the whole folder has been found to be one checkpoint of this run."""
        optimizer, loader = self._make_private()
        settings = public_settings(optimizer, loader.plan)
        trainer_checkpoint.verify(self.engine, Path(resume_from_checkpoint), settings)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        noise = self._make_private()[0].mechanism.stream
        own = noise.state_dict()
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.world_size > 1:
            noise.load_state_dict(own)  # a seeded stream: that of the checkpoint is rank 0's, and no two may be alike
        trainer_checkpoint.load(self.engine, Path(checkpoint))
