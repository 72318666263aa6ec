"""A ``Trainer`` that publishes no counts, norms or generator states of private batches."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

PRIVATE_KEYS = (
    "grad_norm", "total_flos", "num_input_tokens_seen", "train_tokens_per_second", "train_runtime",
    "train_samples_per_second", "train_steps_per_second",
)  # fmt: skip
"""Log entries without noise: the gradient norm, and counts and times that depend on the sizes of private batches."""

LOSS_KEYS = ("loss", "train_loss")


class SilentTrainer(Trainer):
    """A ``Trainer`` that counts no tokens, measures no gradient, and saves no state of the global random generators."""

    model: Any
    optimizer: Any
    train_dataset: Any
    loss_is_scaled_for_ga = True  # a mean over records, not divided by accumulation steps

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to search, because every trial spends privacy budget of its own.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "hyperparameter_search trains on the private data once per trial, and each costs its epsilon: train one "
            "PrivateTrainer per trial with the same ledger=, which adds them up, or search on public data"
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> None:
        """Return None. The number of labelled tokens in the batch would couple its records."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Return None. The gradient has no noise yet when the Trainer asks for its norm."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0. The count would depend on the number of private tokens."""
        return 0

    def _save_rng_state(self, output_dir: str) -> None:
        """Save nothing. The state of the global generator tells how many private tokens dropout has seen."""
