"""Shows the releases of a Trainer run where the Trainer shows its own values."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback

from opacus_ac.mechanism import StepRelease

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


class PrivacyCallback(TrainerCallback):
    """Adds the noisy loss to the Trainer's, epsilon to its progress bar, and ``privacy/...`` curves to TensorBoard.

    Args:
        trainer: the :class:`PrivateTrainer`.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._shown = -math.inf

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the released loss of the step to the running sum that the Trainer logs."""
        released = self.trainer.private_optimizer.released
        if released.loss is not None:
            self.trainer._tr_loss += released.loss

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the epochs of a resumed run on from where it was, and show epsilon."""
        state.epoch = state.global_step / len(self.trainer.callback_handler.train_dataloader)
        bars = [c.training_bar for c in self._others(ProgressCallback) if c.training_bar is not None]
        if bars and time.monotonic() - self._shown > _BAR_SECONDS:
            self._shown = time.monotonic()
            for bar in bars:
                bar.set_postfix(epsilon=f"{self.trainer.get_epsilon():.3f}", refresh=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the last release to the event file of the Trainer."""
        optimizer = self.trainer.private_optimizer
        if optimizer is None or optimizer.released is None or "learning_rate" not in (logs or {}):
            return
        values = release_values(optimizer.released, self.trainer.get_epsilon())
        values["sample_rate"] = optimizer.released.sample_rate
        if optimizer.released.loss is not None:
            values["noisy_loss"] = optimizer.released.loss
        for writer in [c.tb_writer for c in self._others(TensorBoardCallback) if c.tb_writer is not None]:
            for name, value in values.items():
                writer.add_scalar(f"privacy/{name}", value, state.global_step)
            writer.flush()

    def _others(self, kind: type) -> list[Any]:
        return [c for c in self.trainer.callback_handler.callbacks if isinstance(c, kind)]
