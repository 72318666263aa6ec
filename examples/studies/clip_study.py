"""Does the default clip policy need a good C0? It is compared with the best fixed clipping norm at the same epsilon.

A small Qwen2-shaped model learns the angry tone without privacy (a public stand-in, made once and kept in ``--cache``)
and is then fine-tuned, all weights, with DP-AdamW on loving dialogues. Every configuration has the same noise
multiplier, sample rate and number of steps, so the accounted mechanism is the same; the clip rule is all that differs:

* ``flat-C``: ``clipping="flat"``, the noise of Opacus;
* ``default-C0``: the defaults of ``make_private`` from that C0;
* ``paper``: ``preset="paper"`` (target clip rate 0.2, not normalised, C0 = 3), for contrast.

Loss: mean over held-out records of the record's mean over its reply tokens, at the current weights; the loss at the
averaged weights is a column of its own. Runs with the same seed share private data, Poisson draws and gradient noise
(common random numbers), so that differences between rows come from the clip rule and not from chance; the statistics have
noise of their own. A seeded noise protects nobody: the data is synthetic, and this is a study.

Example: ``python examples/studies/clip_study.py --seeds 0 1 2 --jobs 2``, then the same with ``--report``. The exit status is 1
when a default run ends more than 3 % above the best flat C (or when runs are missing).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from study_data.tone_dialogues import Dialogue, dialogues, train_and_heldout
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Qwen2Config, Qwen2ForCausalLM

from opacus_ac import PrivacyEngine
from opacus_ac.errors import NotPrivateWarning
from opacus_ac.loss import per_record_causal_lm_loss

Row = dict[str, Tensor]
Result = dict[str, Any]
FLAT = (0.3, 3.0, 10.0, 30.0)
DEFAULT = (0.01, 1.0, 100.0)
NAMES = (*(f"flat-{c:g}" for c in FLAT), *(f"default-{c:g}" for c in DEFAULT), "paper")
SPECIAL = ("<pad>", "<user>", "<reply>", "<end>")
PAD, USER, REPLY, END = range(4)
TOLERANCE = 0.03
DELTA = 1e-5


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on beside the clip rule, the data seed and chance."""

    hidden: int = 128
    layers: int = 3
    vocab: int = 700
    max_prompt: int = 12
    max_length: int = 48
    public_records: int = 10_000
    public_steps: int = 300
    public_batch: int = 64
    public_lr: float = 3e-3
    records: int = 10_000
    heldout: int = 250
    batch: int = 192
    steps: int = 50
    lr: float = 0.004
    noise_multiplier: float = 0.8
    physical: int = 64

    def key(self) -> str:
        """Short name of these settings: results of others are never mixed with theirs."""
        return _digest(asdict(self))

    def public_key(self) -> str:
        """Short name of what tokenizer and public model depend on."""
        shape = ("hidden", "layers", "vocab", "max_prompt", "max_length")
        return _digest({k: v for k, v in asdict(self).items() if k in shape or k.startswith("public_")})


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- data and model


def public_tokenizer(settings: Settings, cache: Path) -> ByteLevelBPETokenizer:
    """Byte-level BPE of the public text, trained once; private text never reaches it."""
    files = [cache / f"{settings.public_key()}-{name}" for name in ("vocab.json", "merges.txt")]
    if not all(file.is_file() for file in files):
        texts = (m["content"] for d in dialogues("angry", settings.public_records) for m in d["messages"])
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(
            texts, vocab_size=settings.vocab, special_tokens=list(SPECIAL), show_progress=False
        )
        cache.mkdir(parents=True, exist_ok=True)
        tokenizer.save_model(str(cache), settings.public_key())
    return ByteLevelBPETokenizer(*map(str, files))


def encode(dialogue: Dialogue, tokenizer: ByteLevelBPETokenizer, settings: Settings) -> Row:
    """One dialogue as one row of ``max_length`` tokens; only replies carry labels.

    Of what the user says the last ``max_prompt`` tokens are kept, so that a short row holds most of the reply.
    """
    max_length = settings.max_length
    ids: list[int] = []
    labels: list[int] = []
    for message in dialogue["messages"]:
        text = tokenizer.encode(message["content"]).ids
        if message["role"] == "user":
            text = text[-settings.max_prompt :]
            ids += [USER, *text, REPLY]
            labels += [-100] * (len(text) + 2)
        else:
            ids += [*text, END]
            labels += [*text, END]
    length = min(len(ids), max_length)
    padding = max_length - length
    return {
        "input_ids": torch.tensor(ids[:length] + [PAD] * padding),
        "attention_mask": torch.tensor([1] * length + [0] * padding),
        "labels": torch.tensor(labels[:length] + [-100] * padding),
    }


def encode_all(records: Iterable[Dialogue], tokenizer: ByteLevelBPETokenizer, settings: Settings) -> list[Row]:
    return [encode(record, tokenizer, settings) for record in records]


