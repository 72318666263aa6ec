"""Shows the releases of a Trainer run where the Trainer shows its own values."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from opacus_ac.release.values import StepRelease

_BAR_SECONDS = 1.0  # epsilon on the bar is computed this often at most


def release_values(release: StepRelease | None, epsilon: float) -> dict[str, float]:
    """Return the public values of a step by name; those that are not there, or not finite, are left out."""
    if release is None:
        return {}
    values = {
        "epsilon": epsilon,
        "max_grad_norm": release.max_grad_norm,
        "noisy_clip_rate": release.clip_rate,
        "lr_multiplier": release.lr_multiplier,
    }
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


class RunComplete(Exception):
    """Ends a resumed run that has taken all of its steps before it takes another one."""


class PrivacyCallback(TrainerCallback):
    """Adds the noisy loss to the Trainer's, epsilon to its progress bar, and the Privacy tab to its event file.

    Args:
        trainer: the :class:`PrivateTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._shown = -math.inf
        self._dashboards: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open a dashboard on each event file of the Trainer, which are opened by now, and a checkpoint loaded.

        Raises:
            RunComplete: the checkpoint is of the last step: the Trainer would take one more before it looked.
        """
        if state.global_step >= state.max_steps:
            raise RunComplete
        tensorboard = sys.modules.get("torch.utils.tensorboard")
        for callback in self._others(TensorBoardCallback):
            writer = callback.tb_writer
            if tensorboard is not None and isinstance(writer, tensorboard.SummaryWriter):
                self._dashboards.append(self._dashboard(writer, max(1, int(state.logging_steps))))
                self.trainer._gate.watch(callback)

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
        """Add the released loss of the step to the running sum that the Trainer logs, and the release to TensorBoard."""
        released = self.trainer.private_optimizer.released
        self.trainer._gate.add_step(released.loss)
        if released.loss is not None:
            self.trainer._tr_loss += released.loss
        with self.trainer._gate.writing():
            for dashboard in self._dashboards:
                dashboard.log_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epochs of a resumed run on from where it was, and show epsilon."""
        state.epoch = state.global_step / len(self.trainer.callback_handler.train_dataloader)
        bars = [c.training_bar for c in self._others(ProgressCallback) if c.training_bar is not None]
        if bars and time.monotonic() - self._shown > _BAR_SECONDS:
            self._shown = time.monotonic()
            for bar in bars:
                bar.set_postfix(epsilon=f"{self.trainer.get_epsilon():.3f}", refresh=False)

    def close(self) -> None:
        """Write the final privacy statement; the event files are the Trainer's to close, in its ``on_train_end``."""
        with self.trainer._gate.writing():
            while self._dashboards:
                self._dashboards.pop().close()

    def _others(self, kind: type) -> list[Any]:
        return [c for c in self.trainer.callback_handler.callbacks if isinstance(c, kind)]
