"""A ``Trainer`` without what it tells about a batch beside its loss."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

PRIVATE_KEYS = (
    "grad_norm", "total_flos", "num_input_tokens_seen", "train_tokens_per_second", "train_runtime",
    "train_samples_per_second", "train_steps_per_second",
)  # fmt: skip
"""Names in logs of the un-noised gradient norm, and of counts and times that follow the sizes of private batches."""

LOSS_KEYS = ("loss", "train_loss")


class SilentTrainer(Trainer):
    """``Trainer`` that counts no tokens, measures no gradient, and saves no state of the process's generators."""

    model: Any
    optimizer: Any
    train_dataset: Any
    loss_is_scaled_for_ga = True  # a mean over records, which no number of accumulation steps divides

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: every trial is a release of its own.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "hyperparameter_search trains on the private data once per trial, and each costs its epsilon: train one "
            "PrivateTrainer per trial with the same ledger=, which adds them up, or search on public data"
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        """Return None: the number of labelled tokens of the batch would couple its records."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Return None: the gradient is not noised yet where the Trainer asks."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: the count follows the number of private tokens."""
        return 0

    def _save_rng_state(self, output_dir: str) -> None:
        """Save nothing: how far the global generator got tells how many private tokens dropout has seen."""