def new_model(settings: Settings) -> Qwen2ForCausalLM:
    """Return the untrained model, the same at every call."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    return Qwen2ForCausalLM(config).train()


def pretrain(settings: Settings, cache: Path) -> Path:
    """Return the file of the model that was trained, without privacy, on the public tone; train it if it is missing."""
    path = cache / f"{settings.public_key()}-public.pt"
    if path.is_file():
        return path
    rows = encode_all(dialogues("angry", settings.public_records), public_tokenizer(settings, cache), settings)
    model = new_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.public_lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.public_lr, total_steps=settings.public_steps
    )
    batches = _forever(DataLoader(rows, batch_size=settings.public_batch, shuffle=True, drop_last=True))
    for _ in range(settings.public_steps):
        optimizer.zero_grad()
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    print(f"public model: loss {loss.item():.3f} in its last step -> {path}", file=sys.stderr, flush=True)
    torch.save(model.state_dict(), path)
    return path


def _forever(loader: Iterable[Row]) -> Iterator[Row]:
    while True:
        yield from loader


@torch.no_grad()
def heldout_loss(model: torch.nn.Module, rows: list[Row]) -> float:
    """Mean over records of each record's mean loss over its reply tokens."""
    was_training = model.training
    model.eval()
    losses = []
    for batch in DataLoader(rows, batch_size=64):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        losses.append(per_record_causal_lm_loss(logits, batch["labels"]))
    model.train(was_training)
    return torch.cat(losses).mean().item()


# ---------------------------------------------------------------- one run


def clip_arguments(name: str) -> dict[str, Any]:
    """Arguments of ``make_private`` for a configuration such as ``flat-3``, ``default-0.01`` or ``paper``.

    Raises:
        ValueError: no such configuration.
    """
    kind, _, number = name.partition("-")
    try:
        if name == "paper":
            return {"preset": "paper"}
        return {"flat": {"clipping": "flat"}, "default": {}}[kind] | {"max_grad_norm": float(number)}
    except (KeyError, ValueError):
        raise ValueError(f"unknown configuration {name!r}: flat-C, default-C0 or paper") from None


