"""A ``Trainer`` whose optimizer and data loader are made private when they are first used."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from opacus_ac.budget.advice import weak_promise
from opacus_ac.engine.privacy_engine import PrivacyEngine
from opacus_ac.engine.report import PrivacyReport
from opacus_ac.errors import WeakPrivacyWarning
from opacus_ac.integrations.trainer.arguments import PrivacyArguments
from opacus_ac.integrations.trainer.inner import auto_adam, with_planned_momentum
from opacus_ac.integrations.trainer.ranks import RanksTrainer
from opacus_ac.models.transformers import classes_among
from opacus_ac.optimizer.ema import average_is_better
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.sampling.loader import LogicalBatches, PrivateDataLoader


def _items(dataset: Any) -> str:
    """Say what the items of a dataset are."""
    return "rows" if getattr(dataset, "max_rows_per_user", None) is None else "users"


class PreparedTrainer(RanksTrainer):
    """A Trainer that draws random batches and steps a private optimizer.

    The privacy engine makes both from the ``PrivacyArguments``, at the first use of the optimizer or the training data.

    Args:
        args: ``TrainingArguments``. They are changed, because the engine accumulates and clips gradients itself.
        privacy: privacy settings.
        noise_generator: seeded CPU generator for tests, or None.
        **kwargs: the other arguments of ``Trainer``.
    """

    def __init__(
        self,
        *,
        args: TrainingArguments,
        privacy: PrivacyArguments,
        noise_generator: torch.Generator | None,
        **kwargs: Any,
    ) -> None:
        self.privacy = privacy
        self.expected_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        args.gradient_accumulation_steps = 1  # training_step takes all physical batches of a step
        args.max_grad_norm = 0.0
        args.ignore_data_skip = True  # a resumed run draws new batches
        self.engine = PrivacyEngine(
            accountant=privacy.accountant, secure_mode=privacy.secure_mode, ledger=privacy.ledger
        )
        self.private_optimizer: AdaptiveClipDPOptimizer | None = None
        self._private_loader: PrivateDataLoader | None = None
        self._batches: LogicalBatches | None = None
        self._noise_generator = noise_generator
        super().__init__(args=args, **kwargs)

    def _make_private(self) -> tuple[AdaptiveClipDPOptimizer, PrivateDataLoader]:
        """Return the private optimizer and loader; the first call builds them."""
        if self.private_optimizer is None or self._private_loader is None:
            template = self._template_loader()
            self._create_inner()
            self.model.train()
            options = self.privacy.engine_options(self._classes())
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
                records = self.privacy.dataset_size or len(self.train_dataset)
                for line in weak_promise(None, self.privacy.target_delta, records):
                    warnings.warn(line, WeakPrivacyWarning, stacklevel=2)
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

    def _classes(self) -> int | None:
        """Return the number of classes among which the model chooses, for the default loss bound; None for words."""
        return classes_among(self.model)

    def _create_inner(self) -> None:
        """Build the optimizer that the private one wraps, unless the caller has given one."""
        if self.privacy.auto_learning_rate and self.optimizer is None:
            self.optimizer = auto_adam(self, self._planned_steps())
            return
        given, self.args = self.args, with_planned_momentum(self.args, self.privacy, self._planned_steps())
        try:
            super().create_optimizer()
        finally:
            self.args = given

    def _template_loader(self) -> DataLoader[Any]:
        """Return an ordinary loader of the training data, with the columns that the model accepts."""
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
                f"the number of {_items(dataset)}, N = {len(dataset)}, is published as part of the guarantee: set a "
                "public dataset_size in the PrivacyArguments if it must stay secret",
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
        """Return the private optimizer. It wraps the optimizer that the ``TrainingArguments`` describe."""
        self._make_private()
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """Return the loader of random batches. Each item is a logical batch, for :meth:`training_step`."""
        loader = self._make_private()[1]
        if self._batches is None:
            self._batches = LogicalBatches(loader)  # only one: it ends the pass that an error interrupted
        return self._batches

    def num_examples(self, dataloader: Any) -> int:
        """Return the public N for the training data, and what ``Trainer`` returns for other data."""
        if isinstance(dataloader, LogicalBatches):
            return dataloader.loader.plan.sizes.dataset_size
        return int(super().num_examples(dataloader))

    def get_total_train_batch_size(self, args: Any) -> int:
        """Return the expected size of a logical batch."""
        return self.expected_batch_size

    # ---------------------------------------------------------------- averaged weights, epsilon, report

    def ema_weights(self) -> Any:
        """Return a context in which the model has the weights that are evaluated and saved.

        They are the averaged weights (EMA) where :attr:`saves_average` holds, and the last ones otherwise.
        """
        if self.private_optimizer is None or not self.saves_average:
            return nullcontext()
        return self.private_optimizer.ema_weights()

    @property
    def saves_average(self) -> bool:
        """Whether the averaged weights are evaluated and saved, by ``PrivacyArguments.average_weights``."""
        wanted = self.privacy.average_weights
        if self.private_optimizer is None or self.private_optimizer.ema is None:
            return False
        return average_is_better(self._planned_steps()) if wanted is None else wanted

    def get_epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon spent so far, at ``delta``; by default at the target delta."""
        return self.engine.get_epsilon(self.privacy.target_delta if delta is None else delta)

    def privacy_report(self, delta: float | None = None) -> PrivacyReport:
        """Return the privacy statement of the run so far, at ``delta``; by default at the target delta."""
        return self.engine.privacy_report(self.privacy.target_delta if delta is None else delta)
