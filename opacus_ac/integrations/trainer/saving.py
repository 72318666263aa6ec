"""What a private ``Trainer`` saves: weights with a privacy report, and checkpoints that prove to be whole."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from opacus_ac.integrations.trainer import checkpoint as trainer_checkpoint
from opacus_ac.integrations.trainer.prepared import PreparedTrainer
from opacus_ac.integrations.trainer.released import ReleasedLog
from opacus_ac.optimizer.state import public_settings

PRIVACY_REPORT = "privacy_report.json"


class SavingTrainer(PreparedTrainer):
    """A Trainer that resumes from whole checkpoints of the same run only.

    Each checkpoint has the privacy state of the run, which is written last and has the hashes of all other files.
    """

    _gate: ReleasedLog
    """Checks the whole log before ``trainer_state.json`` is written."""
    _saving_checkpoint = False
    _unsealed: Path | None = None
    """Folder of a checkpoint whose privacy state is still to be written."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the averaged weights, and the privacy report beside them.

        A checkpoint has the weights without averaging, because training goes on from there.
        """
        with nullcontext() if self._saving_checkpoint else self.ema_weights():
            super().save_model(output_dir, _internal_call)
        if self.private_optimizer is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            (folder / PRIVACY_REPORT).write_text(self.privacy_report().to_json(), encoding="utf-8")

    def save_state(self) -> None:
        """Save ``trainer_state.json`` after a check that its whole log is public."""
        self._gate.look(whole=True)
        super().save_state()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint. Its last file proves that all files belong together."""
        self._gate.look(whole=True)
        self._saving_checkpoint = True
        try:
            with trainer_checkpoint.sealing(self.state, self._seal, writes=self.args.should_save):
                super()._save_checkpoint(*args, **kwargs)
        finally:
            self._saving_checkpoint = False
        self.engine.reducer.on_first(lambda: None)  # a barrier: no rank reads the folder before it is whole

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimizer, whose state has the clipping norm and the averaged weights, and note the folder."""
        super()._save_optimizer_and_scheduler(output_dir)
        self._unsealed = Path(output_dir)

    def _seal(self) -> None:
        folder, self._unsealed = self._unsealed, None
        if folder is not None:
            trainer_checkpoint.save(self.engine, folder, self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights after a check that the folder is one whole checkpoint of this run."""
        optimizer, _ = self._make_private()
        trainer_checkpoint.verify(self.engine, Path(resume_from_checkpoint), public_settings(optimizer))
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        noise = self._make_private()[0].mechanism.stream
        own = noise.state_dict()
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.args.world_size > 1:
            # The checkpoint has the random stream of rank 0, and no two ranks may have the same stream.
            noise.load_state_dict(own)
        trainer_checkpoint.load(self.engine, Path(checkpoint))
