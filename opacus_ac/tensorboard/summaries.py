"""What the dashboard writes, as TensorBoard's summaries; built from releases and public constants."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from torch.utils.tensorboard.summary import hparams

from opacus_ac.engine.report import PrivacyReport
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.release.running_mean import RunningMean
from opacus_ac.release.values import GRID_RATIO, NoisyHistogram, StepRelease
from opacus_ac.tensorboard.tags import META_TAG, META_VERSION, PLUGIN_NAME

DATA_CLASS_TENSOR = 2


def meta_of(
    report: PrivacyReport, optimizer: AdaptiveClipDPOptimizer, target_epsilon: float | None, private: bool
) -> dict[str, Any]:
    """Return the privacy record of a run: the part of its statement that does not grow with every step."""
    values = report.to_dict()
    constant = ("delta", "accountant", "unit", "adjacency", "sampling", "dataset_size", "clip_policy", "released")
    return {
        "version": META_VERSION,
        "private": private,
        "target_epsilon": target_epsilon,
        "loss_bound": optimizer.statistics.loss_bound,
        "noise_source": values["noise_source"],
        "warnings": values["warnings"],
        **{name: values[name] for name in constant},
        "settings": settings_of(optimizer),
    }


def meta_summary(meta: dict[str, Any]) -> Any:
    """Return the tensor that marks a run as private and carries its record."""
    plugin_data = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=b'{"version":1}')
    # The Rust data server drops a tensor without a data class.
    metadata = SummaryMetadata(plugin_data=plugin_data, data_class=DATA_CLASS_TENSOR)
    content = json.dumps(meta, allow_nan=False).encode()
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=TensorShapeProto())
    return Summary(value=[Summary.Value(tag=META_TAG, metadata=metadata, tensor=tensor)])


def scalars_of(release: StepRelease, optimizer: AdaptiveClipDPOptimizer) -> dict[str, float]:
    """Return the scalars of one step, by tag."""
    values: dict[str, float | None] = {
        "max_grad_norm": release.max_grad_norm,
        "noisy_clip_rate": release.clip_rate,
        "lr_multiplier": release.lr_multiplier,
        "noisy_loss": release.loss,
        "sample_rate": release.sample_rate,
        "noise_multiplier": release.noise_multiplier,
    }
    control = optimizer.control
    if release.clip_rate is not None:
        values["target_clip_rate"] = getattr(optimizer.policy, "target_clip_rate", control.target if control else None)
        if control is not None:
            values["clip_rate_low"] = max(0.0, control.target - control.band)
            values["clip_rate_high"] = min(1.0, control.target + control.band)
    return {f"privacy/{name}": float(value) for name, value in values.items() if value is not None}


class NoiseOfCurves:
    """The stds of the noise in the noisy curves of a run, public numbers, and the running means of these curves."""

    def __init__(self) -> None:
        self._means: dict[str, RunningMean] = {}
        self._written: dict[str, float] = {}

    def scalars(self, release: StepRelease, optimizer: AdaptiveClipDPOptimizer) -> dict[str, float]:
        """Return the scalars of one step, by tag. A std is there where it is another one than before."""
        rate_std = None if release.histogram is None else release.histogram.fraction_std(release.max_grad_norm)
        curves = {
            "noisy_loss": (release.loss, optimizer.statistics.loss_std(release)),
            "noisy_clip_rate": (release.clip_rate, rate_std),
        }
        found: dict[str, float] = {}
        for name, (value, std) in curves.items():
            if value is None or std is None:
                continue
            mean = self._means.setdefault(name, RunningMean())
            mean.add(value, std)
            if mean.known is not None:
                found[f"{name}_mean"], error = mean.known
                found |= self._changed({f"{name}_std": std, f"{name}_mean_std": error})
        return {f"privacy/{name}": float(value) for name, value in found.items()}

    def _changed(self, stds: dict[str, float]) -> dict[str, float]:
        """Return the stds that are not the ones of the step before, to the precision of event files."""
        new = {
            name: std
            for name, std in stds.items()
            if not math.isclose(self._written.get(name, -1.0), std, rel_tol=1e-6)
        }
        self._written |= new
        return new


def histogram_arguments(histogram: NoisyHistogram) -> dict[str, Any]:
    """Return the arguments of ``SummaryWriter.add_histogram_raw`` for the noisy norms, on a log10 axis.

    Noisy counts below zero are shown as zero; the range is that of the public grid, with each tail as one more bin.
    """
    window, width = histogram.window, math.log10(GRID_RATIO)
    edges = width * np.arange(window.first - 1, window.first + window.bins + 2)
    counts = histogram.counts.clip(0.0)
    middles = (edges[1:] + edges[:-1]) / 2
    return {
        "min": float(edges[0]),
        "max": float(edges[-1]),
        "num": round(float(counts.sum())),
        "sum": float(counts @ middles),
        "sum_squares": float(counts @ middles**2),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }


def settings_of(optimizer: AdaptiveClipDPOptimizer) -> dict[str, Any]:
    """Return the public settings by which people tell runs apart; None where there is none."""
    group = optimizer.param_groups[0]
    return {
        "noise_multiplier": optimizer.mechanism.noise_multiplier,
        "initial_max_grad_norm": optimizer.policy.initial_bound,
        "target_clip_rate": getattr(optimizer.policy, "target_clip_rate", None),
        "expected_batch_size": optimizer.expected_batch_size,
        "normalize": optimizer.normalize,
        "lr_control": optimizer.control is not None,
        "ema_decay": None if optimizer.ema is None else optimizer.ema.decay,
        "optimizer": type(optimizer.original_optimizer).__name__,
        "lr": group.get("initial_lr", group.get("lr")),
    }


def hparams_summaries(meta: dict[str, Any]) -> tuple[Any, ...]:
    """Return the summaries of TensorBoard's HParams page, for the writer's own file, from the privacy record.

    ``SummaryWriter.add_hparams`` would open a second event file.
    """
    names = ("target_epsilon", "delta", "accountant", "sampling", "dataset_size", "clip_policy", "loss_bound")
    values = {**{name: meta[name] for name in names}, **meta["settings"]}
    # torch writes a bool as the number 1.0.
    shown = {name: str(value) if isinstance(value, bool) else value for name, value in values.items()}
    known = {name: value for name, value in shown.items() if value is not None}
    # The values of the metrics are the last ones of the curves of these names.
    written: tuple[Any, ...] = hparams(known, {"privacy/epsilon": 0.0, "privacy/noisy_loss": 0.0})
    return written