def run(name: str, seed: int, settings: Settings, cache: Path) -> Result:
    """Fine-tune once and return one row of results: losses, epsilon, and the released course of C."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", category=NotPrivateWarning)
    start = time.perf_counter()
    tokenizer = public_tokenizer(settings, cache)
    train, heldout = train_and_heldout("loving", settings.records, settings.heldout, seed)
    rows, held_rows = encode_all(train, tokenizer, settings), encode_all(heldout, tokenizer, settings)
    model = new_model(settings)
    model.load_state_dict(torch.load(pretrain(settings, cache), weights_only=True))
    before = heldout_loss(model, held_rows)
    arguments = clip_arguments(name) | {"noise_generator": torch.Generator().manual_seed(seed)}
    course, epsilon, ema = fine_tune(model, rows, settings, arguments, held_rows)
    return {
        "name": name,
        "seed": seed,
        "settings": settings.key(),
        "steps": settings.steps,
        "epsilon": epsilon,
        "loss_before": before,
        "loss": heldout_loss(model, held_rows),
        "loss_ema": ema,
        **course,
        "seconds": round(time.perf_counter() - start, 1),
    }


def fine_tune(
    model: torch.nn.Module, rows: list[Row], settings: Settings, arguments: dict[str, Any], heldout: list[Row]
) -> tuple[dict[str, list[float | None]], float, float]:
    """Train ``model`` privately in place.

    Returns:
        What was released per step (C, noisy clip rate, learning-rate multiplier), epsilon at ``DELTA``, and the
        held-out loss at the averaged weights.
    """
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0),
        data_loader=DataLoader(rows, batch_size=settings.batch, shuffle=True),
        noise_multiplier=settings.noise_multiplier,
        grad_sample_mode="hooks",
        max_physical_batch_size=settings.physical,
        **arguments,
    )
    course: dict[str, list[float | None]] = {"C": [], "clip_rate": [], "lr_multiplier": []}
    batches = _forever(loader)
    while optimizer.steps_taken < settings.steps:
        taken = optimizer.steps_taken
        optimizer.zero_grad()
        private(**next(batches)).loss.backward()
        optimizer.step()
        if optimizer.steps_taken > taken and optimizer.released is not None:
            released = optimizer.released
            course["C"].append(released.max_grad_norm)
            course["clip_rate"].append(released.clip_rate)
            course["lr_multiplier"].append(released.lr_multiplier)
    with optimizer.ema_weights():
        ema = heldout_loss(model, heldout)
    engine.detach(private)
    return course, engine.get_epsilon(DELTA), ema


def run_all(wanted: list[tuple[str, int]], settings: Settings, cache: Path, out: Path, jobs: int) -> None:
    """Run what is wanted and append each result to ``out`` as soon as it is there."""
    pretrain(settings, cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(run, name, seed, settings, cache) for name, seed in wanted]
        for number, future in enumerate(as_completed(futures), start=1):
            result = future.result()
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(result) + "\n")
            line = f"[{number}/{len(futures)}] {result['name']} seed {result['seed']}: loss {result['loss']:.4f}"
            print(f"{line}, {result['seconds']:.0f} s", flush=True)


# ---------------------------------------------------------------- report


def read_results(out: Path, settings: Settings) -> list[Result]:
    """Return the finished runs of these settings; a torn last line is dropped."""
    results = []
    for line in out.read_text(encoding="utf-8").splitlines() if out.is_file() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if result["settings"] == settings.key():
            results.append(result)
    return results


def summarise(results: list[Result]) -> list[Result]:
    """Return one row per configuration: mean and spread over seeds, and the ratio to the best flat C."""
    table = []
    for name in dict.fromkeys(result["name"] for result in results):
        mine = [result for result in results if result["name"] == name]
        losses = [result["loss"] for result in mine]
        table.append(
            {
                "name": name,
                "runs": len(mine),
                "before": statistics.fmean(result["loss_before"] for result in mine),
                "loss": statistics.fmean(losses),
                "spread": statistics.stdev(losses) if len(losses) > 1 else math.nan,
                "ema": statistics.fmean(result["loss_ema"] for result in mine),
                "last_C": statistics.fmean(result["C"][-1] for result in mine),
                "epsilon": statistics.fmean(result["epsilon"] for result in mine),
            }
        )
    best = min((row["loss"] for row in table if row["name"].startswith("flat-")), default=math.nan)
    for row in table:
        row["ratio"] = row["loss"] / best
    order = {name: i for i, name in enumerate(NAMES)}
    return sorted(table, key=lambda row: (order.get(row["name"], len(order)), row["name"]))


def verdict(table: list[Result], seeds: int) -> tuple[bool, str]:
    """Say whether every default run ends within the tolerance of the best flat C, over enough seeds."""
    needed = [f"flat-{c:g}" for c in FLAT] + [f"default-{c:g}" for c in DEFAULT]
    runs = {row["name"]: row["runs"] for row in table}
    missing = [name for name in needed if runs.get(name, 0) < seeds]
    worst = max((row["ratio"] for row in table if row["name"].startswith("default-")), default=math.nan)
    text = f"worst default / best flat = {worst:.4f} (criterion: at most {1 + TOLERANCE:.2f})"
    if missing:
        return False, f"{text}; INCOMPLETE, fewer than {seeds} seeds: {', '.join(missing)}"
    met = worst <= 1 + TOLERANCE
    return met, f"{text}: {'met' if met else 'NOT MET'}"


def report(out: Path, settings: Settings, seeds: int) -> int:
    """Print the table and return the exit status."""
    table = summarise(read_results(out, settings))
    print(f"settings {settings.key()}: {asdict(settings)}")
    print("| configuration | runs | held-out loss | std over seeds | ratio to best flat | EMA loss | last C |")
    print("|---|---|---|---|---|---|---|")
    for row in table:
        print(
            f"| {row['name']} | {row['runs']} | {row['loss']:.4f} | {row['spread']:.4f} | {row['ratio']:.4f} "
            f"| {row['ema']:.4f} | {row['last_C']:.3g} |"
        )
    if table:
        epsilons = {round(row["epsilon"], 6) for row in table}
        print(f"loss before: {table[0]['before']:.4f}; epsilon at delta {DELTA:g}: {sorted(epsilons)}")
    relative = [row["spread"] / row["loss"] * math.sqrt(2 / row["runs"]) for row in table if row["runs"] > 1]
    if relative:
        print(
            f"standard error of a ratio between two rows: below {100 * statistics.median(relative):.1f} %, as rows share their noise"
        )
    met, text = verdict(table, seeds)
    print(text)
    return 0 if met else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the configurations that are not finished yet, or report."""
    parser = argparse.ArgumentParser(description="Compare the default clip policy with the best flat C.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", metavar="NAME", default=NAMES, help=f"of {', '.join(NAMES)}, or any C")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--cache", type=Path, default=Path("runs/clip_study"))
    parser.add_argument("--out", type=Path, default=Path("runs/clip_study/results.jsonl"))
    parser.add_argument("--report", action="store_true", help="print the table of what is finished; run nothing")
    arguments = parser.parse_args(argv)
    settings = Settings(steps=arguments.steps)
    if arguments.report:
        return report(arguments.out, settings, len(set(arguments.seeds)))
    for name in arguments.only:
        clip_arguments(name)
    done = {(result["name"], result["seed"]) for result in read_results(arguments.out, settings)}
    wanted = [(name, seed) for seed in arguments.seeds for name in arguments.only if (name, seed) not in done]
    if wanted:
        run_all(wanted, settings, arguments.cache, arguments.out, arguments.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
