"""Fine-tune on private records on several processes: the loop of one process, under torchrun.

    torchrun --nproc_per_node=2 examples/finetune_distributed.py                  # a tiny random model, on CPUs or GPUs
    torchrun --nproc_per_node=2 examples/finetune_distributed.py --shard          # FSDP2
    torchrun --nproc_per_node=8 examples/finetune_distributed.py --shard --model path/to/model --data chats.jsonl
    torchrun --nproc_per_node=2 examples/finetune_distributed.py --until 5 --output runs/first
    torchrun --nproc_per_node=4 examples/finetune_distributed.py --shard --resume runs/first/checkpoint --output runs/second

With NCCL when there is a GPU for each process, else with gloo on CPUs. The noise comes from the operating systems of the ranks,
the draw of records from that of rank 0; ``--seed`` is for the start of the tiny model only.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader
from transformers import Qwen2Config, Qwen2ForCausalLM

from opacus_ac import PrivacyEngine
from opacus_ac.integrations.finetune import ChatDataset, PadCollate
from opacus_ac.integrations.finetune.chat_data import read_dialogues
from opacus_ac.models.default_model import load_model

TINY = Qwen2Config(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, use_cache=False, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--model", help="folder or hub name of a chat model, with --data (default: tiny, random weights)"
    )
    parser.add_argument("--data", type=Path, help="PRIVATE dialogues, with --model (default: invented sentences)")
    parser.add_argument("--shard", action="store_true", help="FSDP2: each rank has a part of every weight")
    parser.add_argument("--bf16", action="store_true", help="with --shard: forward and backward passes in bfloat16")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=12, help="steps that the budget is planned for")
    parser.add_argument("--until", type=int, help="stop after this many of them; --resume goes on")
    parser.add_argument("--expected-batch-size", type=int, default=64, help="of all ranks together")
    parser.add_argument("--physical-batch-size", type=int, default=8, help="on one rank; memory only")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ledger", type=Path, help="privacy ledger; rank 0 has it")
    parser.add_argument("--resume", type=Path, help="checkpoint of an earlier run, on any number of processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_distributed"))
    args = parser.parse_args(argv)
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    return args


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


def sentence(number: int) -> dict[str, torch.Tensor]:
    """Return an invented sentence as bytes, for the model that knows nothing else."""
    codes = torch.tensor(list(f"{number} and {number % 7} are {number + number % 7}.".encode()))
    return {"input_ids": codes, "labels": codes}


def prepare(args: argparse.Namespace) -> tuple[Any, Any, PadCollate]:
    """Return model, private records and collate function, the same on every rank."""
    torch.manual_seed(args.seed)
    if args.model is None:
        return Qwen2ForCausalLM(TINY).train(), [sentence(n) for n in range(480)], PadCollate(0, 32)
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    records = ChatDataset(read_dialogues(args.data), tokenizer, 96)
    return model.train(), records, PadCollate(tokenizer.pad_token_id, 96)


def shard(model: Any, bf16: bool) -> None:
    """Shard each block, and the rest with the model itself: tied embeddings stay together."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if bf16 else MixedPrecisionPolicy()
    for block in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def train(model: Any, optimizer: Any, loader: Any, steps: int, device: torch.device) -> None:
    """Take the remaining steps; every rank takes every batch of its loader, which may be a stand-in."""
    while optimizer.steps_taken < steps:
        for batch in loader:
            before = optimizer.steps_taken
            optimizer.zero_grad()
            model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
            optimizer.step()
            release = optimizer.released
            if optimizer.steps_taken > before and dist.get_rank() == 0:
                print(f"step {release.step:3d}  noisy loss {release.loss:.3f}  next C {optimizer.max_grad_norm:.4g}")
            if optimizer.steps_taken == steps:
                break


@torch.no_grad()
def public_loss(model: Any, device: torch.device) -> float:
    """Return the loss of the tiny model on a sentence that is no private one, on every rank: a sharded model needs them all."""
    batch = {name: value[None].to(device) for name, value in sentence(1000).items()}
    return model.eval()(**batch).loss.item()


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    device = start()
    model, records, collate = prepare(args)
    model.to(device)
    if args.shard:
        shard(model, args.bf16)
    engine = PrivacyEngine(accountant="vpld", ledger=args.ledger)
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0),  # after fully_shard
        data_loader=DataLoader(records, batch_size=args.expected_batch_size, collate_fn=collate),
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        steps=args.steps,
        max_physical_batch_size=args.physical_batch_size,
        loss_bound=6.0,
    )
    if args.resume is not None:
        engine.load_checkpoint(path=args.resume, module=model, optimizer=optimizer)
    before = public_loss(model, device) if args.model is None else None
    train(model.train(), optimizer, loader, args.until or args.steps, device)
    after = public_loss(model, device) if args.model is None else None
    engine.save_checkpoint(path=args.output / "checkpoint", module=model, optimizer=optimizer, folder=True)
    report = engine.privacy_report(args.delta)
    losses = {"before": before, "after": after}
    result = {"role": optimizer.reducer.name, "privacy": report.to_dict(), "public_loss": losses}
    if dist.get_rank() == 0:
        print(f"\nLoss on a public sentence {losses}\n\n{report}")
        (args.output / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        print(f"\n{dist.get_world_size()} processes ({optimizer.reducer.name}, {device.type}); saved {args.output}")
    dist.barrier()  # no rank ends while another one still talks to it
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()
