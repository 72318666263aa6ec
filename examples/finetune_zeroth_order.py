"""Fine-tune a chat model on private dialogues with forward passes only (DP-AggZO).

    python examples/studies/common/tone_dialogues.py --tone loving --n 10000 --out loving.jsonl    # invented dialogues
    python examples/finetune_zeroth_order.py loving.jsonl --heldout public.jsonl                   # SmolLM2-135M

Trained is one vector, which is added to the output of a layer. A step along K random directions sees the more of the gradient the
fewer weights there are. All that is printed or saved is public or a release that epsilon covers.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from opacus_ac import PrivacyEngine
from opacus_ac.integrations.finetune import ChatDataset, PadCollate
from opacus_ac.integrations.finetune.chat_data import read_dialogues
from opacus_ac.models.default_model import ModelUnavailableError, load_model
from opacus_ac.zeroth_order import preset, record_losses


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("data", type=Path, help="PRIVATE dialogues: JSON lines with messages, see docs/command-line.md")
    parser.add_argument("--heldout", type=Path, help="PUBLIC dialogues to evaluate on")
    parser.add_argument(
        "--model", help="folder or hub name of a Llama-like chat model (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--directions", type=int, default=8, help="K: a step takes 2K forward passes")
    parser.add_argument("--batch", type=int, default=16, help="expected records of a step")
    parser.add_argument("--max-length", type=int, default=64, help="tokens per dialogue; longer ones are cut")
    parser.add_argument("--layer", type=int, default=-6, help="the vector is added to the output of this layer")
    parser.add_argument("--lr", type=float, default=150.0)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune_zeroth_order.pt"))
    return parser.parse_args(argv)


def add_vector(model: Any, layer: int) -> nn.Parameter:
    """Freeze ``model`` and add a trained vector to the output of one layer: the bias of what it writes last."""
    model.requires_grad_(False)
    last = model.model.layers[layer].mlp.down_proj
    last.bias = nn.Parameter(torch.zeros(model.config.hidden_size))
    return last.bias


@torch.no_grad()
def mean_loss(model: Any, public: Dataset[Any] | None, collate: PadCollate) -> float:
    """Return the mean loss of public records; nan without any."""
    batches = DataLoader(public, batch_size=16, collate_fn=collate) if public is not None else ()
    losses = [record_losses(model, batch) for batch in batches]
    return torch.cat(losses).mean().item() if losses else float("nan")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    model, tokenizer = load_model(args.model, dtype=torch.float32)
    vector = add_vector(model.eval(), args.layer)
    private = ChatDataset(read_dialogues(args.data), tokenizer, args.max_length)
    public = ChatDataset(read_dialogues(args.heldout), tokenizer, args.max_length) if args.heldout else None
    collate = PadCollate(tokenizer.pad_token_id, args.max_length)
    before = mean_loss(model, public, collate)
    engine = PrivacyEngine(accountant="vpld")
    _, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD([vector], lr=args.lr),
        data_loader=DataLoader(private, batch_size=args.batch, collate_fn=collate),
        target_epsilon=args.epsilon,
        target_delta=args.delta,
        steps=args.steps,
        zeroth_order=preset("aggzo", num_directions=args.directions, smoothing=1.0, ema_decay=0.9),
        max_grad_norm=0.1,
        loss_bound=6.0,
    )
    while optimizer.steps_taken < args.steps:
        for batch in loader:
            optimizer.step(lambda batch=batch: record_losses(model, batch))
            print(f"step {optimizer.steps_taken}: noisy loss {optimizer.released.loss:.3f}")
            if optimizer.steps_taken == args.steps:
                break
    after, report = mean_loss(model, public, collate), engine.privacy_report(args.delta)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(vector.detach(), args.output)
    print(f"\nloss on public dialogues: {before:.3f} before, {after:.3f} after\n\n{report}\n\nSaved {args.output}")
    return {"privacy": report.to_dict(), "before": before, "after": after}


if __name__ == "__main__":
    try:
        main()
    except (ModelUnavailableError, ValueError, OSError) as error:
        raise SystemExit(f"finetune_zeroth_order: {error}") from None
