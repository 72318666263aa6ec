"""A ``Trainer`` on several processes: no wrapper around the model, and an evaluation that is a mean over records."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from torch import Tensor, nn

from opacus_ac.distributed.group import Group, initialized
from opacus_ac.grad_sample.sharded_parameters import is_sharded
from opacus_ac.integrations.trainer.silent import SilentTrainer
from opacus_ac.testing import select_records

_LAUNCHED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism within the model",
}
"""What ``accelerate launch`` asks for past the ``TrainingArguments``, by the variable that says so."""


def refused_processes(args: Any, model: Any) -> list[str]:
    """Return the reasons for which these processes, or this model, cannot train together.

    Args:
        args: ``TrainingArguments``.
        model: the model.
    """
    found = [
        f"{name}={os.environ[name]!r}: {what} is not available in the Trainer: start it with torchrun"
        for name, what in _LAUNCHED.items()
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on", "y", "t")
    ]
    processes = dist.get_world_size() if initialized() else 1
    if processes != args.world_size:
        found.append(
            f"torch.distributed has {processes} processes and TrainingArguments {args.world_size}: build the TrainingArguments "
            "in every process that torchrun starts, and leave init_process_group to them"
        )
    if args.world_size > 1 and args.save_on_each_node:
        found.append("save_on_each_node=True: rank 0 alone has the ledger and writes: use a folder that all ranks see")
    if isinstance(model, nn.Module) and any(is_sharded(p) for p in model.parameters()):
        found.append(
            "the model is sharded (fully_shard, or tensor parallelism): every process of the Trainer needs the whole model. Use "
            "make_private for sharded models"
        )
    return found


class RanksTrainer(SilentTrainer):
    """A Trainer whose processes have the bare model each, and reduce nothing but what the private optimizer does."""

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator; it applies autocast to the model, but does not wrap it for its own reduction."""
        super().create_accelerator_and_postprocess()
        if self.args.world_size == 1:
            return
        prepare = self.accelerator.prepare_model

        def bare(model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> nn.Module:
            prepared: nn.Module = prepare(model, device_placement=device_placement, evaluation_mode=True)
            return prepared

        self.accelerator.prepare_model = bare

    def share_weights(self) -> None:
        """Give every rank the weights of rank 0, which ``make_private`` does for those that are trained."""
        if self.args.world_size > 1:
            group = Group(self.args.device)
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                group.broadcast(tensor)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a part of the records on each rank.

        Raises:
            ValueError: the records are not divided in the one way of which the mean over all of them is known.
        """
        if self.args.world_size > 1:
            self._check_parts(dataloader)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _check_parts(self, dataloader: Any) -> None:
        parts = getattr(dataloader, "batch_sampler", None)
        if not (
            isinstance(dataloader, DataLoaderShard)
            and isinstance(parts, BatchSamplerShard)
            and (parts.even_batches or parts.drop_last)
            and not parts.split_batches
            and parts.batch_size == self.args.eval_batch_size
        ):
            raise ValueError(
                f"evaluation on {self.args.world_size} processes: this loader ({type(dataloader).__name__}) does not hand whole "
                "batches to the ranks in turn, and the loss would not be the mean over all records. Use the Trainer's own loader, "
                "a dataset with a length, and an accelerator_config without split_batches, dispatch_batches, even_batches; or "
                "evaluate in one process"
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate a batch; the records that only fill up the last one of several processes do not count in its loss."""
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        own = self._own_records()
        if own is not None and loss is not None:
            inputs = select_records(inputs, torch.arange(own))
            loss = super().prediction_step(model, inputs, True, ignore_keys)[0]
        return loss, outputs, labels

    def _own_records(self) -> int | None:
        """Return how many records of the batch in hand are in it for the first time, where others follow; None otherwise.

        accelerate fills the last batches of the ranks up with the first records. The Trainer gathers the loss of each batch once
        per record and cuts off as many as were filled in, so each loss must be that of the others alone. A batch without others is
        cut off as a whole.
        """
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        own = min(max(state.remainder - self.args.process_index * size, 0), size)
        return own if 0 < own < size else None
