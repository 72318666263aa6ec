"""The tags that the dashboard may write and the Privacy tab reads: releases and public constants, nothing else."""

from __future__ import annotations

PLUGIN_NAME = "opacus_ac"
META_TAG = "privacy/meta"
META_VERSION = 1
STATEMENT_TAG = "privacy/statement"
HISTOGRAM_TAG = "privacy/noisy_log10_norm"

SCALARS = {
    "privacy/epsilon": "epsilon spent so far; infinite when no bound holds",
    "privacy/epsilon_target": "the budget",
    "privacy/remaining_steps": "steps that still fit at the present rate and noise",
    "privacy/max_grad_norm": "C, the clipping norm of the step",
    "privacy/noisy_clip_rate": "released fraction of records whose gradient was clipped",
    "privacy/target_clip_rate": "clip rate aimed at",
    "privacy/clip_rate_low": "below it the learning rate grows",
    "privacy/clip_rate_high": "above it the learning rate shrinks",
    "privacy/lr_multiplier": "factor on the learning rate",
    "privacy/noisy_loss": "released mean of the records' clipped losses",
    "privacy/noisy_loss_std": "std of the noise in the noisy loss, where it changes",
    "privacy/noisy_loss_mean": "mean of the noisy losses of the last 20 steps",
    "privacy/noisy_loss_mean_std": "std of the noise in this mean, where it changes",
    "privacy/noisy_clip_rate_std": "std of the noise in the noisy clip rate, where it changes",
    "privacy/noisy_clip_rate_mean": "mean of the noisy clip rates of the last 20 steps",
    "privacy/noisy_clip_rate_mean_std": "std of the noise in this mean, where it changes",
    "privacy/sample_rate": "probability with which each record entered the step",
    "privacy/noise_multiplier": "ratio of the noise std to the sensitivity of the whole release",
}
"""Every scalar tag that the dashboard may write, with its meaning."""

PUBLIC_DATA = {"eval/loss": "held_out_loss"}
"""Scalars that the tab shows beside the dashboard's, with their names there; the dashboard itself does not write them.

A ``PrivateTrainer`` logs them only of evaluation data that were declared public. In a loop of their own, people write
them to the same folder, of public data only.
"""

ALLOWED = frozenset({*SCALARS, META_TAG, STATEMENT_TAG, HISTOGRAM_TAG})
"""Every tag that the dashboard may write."""

# TensorBoard's Custom Scalars page. Margin charts take exactly [value, lower, upper].
LAYOUT = {
    "Privacy budget": {
        "epsilon spent and target": ["Multiline", ["^privacy/epsilon$", "^privacy/epsilon_target$"]],
        "remaining steps": ["Multiline", ["^privacy/remaining_steps$"]],
    },
    "Clipping": {
        "clipping norm C": ["Multiline", ["^privacy/max_grad_norm$"]],
        "noisy clip rate and target": [
            "Multiline",
            ["^privacy/noisy_clip_rate$", "^privacy/noisy_clip_rate_mean$", "^privacy/target_clip_rate$"],
        ],
        "noisy clip rate and band": [
            "Margin",
            ["privacy/noisy_clip_rate", "privacy/clip_rate_low", "privacy/clip_rate_high"],
        ],
    },
    "Training": {
        "learning-rate multiplier": ["Multiline", ["^privacy/lr_multiplier$"]],
        "noisy loss": ["Multiline", ["^privacy/noisy_loss$", "^privacy/noisy_loss_mean$"]],
    },
    "Mechanism": {
        "sampling rate": ["Multiline", ["^privacy/sample_rate$"]],
        "noise multiplier": ["Multiline", ["^privacy/noise_multiplier$"]],
    },
}


def expect_allowed(tag: str) -> None:
    """Raise ``ValueError`` for a tag that is not a release or a public constant."""
    if tag not in ALLOWED:
        raise ValueError(
            f"the privacy dashboard does not write the tag {tag!r}: it writes releases and public constants only "
            f"({', '.join(sorted(ALLOWED))}). A value measured on public data goes through a SummaryWriter of your "
            "own; a value of the private data must not be written"
        )
