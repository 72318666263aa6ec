"""The main rows of the study on a real chat model: SmolLM2-135M with LoRA, flat clipping beside DP-Adam-AC and the paper's settings.

    python examples/studies/chat_model_study.py --seeds 0 1 2          # go on where it stopped
    python examples/studies/chat_model_study.py --seeds 0 1 2 --report
    python examples/studies/chat_model_study.py --steps 30 --expected-batch-size 128 --physical-batch-size 128    # on a GPU

Both tones, epsilon 1 to 16, delta 1e-5. All rows train as ``common/chat_run.py`` does, which also takes options of its own here.
Noise and draws are secret entropy, different in every run: the spread over seeds holds it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from common import chat_run
from common.chat_data import FOUR_PROMPTS, ChatDataset, PadCollate, generate_replies, heldout_loss
from common.results import Result, append, mean_and_spread, read
from common.tone_dialogues import TONES, tone_score
from small_model.report import grouped, markdown

from opacus_ac import PrivacyEngine

EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0)
CLIPPING: dict[str, dict[str, Any]] = {"flat": {"clipping": "flat"}, "dp-adam-ac": {}, "paper": {"preset": "paper"}}
SIZE = ["--lora-layers", "6", "--expected-batch-size", "32", "--steps", "10"]


_ENCODED: dict[Any, Any] = {}  # of the latest tone and seed: its runs come one after the other


def encoded(tone: str, seed: int, options: tuple[str, ...], args: argparse.Namespace, tokenizer: Any) -> Any:
    """Return the private dataset and the public ones by tone."""
    key = (tone, seed, options)
    if key not in _ENCODED:
        _ENCODED.clear()
        private, public = chat_run.load_dialogues(args)
        sets = {name: ChatDataset(rows, tokenizer, args.max_length) for name, rows in public.items()}
        _ENCODED[key] = ChatDataset(private, tokenizer, args.max_length), sets
    return _ENCODED[key]


def run(clipping: str, tone: str, epsilon: float, seed: int, options: list[str], folder: Path) -> Result:
    """Train once and return what came out."""
    own = ["--tone", tone, "--epsilon", str(epsilon), "--seed", str(seed), "--output", str(folder)]
    args = chat_run.arguments([*SIZE, *options, *own])
    args.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = chat_run.prepare(args)
    collate = PadCollate(tokenizer.pad_token_id, args.max_length)
    dataset, sets = encoded(tone, seed, tuple(options), args, tokenizer)
    before = heldout_loss(model, sets[tone], collate)
    engine, clock = PrivacyEngine(accountant="vpld"), time.process_time()
    optimizer = chat_run.train(args, engine, model, dataset, collate, **CLIPPING[clipping])
    seconds = time.process_time() - clock
    with optimizer.ema_weights():
        averaged = heldout_loss(model, sets[tone], collate)
    replies = generate_replies(model, tokenizer, FOUR_PROMPTS)
    other = next(t for t in TONES if t != tone)
    return {
        "method": clipping,
        "tone": tone,
        "epsilon": epsilon,
        "seed": seed,
        "options": options,
        "spent": engine.get_epsilon(args.delta),
        "loss_before": before,
        "loss": heldout_loss(model, sets[tone], collate),
        "averaged": averaged,
        "other_tone": heldout_loss(model, sets[other], collate),
        "in_tone": sum(tone_score(text, tone) > tone_score(text, other) for text in replies),
        "cpu_seconds": round(seconds, 1),
    }


def table(results: list[Result]) -> str:
    """Return one row per tone, epsilon and clipping."""
    rows = []
    for (tone, epsilon, method), mine in grouped(results, "tone", "epsilon", "method").items():
        losses = [
            mean_and_spread([r[name] for r in mine]) for name in ("loss_before", "loss", "averaged", "other_tone")
        ]
        replies = f"{sum(r['in_tone'] for r in mine)} of {len(FOUR_PROMPTS) * len(mine)}"
        rows.append([tone, f"{epsilon:g}", method, str(len(mine)), *losses, replies])
    return markdown(
        [
            "tone",
            "epsilon",
            "clipping",
            "runs",
            "before",
            "after",
            "averaged weights",
            "other tone after",
            "replies in tone",
        ],
        rows,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, or report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tones", choices=TONES, nargs="+", default=TONES)
    parser.add_argument("--clippings", choices=CLIPPING, nargs="+", default=list(CLIPPING))
    parser.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    parser.add_argument("--out", type=Path, default=Path("runs/study/chat_model.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the table of what is finished; run nothing")
    own, options = parser.parse_known_args(argv)
    done = {(r["method"], r["tone"], r["epsilon"], r["seed"]) for r in read(own.out) if r["options"] == options}
    for seed, tone, epsilon, method in product(own.seeds, own.tones, own.epsilons, own.clippings):
        if own.report or (method, tone, epsilon, seed) in done:
            continue
        result = run(method, tone, epsilon, seed, options, own.out.with_suffix(".run"))
        append(own.out, result)
        print(json.dumps(result), flush=True)
    print(table([r for r in read(own.out) if r["options"] == options]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
