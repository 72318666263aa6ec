"""A transformers ``Trainer`` that trains with differential privacy and counts the cost of every step."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy, TrainOutput

from opacus_ac.errors import PrivacyBudgetExceeded
from opacus_ac.grad_sample.alone.isolated import is_coarse
from opacus_ac.integrations.public_rows import PrivateRows, same_rows_of_one
from opacus_ac.integrations.trainer.arguments import PrivacyArguments
from opacus_ac.integrations.trainer.callback import PrivacyCallback, RunComplete, release_values
from opacus_ac.integrations.trainer.checks import raise_for, refusals, refuse_bases, refused_evaluation
from opacus_ac.integrations.trainer.ranks import refused_processes
from opacus_ac.integrations.trainer.record_checks import check_some_records
from opacus_ac.integrations.trainer.released import ReleasedLog
from opacus_ac.integrations.trainer.saving import SavingTrainer
from opacus_ac.integrations.trainer.showing import show_released
from opacus_ac.integrations.trainer.silent import LOSS_KEYS, PRIVATE_KEYS
from opacus_ac.integrations.trainer.smoothing import RecordSmoother
from opacus_ac.models.transformers import averages_tokens, use_record_loss
from opacus_ac.optimizer.loss_tape import LossTape
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer


class PrivateTrainer(SavingTrainer):
    """``transformers.Trainer`` with differential privacy, by the method DP-Adam-AC.

    Each optimizer step draws a random batch (Poisson sampling), clips the gradient of every record in it, adds noise
    to the sum of the clipped gradients, and charges the cost of the step to the privacy budget.

    The expected batch size is ``per_device_train_batch_size * gradient_accumulation_steps``, times the number of
    processes. The first factor is the number of records that reach the model at a time: it changes the memory that a
    step needs, not its result. Schedules, evaluation, checkpoints and callbacks are those of ``Trainer``. Under
    ``torchrun`` every process holds the whole model, and rank 0 writes the files.

    Args:
        model: the model to train. Its loss is replaced by a mean over records, where it was a mean over tokens.
        args: ``TrainingArguments``; a copy of them is used.
        privacy: privacy settings.
        data_collator: as in ``Trainer``.
        train_dataset: the private data. One row is one record, and is protected. Of a ``UserDataset`` one user with all
            of the user's rows is one record, and batch sizes count users.
        eval_dataset: public data; see ``PrivacyArguments.evaluation_is_public``.
        processing_class: as in ``Trainer``.
        noise_generator: seeded CPU generator for tests. The privacy report then says that the run is not private.
        **kwargs: the other arguments of ``Trainer``.

    Attributes:
        engine: the :class:`PrivacyEngine` that accounts for the run.
        private_optimizer: the private optimizer; None before the first use of the training data.
        data_files: files that the training data come from, by which other runs on them are recognised; by default the
            rows themselves.
        was_complete: whether :meth:`train` found no step left to take.
        public_keys: names that a subclass may log during training because their values are public constants.

    Guarantees:
        Logs, progress bar, ``trainer_state.json``, event files and checkpoints hold released values and public
        constants only. The training loss among them has noise. Anything else that a subclass or a callback logs during
        training is refused. The seed of the ``TrainingArguments`` decides neither the noise nor the batches.

    Raises:
        ValueError: If the settings cannot be made private. The message lists all reasons, and nothing was changed.

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
        self.was_complete = False
        self._independent = False
        self.local_files = {}
        self.data_files: list[Path] = []
        super().__init__(
            args=args,
            privacy=privacy,
            noise_generator=noise_generator,
            processing_class=processing_class,
            **parts,
            **options,
        )
        if self.label_smoother is not None:
            self.label_smoother = RecordSmoother(self, self.args.label_smoothing_factor)
        self._gate = ReleasedLog(self)
        self.running_loss = show_released(self.callback_handler.callbacks)
        self._shows = PrivacyCallback(self)
        self.add_callback(self._shows)

    # ---------------------------------------------------------------- the step

    def train(
        self, resume_from_checkpoint: Any = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> TrainOutput:
        """Train as ``Trainer.train`` does, and stop before a step that would exceed the privacy budget.

        A run that stops early is saved like one that ends. Resuming a run that has taken all of its steps warns, takes
        no step and charges nothing.

        Returns:
            What ``Trainer.train`` returns. ``training_loss`` is the mean of the noisy losses; it is NaN when no loss is
            released.

        Raises:
            ValueError: If the checkpoint has no privacy state, is damaged, or is of a run with other settings. Nothing
                was loaded.
            PrivacyBudgetExceeded: If not even one step fits into the budget.
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
        """End a resumed run that was complete. Weights and account are those of the checkpoint; nothing was charged."""
        self.was_complete = True
        step = self.state.global_step
        warnings.warn(
            f"the run is already complete: its {self.state.max_steps} steps were taken before the checkpoint of step "
            f"{step}, so nothing was done or charged. To train on, start a run of its own from the saved weights",
            stacklevel=4,
        )
        self._shows.close()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(step, math.nan, {})

    def _stop(self, reason: PrivacyBudgetExceeded) -> TrainOutput:
        """Log, save and end the run after the last step that was taken."""
        warnings.warn(f"stopped after step {self.state.global_step}: {reason}", stacklevel=4)
        self._make_private()[0].zero_grad()
        self._shows.show_epsilon()
        self.control.should_log, self.control.should_evaluate = True, False
        self.control.should_save = self.args.save_strategy != SaveStrategy.NO
        started = time.time()
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model, None, self.state.epoch, None, started, self._get_learning_rate()
        )
        self.control.should_training_stop = True
        return self._finalize_training(None, 0, started)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run the forward and backward passes of a logical batch; the Trainer steps the optimizer afterwards.

        Args:
            model: the model.
            inputs: a logical batch from :meth:`get_train_dataloader`.
            num_items_in_batch: ignored, because a number of tokens would couple the records of the batch.

        Returns:
            Zero. The noisy loss is known only after the optimizer's step, and is added to the log then.

        Raises:
            ValueError: If the loss of a batch is not the mean of the losses of its records.
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
        """Before the first step, refuse a loss or a model that couples the records of a batch."""
        loader = self._make_private()[1]
        if self._independent or len(loader.dataset) < 2:  # type: ignore[arg-type]
            return
        # In lower precision, rounding may change a loss by more than another record does. A frozen base counts, too.
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
        except AssertionError:  # Its message contains losses of private records, so it is not passed on.
            raise ValueError(
                f"{type(model).__name__} cannot be made private: its loss of a batch is not the mean of the losses of "
                "its records alone. The loss or the model couples records, so clipping would not bound what one of "
                "them does: make the loss a mean over records (see opacus_ac.testing.check_records_independent). If "
                'padding counts in a loss, as in question answering, pad all rows to one length (padding="max_length")'
            ) from None
        finally:
            self._gate.checking = False
            optimizer.tape.take()
        self._independent = True

    def _check_loss(self, optimizer: AdaptiveClipDPOptimizer) -> None:
        """Refuse a loss that bypassed the model's loss per record, where the model has one."""
        losses = optimizer.tape.take()
        if losses is not None:
            optimizer.record_losses(losses)
        elif averages_tokens(self.model) or self.privacy.loss_bound is not None:
            raise ValueError(
                f"compute_loss of {type(self).__name__} bypassed the model's loss per record: call the model with "
                "labels and return its .loss, or give a loss per record [B] to private_optimizer.record_losses and "
                "return its mean"
            )

    # ---------------------------------------------------------------- evaluation, logs

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on public data, with the weights that are saved.

        Raises:
            ValueError: If the data were not declared public, or contain rows of the training data.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):  # the name of one of several datasets
            data = self.eval_dataset[data]  # type: ignore[index]
        self._check_public(data, "evaluation")
        with self._gate.evaluating():
            return dict(super().evaluate(eval_dataset, *args, **kwargs))

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict on public data, with the weights that are saved.

        Raises:
            ValueError: If :meth:`evaluate` would refuse the data.
        """
        self._check_public(test_dataset, "prediction")
        with self._gate.evaluating():
            return super().predict(test_dataset, *args, **kwargs)

    def _check_public(self, data: Any, what: str) -> None:
        if self._rows.dataset is not self.train_dataset:
            self._rows = PrivateRows(self.train_dataset)
        raise_for(refused_evaluation(self.privacy, self._rows, data), what)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with a loss that is the mean over records, before training as well as after it.

        Raises:
            ValueError: If the loader hands out the training data.
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
        """Log public values only.

        Values of the Trainer that have no noise are left out of the training log, and the values of the last release
        are added to it.

        Raises:
            ValueError: If another value is neither released, nor a public constant, nor from an evaluation.
        """
        if self._gate.checking:
            return
        for key in PRIVATE_KEYS if self.privacy.loss_bound is not None else PRIVATE_KEYS + LOSS_KEYS:
            logs.pop(key, None)
        if self.private_optimizer is not None and "learning_rate" in logs:
            self._gate.values = release_values(self.private_optimizer, self.get_epsilon())
            logs.update(self._gate.values)
        super().log(logs, None)

    def _finalize_training(self, *args: Any) -> TrainOutput:
        self._shows.close()
        output = super()._finalize_training(*args)
        loss = output.training_loss if self.privacy.loss_bound is not None else math.nan
        return TrainOutput(output.global_step, loss, output.metrics)
