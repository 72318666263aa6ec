"""Shows released values of a Trainer run in its log, on its progress bar and in its event files."""

from __future__ import annotations

import math
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from opacus_ac.errors import WeakPrivacyWarning
from opacus_ac.integrations.run_registry import RunRegistry, warning
from opacus_ac.optimizer.auto_adam import AutoAdam
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer

_BAR_SECONDS = 1.0  # shortest time between two updates of epsilon on the progress bar


def release_values(optimizer: AdaptiveClipDPOptimizer, epsilon: float) -> dict[str, float]:
    """Return the values of the last step that may be shown, by name. Those missing or not finite are left out."""
    release, inner = optimizer.released, optimizer.original_optimizer
    if release is None:
        return {}
    values = {
        "epsilon": epsilon,
        "max_grad_norm": release.max_grad_norm,
        "noisy_clip_rate": release.clip_rate,
        "lr_multiplier": release.lr_multiplier,
        "found_learning_rate": inner.learning_rates[0] if isinstance(inner, AutoAdam) else None,
    }
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


class RunComplete(Exception):
    """Raised to end a resumed run that has taken all of its steps already."""


class PrivacyCallback(TrainerCallback):
    """Adds the noisy loss to the Trainer's, epsilon to its progress bar, and the Privacy tab to its event file.

    Args:
        trainer: the :class:`PrivateTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._shown = -math.inf
        self._dashboards: list[Any] = []
        self._registry: RunRegistry | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open a dashboard on each event file of the Trainer.

        By now the Trainer has opened its event files and loaded the checkpoint to resume from.

        Raises:
            RunComplete: If the checkpoint is of the last step. The Trainer itself would take one more.
        """
        if state.global_step >= state.max_steps:
            raise RunComplete
        if args.should_save:
            self.trainer.write_settings(Path(args.output_dir))
            self._look_for_other_runs(resumed=state.global_step > 0)
        tensorboard = sys.modules.get("torch.utils.tensorboard")
        for callback in self._others(TensorBoardCallback):
            writer = callback.tb_writer
            if tensorboard is not None and isinstance(writer, tensorboard.SummaryWriter):
                self._dashboards.append(self._dashboard(writer, max(1, int(state.logging_steps))))
                self.trainer._gate.watch(callback)

    def _look_for_other_runs(self, *, resumed: bool) -> None:
        """Warn of earlier runs on the same data whose charges the ledger does not count."""
        trainer = self.trainer
        if not trainer.privacy.run_registry:
            return
        self._registry = RunRegistry(trainer.data_files or [trainer.train_dataset])
        found = warning(self._registry.others(**self._places(), resumed=resumed), trainer.privacy.ledger)
        if found is not None:
            warnings.warn(found, WeakPrivacyWarning, stacklevel=2)

    def _places(self) -> dict[str, str | None]:
        return {"ledger": self.trainer.privacy.ledger, "folder": self.trainer.args.output_dir}

    def _dashboard(self, writer: Any, every: int) -> Any:
        from opacus_ac.tensorboard import PrivacyDashboard, keep_time_out

        keep_time_out(writer)
        return PrivacyDashboard(
            writer,
            self.trainer.engine,
            self.trainer.private_optimizer,
            delta=self.trainer.privacy.target_delta,
            every=every,
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the noisy loss to the sum that the Trainer logs, and write the release to TensorBoard."""
        if self._registry is not None:
            self._registry.note(**self._places())
            self._registry = None
        released = self.trainer.private_optimizer.released
        self.trainer._gate.add_step(released.loss)
        self.trainer.running_loss.add(released.loss, self.trainer.private_optimizer.statistics.loss_std(released))
        if released.loss is not None:
            self.trainer._tr_loss += released.loss
        with self.trainer._gate.writing():
            for dashboard in self._dashboards:
                dashboard.log_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show epsilon on the progress bar, and let a resumed run go on counting epochs where it was."""
        state.epoch = state.global_step / len(self.trainer.callback_handler.train_dataloader)
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if ends or time.monotonic() - self._shown > _BAR_SECONDS:
            self.show_epsilon()

    def show_epsilon(self) -> None:
        """Show epsilon as it is now on the progress bars."""
        bars = [c.training_bar for c in self._others(ProgressCallback) if c.training_bar is not None]
        self._shown = time.monotonic()
        for bar in bars:
            bar.set_postfix(epsilon=f"{self.trainer.get_epsilon():.3f}")

    def close(self) -> None:
        """Write the final privacy statement. The Trainer closes the event files itself, in ``on_train_end``."""
        with self.trainer._gate.writing():
            while self._dashboards:
                self._dashboards.pop().close()

    def _others(self, kind: type) -> list[Any]:
        return [c for c in self.trainer.callback_handler.callbacks if isinstance(c, kind)]
