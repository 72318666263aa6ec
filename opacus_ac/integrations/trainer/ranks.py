"""A ``Trainer`` on several processes: the model has no wrapper, and evaluation is a mean over records."""

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
"""Environment variables by which ``accelerate launch`` asks for more than the ``TrainingArguments`` say."""


def refused_processes(args: Any, model: Any) -> list[str]:
    """Return the reasons why these processes, or this model, cannot be used for training.

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
            f"torch.distributed has {processes} processes and TrainingArguments {args.world_size}: build the "
            "TrainingArguments in every process that torchrun starts, and leave init_process_group to them"
        )
    if args.world_size > 1 and args.save_on_each_node:
        found.append("save_on_each_node=True: only rank 0 has the ledger and writes: use a folder that all ranks see")
    if isinstance(model, nn.Module) and any(is_sharded(p) for p in model.parameters()):
        found.append(
            "the model is sharded (fully_shard, or tensor parallelism): every process of the Trainer needs the whole "
            "model. Use make_private for sharded models"
        )
    return found


class RanksTrainer(SilentTrainer):
    """A Trainer without a wrapper around the model. Only the private optimizer adds up gradients of processes."""

    def create_accelerator_and_postprocess(self) -> None:
        """Create an accelerator that applies autocast to the model, but no wrapper such as DistributedDataParallel."""
        super().create_accelerator_and_postprocess()
        if self.args.world_size == 1:
            return
        prepare = self.accelerator.prepare_model

        def bare(model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False) -> nn.Module:
            prepared: nn.Module = prepare(model, device_placement=device_placement, evaluation_mode=True)
            return prepared

        self.accelerator.prepare_model = bare

    def share_weights(self) -> None:
        """Give every rank all weights of rank 0. ``make_private`` does so for trained weights only."""
        if self.args.world_size > 1:
            group = Group(self.args.device)
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                group.broadcast(tensor)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a part of the records on each rank.

        Raises:
            ValueError: If the loader divides the records among the ranks in a way that gives another mean loss.
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
                f"evaluation on {self.args.world_size} processes: this loader ({type(dataloader).__name__}) does not "
                "hand whole batches to the ranks in turn, and the loss would not be the mean over all records. Use the "
                "Trainer's own loader, a dataset with a length, and an accelerator_config without split_batches, "
                "dispatch_batches, even_batches; or evaluate in one process"
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Evaluate a batch. Records that only fill up the last batch of a process do not count in its loss."""
        loss, outputs, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        own = self._own_records()
        if own is not None and loss is not None:
            inputs = select_records(inputs, torch.arange(own))
            loss = super().prediction_step(model, inputs, True, ignore_keys)[0]
        return loss, outputs, labels

    def _own_records(self) -> int | None:
        """Return how many records of this batch are not fillers; None where there are no fillers or no other records.

        accelerate fills up the last batches of the ranks with the first records of the dataset. The Trainer gathers the
        loss of each batch once per record, and drops one loss for each filler. So the loss of a batch must be the loss
        of its other records. The Trainer drops a batch of fillers only as a whole.
        """
        state, size = self.accelerator.gradient_state, self.args.eval_batch_size
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        own = min(max(state.remainder - self.args.process_index * size, 0), size)
        return own if 0 < own < size else None
