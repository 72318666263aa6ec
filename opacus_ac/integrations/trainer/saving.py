"""What a private ``Trainer`` saves: weights with a privacy report, and checkpoints that prove to be whole."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from opacus_ac.integrations.trained.base import make_portable
from opacus_ac.integrations.trained.card import keep_card, model_card, write_card
from opacus_ac.integrations.trained.folder import LOCAL_PATHS, PRIVACY_REPORT, SETTINGS, write_object
from opacus_ac.integrations.trainer import checkpoint as trainer_checkpoint
from opacus_ac.integrations.trainer.described import held_out_losses, local_paths, run_settings
from opacus_ac.integrations.trainer.prepared import PreparedTrainer
from opacus_ac.integrations.trainer.released import ReleasedLog
from opacus_ac.optimizer.state import public_settings


class SavingTrainer(PreparedTrainer):
    """A Trainer that saves a model with its report and card, and resumes from whole checkpoints of the same run only.

    Each checkpoint has the privacy state of the run, which is written last and has the hashes of all other files.

    Attributes:
        local_files: further paths of this machine that commands on the run need, by name. They are kept in a file of
            the output folder that is not published.
    """

    _gate: ReleasedLog
    """Checks the whole log before ``trainer_state.json`` is written."""
    _saving_checkpoint = False
    _unsealed: Path | None = None
    """Folder of a checkpoint whose privacy state is still to be written."""
    local_files: dict[str, str | None]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights, the privacy report and the model card.

        ``PrivacyArguments.average_weights`` says which weights. A checkpoint has the weights without averaging, because
        training goes on from there.
        """
        folder = Path(output_dir or self.args.output_dir or ".")
        card = keep_card(folder) if self.args.should_save else None
        with nullcontext() if self._saving_checkpoint else self.ema_weights():
            super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        make_portable(folder)
        if self.private_optimizer is not None:
            report = self.privacy_report()
            (folder / PRIVACY_REPORT).write_text(report.to_json(), encoding="utf-8")
            self.write_settings(folder)
            write_card(folder, model_card(run_settings(self), report.to_dict(), losses=held_out_losses(self)), card)

    def write_settings(self, folder: Path) -> None:
        """Write the public settings of the run into a folder, and the paths that only this machine needs."""
        write_object(folder / SETTINGS, run_settings(self))
        write_object(folder / LOCAL_PATHS, local_paths(self, self.local_files))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keep the card that :meth:`save_model` wrote. ``Trainer.push_to_hub`` asks for another one."""

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
