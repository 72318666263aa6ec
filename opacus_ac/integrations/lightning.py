"""A Lightning callback for private training: refuses unsafe settings, logs releases, and saves the account."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import lightning
import torch
from torch import nn

from opacus_ac.engine.privacy_engine import PrivacyEngine
from opacus_ac.integrations.lightning_released import ReleasedOnly
from opacus_ac.integrations.public_rows import PrivateRows
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.sampling.loader import LogicalBatches, PrivateDataLoader

_PREFIX = "privacy/"

# Callbacks of Lightning that cannot be made private, by name. The reasons hold for subclasses, too.
_CALLBACKS = {
    "LearningRateFinder": (
        "it chooses and publishes a learning rate by losses of private batches without noise, and resets the weights "
        "afterwards: choose the rate on public data, or by whole private runs with one ledger="
    ),
    "BatchSizeFinder": (
        "its trials take private steps, and it resets the weights afterwards: choose the batch_size of the loader"
    ),
    "GradientAccumulationScheduler": (
        "several draws would go into one charged step: choose the batch_size of the loader (or batch_size_schedule= in "
        "make_private)"
    ),
    "SpikeDetection": "it skips batches by losses without noise: leave it out, as gradients are clipped per record",
}


class PrivacyCallback(lightning.Callback):
    """Makes a ``lightning.Trainer`` train with differential privacy, with automatic optimization.

    Pass the loader that ``make_private`` returned to the Trainer, and return its optimizer from
    ``configure_optimizers``. The callback logs the released values of every step (``privacy/epsilon``,
    ``privacy/noisy_loss``, ...) to all loggers. It writes the Privacy tab into the files of a ``TensorBoardLogger``,
    and the privacy account into Lightning's checkpoints.

    Args:
        engine: the engine that made the model private.
        optimizer: the private optimizer.
        loader: the private loader.
        delta: delta at which epsilon is reported; by default the target delta.
        public_keys: names that training hooks may log because, by your word, their values are public constants.

    Guarantees:
        The callback writes released values and public constants only. Any other value that a training hook logs is
        refused before a logger sees it, because values of private batches have no noise. This holds for ``self.log`` in
        any form, loggers, their ``experiment``, ``trainer.callback_metrics`` and the progress bar. Learning rates,
        counters of steps and epochs, and values that validation hooks log, pass.

    Raises:
        ValueError: If there is no delta. When training starts: if settings of the Trainer break the private step (the
            message lists all of them). When a checkpoint is loaded: if it has no privacy account.
    """

    def __init__(
        self,
        engine: PrivacyEngine,
        optimizer: AdaptiveClipDPOptimizer,
        loader: PrivateDataLoader,
        *,
        delta: float | None = None,
        public_keys: Iterable[str] = (),
    ) -> None:
        if delta is None and engine.target_budget is None:
            raise ValueError("PrivacyCallback needs delta=... when no target was set (make_private without epsilon)")
        self.engine, self.optimizer, self.loader = engine, optimizer, loader
        self.delta: float = engine.target_budget[1] if delta is None and engine.target_budget else float(delta or 0)
        self.public_keys = tuple(public_keys)
        self._dashboards: list[Any] = []
        self._step = 0
        self._gate: ReleasedOnly | None = None
        self._rows = PrivateRows(loader.dataset)

    # ---------------------------------------------------------------- refusals

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse callbacks that train by themselves. From here to the end of the fit, only releases get logged."""
        if stage != "fit":
            return
        _raise_for([(True, f"{name}: {reason}") for name, reason in _refused_callbacks(trainer)])
        self._close_gate()
        self._gate = ReleasedOnly(trainer, self.optimizer, self.public_keys)
        self._gate.watch()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Give the Trainer and its loggers back as they were."""
        self._close_gate()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give the Trainer and its loggers back as they were."""
        self._close_gate()

    def _close_gate(self) -> None:
        if self._gate is not None:
            self._gate.close()
            self._gate = None

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse validation data with rows of the private data, because validation logs are public."""
        self._check_public(trainer.val_dataloaders, "validation")

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse test data with rows of the private data, because test logs are public."""
        self._check_public(trainer.test_dataloaders, "test")

    def _check_public(self, loaders: Any, what: str) -> None:
        if isinstance(loaders, Mapping | list | tuple):
            for loader in loaders.values() if isinstance(loaders, Mapping) else loaders:
                self._check_public(loader, what)
        elif (shared := self._rows.shared_by(getattr(loaders, "dataset", None))) is not None:
            raise ValueError(
                f"the {what} data are not public, and values that are logged of them have no noise: {shared}"
            )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch loggers that were added since."""
        if self._gate is not None:
            self._gate.watch()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse settings that would break the private step, and open the Privacy tab."""
        _raise_for(self._problems(trainer))
        self._step = self.optimizer.steps_taken
        assert self._gate is not None
        self._gate.watch()
        with self._gate.released():
            self._open_dashboards(trainer)
        self._gate.start()

    def _open_dashboards(self, trainer: Any) -> None:
        tensorboard = sys.modules.get("torch.utils.tensorboard")
        for logger in trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if tensorboard is not None and isinstance(writer, tensorboard.SummaryWriter):
                from opacus_ac.tensorboard import PrivacyDashboard, keep_time_out

                keep_time_out(writer)
                self._dashboards.append(PrivacyDashboard(writer, self.engine, self.optimizer, delta=self.delta))

    def _problems(self, trainer: Any) -> list[tuple[bool, str]]:
        limit = getattr(self.loader.batch_sampler, "max_physical_batch_size", None)
        loader = trainer.train_dataloader
        if isinstance(loader, LogicalBatches) and not trainer.lightning_module.automatic_optimization:
            loader, limit = loader.loader, None
        return [
            (trainer.world_size > 1, "several devices: use one (devices=1)"),
            (trainer.accumulate_grad_batches != 1, "accumulate_grad_batches: choose the batch_size of the loader"),
            (trainer.gradient_clip_val is not None, "gradient_clip_val clips the noisy sum: set max_grad_norm"),
            (trainer.precision == "16-mixed", "16-mixed: its loss scaler follows private gradients. Use bf16-mixed"),
            (
                limit is not None,
                "max_physical_batch_size: Lightning ends a pass after len(loader) batches, amid a logical batch. Leave "
                "it out, or take the steps by hand (automatic_optimization=False, "
                "opacus_ac.sampling.loader.LogicalBatches)",
            ),
            (
                loader is not self.loader,
                "the Trainer has another training loader: pass the one that make_private returned",
            ),
            (
                [getattr(o, "optimizer", o) for o in trainer.optimizers] != [self.optimizer],
                "configure_optimizers returns another optimizer: return the one that make_private returned",
            ),
        ]

    # ---------------------------------------------------------------- what is shown

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Log the released values of the step."""
        release = self.optimizer.released
        if release is None or release.step == self._step:
            return
        self._step = release.step
        values = {
            "epsilon": self.engine.get_epsilon(self.delta),
            "max_grad_norm": release.max_grad_norm,
            "noisy_clip_rate": release.clip_rate,
            "lr_multiplier": release.lr_multiplier,
            "noisy_loss": release.loss,
        }
        shown = {_PREFIX + name: v for name, v in values.items() if v is not None and math.isfinite(v)}
        assert self._gate is not None
        with self._gate.released():
            for dashboard in self._dashboards:
                dashboard.log_step()
            for name, value in shown.items():
                # A dashboard writes the values to TensorBoard already, so loggers get them only without one.
                pl_module.log(
                    name, value, prog_bar=name == "privacy/epsilon", logger=not self._dashboards, batch_size=1
                )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the final privacy statement."""
        assert self._gate is not None
        with self._gate.released():
            while self._dashboards:
                self._dashboards.pop().close()

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the privacy account, with the settings that prove that it belongs to this run."""
        buffer = io.BytesIO()
        self.engine.save_checkpoint(path=buffer, module=nn.Identity())
        return {"account": torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the charges of the checkpoint's run."""
        content = io.BytesIO(bytes(state_dict["account"].tolist()))
        self.engine.load_checkpoint(path=content, module=nn.Identity())

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint without a privacy account.

        Raises:
            ValueError: If it was written without this callback.
        """
        if self.state_key not in checkpoint.get("callbacks", {}):
            raise ValueError(
                "the checkpoint was written without a PrivacyCallback: what its run has spent is not known, so it "
                "cannot be resumed. Resume from a checkpoint of a run with the callback"
            )


def _refused_callbacks(trainer: Any) -> list[tuple[str, str]]:
    """Return the callbacks of a Trainer that cannot be made private, each with reason and remedy."""
    found = []
    for callback in trainer.callbacks:
        names = [cls.__name__ for cls in type(callback).__mro__ if cls.__name__ in _CALLBACKS]
        if names:
            found.append((type(callback).__name__, _CALLBACKS[names[0]]))
    return found


def _raise_for(problems: list[tuple[bool, str]]) -> None:
    found = [reason for wrong, reason in problems if wrong]
    if found:
        raise ValueError("\n  * ".join(["this training cannot be made private:", *found]))
