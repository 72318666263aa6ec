"""Fine-tune on private dialogues on several processes: the loop of one process, under torchrun.

    torchrun --nproc_per_node=2 examples/finetune_distributed.py                  # a tiny random model, on CPUs or GPUs
    torchrun --nproc_per_node=2 examples/finetune_distributed.py --shard          # FSDP2
    torchrun --nproc_per_node=8 examples/finetune_distributed.py --shard --model path/to/model --bf16
    torchrun --nproc_per_node=2 examples/finetune_distributed.py --until 5 --output runs/first
    torchrun --nproc_per_node=4 examples/finetune_distributed.py --shard --resume runs/first/checkpoint --output runs/second

With NCCL when there is a GPU for each process, else with gloo on CPUs. The noise comes from the operating systems of the ranks,
the draw of records from that of rank 0; ``--seed`` is for public randomness only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent / "studies"))

from common.chat_data import ChatDataset, PadCollate, heldout_loss, reply_losses
from common.tone_dialogues import train_and_heldout

from opacus_ac import AdaptiveClipDPOptimizer, PrivacyEngine
from opacus_ac.checkpoint import load_checkpoint, save_checkpoint
from opacus_ac.models.default_model import load_model

warnings.filterwarnings("ignore", message="Full backward hook is firing")  # torch, about inputs that need no gradient
Row = dict[str, torch.Tensor]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model", help="folder or hub name of a transformers chat model (default: tiny, random weights)"
    )
    parser.add_argument("--shard", action="store_true", help="FSDP2: each rank has a part of every weight")
    parser.add_argument("--bf16", action="store_true", help="with --shard: forward and backward passes in bfloat16")
    parser.add_argument("--records", type=int, default=2000, help="number of synthetic dialogues")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=12, help="steps that the budget is planned for")
    parser.add_argument("--until", type=int, help="stop after this many of them; --resume goes on")
    parser.add_argument("--expected-batch-size", type=int, default=64, help="of all ranks together")
    parser.add_argument("--physical-batch-size", type=int, default=8, help="on one rank; memory only")
    parser.add_argument("--max-length", type=int, default=96, help="tokens per dialogue; longer ones are cut")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ledger", type=Path, help="privacy ledger; rank 0 has it")
    parser.add_argument("--resume", type=Path, help="checkpoint of an earlier run, on any number of processes")
    parser.add_argument("--seed", type=int, default=0, help="public randomness; never noise or draws")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_distributed"))
    return parser.parse_args(argv)


def start() -> torch.device:
    """Join the other processes and return the device of this one."""
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
        torch.cuda.set_device(local)
        device = torch.device("cuda", local)
        dist.init_process_group("nccl", device_id=device)
        return device
    dist.init_process_group("gloo")
    return torch.device("cpu")


class Bytes(Dataset[Row]):
    """Dialogues as bytes, for the model that knows nothing else."""

    def __init__(self, dialogues: list[Any], length: int) -> None:
        texts = ["\n".join(message["content"] for message in dialogue) for dialogue in dialogues]
        self.rows = [torch.tensor(list(text.encode())[:length]) for text in texts]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def prepare(args: argparse.Namespace) -> tuple[Any, Dataset[Row], Dataset[Row], PadCollate]:
    """Return model, private records, public held-out records and collate function; the same on every rank."""
    torch.manual_seed(args.seed)
    private, public = (
        [d["messages"] for d in part] for part in train_and_heldout("loving", args.records, 24, args.seed)
    )
    if args.model is not None:
        model, tokenizer = load_model(args.model, dtype=torch.float32)
        sets = [ChatDataset(rows, tokenizer, args.max_length) for rows in (private, public)]
        return model.train(), sets[0], sets[1], PadCollate(tokenizer.pad_token_id, args.max_length)
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, use_cache=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    sets = [Bytes(rows, args.max_length) for rows in (private, public)]
    return Qwen2ForCausalLM(config).train(), sets[0], sets[1], PadCollate(0, args.max_length)


def shard(model: Any, bf16: bool) -> None:
    """Shard each block, and the rest with the model itself: tied embeddings stay together."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if bf16 else MixedPrecisionPolicy()
    for block in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def make_private(
    args: argparse.Namespace, engine: PrivacyEngine, model: Any, records: Dataset[Row], collate: PadCollate
) -> tuple[Any, AdaptiveClipDPOptimizer, Any]:
    return engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0),
        data_loader=DataLoader(records, batch_size=args.expected_batch_size, collate_fn=collate),
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        steps=args.steps,
        max_physical_batch_size=args.physical_batch_size,
        loss_bound=6.0,
    )


def train(args: argparse.Namespace, model: Any, optimizer: AdaptiveClipDPOptimizer, loader: Any, device: Any) -> None:
    """Take the remaining steps; every rank takes every batch of its loader, which may be a stand-in."""
    rank, steps = dist.get_rank(), args.until or args.steps
    while optimizer.steps_taken < steps:
        for batch in loader:
            before = optimizer.steps_taken
            optimizer.zero_grad()
            losses = reply_losses(model, {name: value.to(device) for name, value in batch.items()})
            optimizer.record_losses(losses)
            losses.mean().backward()
            optimizer.step()
            release = optimizer.released
            if optimizer.steps_taken > before and rank == 0 and release is not None:
                print(f"step {release.step:3d}  noisy loss {release.loss:.3f}  next C {optimizer.max_grad_norm:.4g}")
            if optimizer.steps_taken == steps:
                break


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    device = start()
    rank = dist.get_rank()
    model, records, public, collate = prepare(args)
    model.to(device)
    if args.shard:
        shard(model, args.bf16)
    engine = PrivacyEngine(accountant="vpld", ledger=args.ledger)
    model, optimizer, loader = make_private(args, engine, model, records, collate)
    if args.resume is not None:
        load_checkpoint(engine, model, optimizer, args.resume)
    before = heldout_loss(model, public, collate)  # on every rank: a sharded model needs them all
    train(args, model, optimizer, loader, device)
    with optimizer.ema_weights():
        averaged = heldout_loss(model, public, collate)
    losses = {"before": before, "after": heldout_loss(model, public, collate), "after_averaged": averaged}
    save_checkpoint(engine, model, optimizer, args.output / "checkpoint")
    report = engine.privacy_report(args.delta)
    result = {"role": optimizer.reducer.name, "privacy": report.to_dict(), "heldout_loss": losses}
    if rank == 0:
        print(f"\nHeld-out loss (public dialogues) {losses}\n\n{report}")
        (args.output / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        print(f"\n{dist.get_world_size()} processes ({optimizer.reducer.name}, {device.type}); saved {args.output}")
    dist.barrier()  # no rank ends while another one still talks to it
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()
