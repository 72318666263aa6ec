"""The course of a zeroth-order run: stage, smoothing and directions of each step, and the coordinates that move."""

from __future__ import annotations

from typing import Any

from torch import nn

from opacus_ac.zeroth_order import pruning
from opacus_ac.zeroth_order.coordinates import Coordinates
from opacus_ac.zeroth_order.settings import ADDED_SETTINGS, ZerothOrderSettings


class Course:
    """Public functions of the number of a step, and of weights that are public by then.

    Args:
        module: the model, which the choice of coordinates looks at.
        settings: directions, stages and pruning.
        coordinates: the trained coordinates.
    """

    def __init__(self, module: nn.Module, settings: ZerothOrderSettings, coordinates: Coordinates) -> None:
        self.module, self.settings, self.coordinates = module, settings, coordinates
        self._stage: int | None = None

    def stage(self, step: int) -> int:
        """Return the stage of ``step``, both from 0."""
        stages = self.settings.stages
        return 0 if stages is None else stages.stage(step)

    def smoothing(self, step: int) -> float:
        """Return the smoothing of ``step``."""
        stages, start = self.settings.stages, self.settings.smoothing
        return start if stages is None else stages.smoothing(self.stage(step), start)

    def lr_factor(self, step: int) -> float:
        """Return the factor on the learning rate in ``step``."""
        stages = self.settings.stages
        return 1.0 if stages is None else stages.lr_factor(self.stage(step))

    @property
    def proximal(self) -> float:
        """Strength of the pull to the weights at the start of the stage."""
        return 0.0 if self.settings.stages is None else self.settings.stages.proximal

    def seeds(self, step: int) -> list[int]:
        """Return the public 63-bit seeds of the directions of ``step``."""
        return self.coordinates.directions.seeds(step, self.settings.num_directions)

    def enter(self, step: int) -> None:
        """At the start of a stage choose its mask and keep its anchor."""
        stage, chosen = self.stage(step), self.settings.pruning
        if stage == self._stage:
            return
        first = self._stage is None
        if chosen is not None and (first or chosen.strategy != "static"):
            self.coordinates.choose(
                pruning.choose(
                    self.module,
                    self.coordinates.parameters,
                    chosen,
                    stage=stage,
                    seed=self.coordinates.directions.seed,
                    before=None if first else self.coordinates.indices,
                )
            )
        if self.proximal > 0:
            self.coordinates.set_anchor()
        self._stage = stage

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return settings, seed, stage, mask and anchor."""
        return {
            "settings": self.settings.configuration(),
            "direction_seed": self.coordinates.directions.seed,
            "stage": self._stage,
            **self.coordinates.state_dict(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that ``state`` is that of a zeroth-order run with these settings and tensors.

        Raises:
            ValueError: If it is not.
        """
        settings = {**ADDED_SETTINGS, **state["settings"]}
        if settings != self.settings.configuration():
            changed = [k for k, v in self.settings.configuration().items() if settings.get(k) != v]
            raise ValueError(
                f"the state was written with other zeroth-order settings ({', '.join(changed)}): use the same settings"
            )
        _ = int(state["direction_seed"]), state["stage"]
        self.coordinates.check_state({"indices": state["indices"], "anchor": state["anchor"]})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue along the directions of a state that :meth:`check_state` has accepted."""
        self.coordinates.directions.seed, self._stage = int(state["direction_seed"]), state["stage"]
        self.coordinates.load_state_dict({"indices": state["indices"], "anchor": state["anchor"]})
