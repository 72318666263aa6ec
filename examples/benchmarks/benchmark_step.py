"""How long a private training step takes, and how much memory it needs, beside the ordinary step of the same model.

Each variant (the ordinary step, the modes of this package, Opacus's own) lives in a process of its own that builds the
same model from the same seed. After warm-up steps the processes take turns, in an order shuffled every round, on one
fixed batch; only one works at a time, so that whatever else the machine does falls on all of them alike. The noise is
real (from the system's entropy, as in training), the loader is not: each step is a whole private step (norms, clipping,
noise, update) on the batch in hand. The learning rate is tiny, so that the work does not change while it is measured.

Columns of the tables:

* ms per step (forward, backward, step, zero_grad): median over rounds, and minimum and quartiles; time ratio: median
  over rounds of the variant's time divided by that of ``plain`` in the same round; of minima: ratio of the fastest
  steps, the better one on a machine that others load (its load is printed);
* MB above: peak of the process's memory within a step, above what is resident between steps with the gradients freed
  (model, optimizer state); MB resident: that level, libraries included, where buffers kept between steps would show;
* noise: share of the step that goes when ``noise_multiplier=0``, from the same rounds.

Where oneDNN multiplies faster than torch does (processors of AMD with AVX-512), mode "bk" uses it, which ordinary training could
too; the variants ``-without-onednn`` do not.

Opacus gets this package's explicit rules for RMSNorm and the like (``register_rules``); without them its functorch path
is slower; its strict checks stay on. Its ghost mode refuses tied weights. Waiting processes block on a pipe; their
OpenMP threads spin for some milliseconds and then sleep. What they used is measured and printed. On a GPU the variants are
threads of one process, which take turns as well: its memory is counted by torch's allocator. Where other programs
keep the cores busy, steps of several threads wait for the slowest at every operator: use --threads 1 there. BitNet's
quantisers run without torch.compile, as everything else does; set TORCHDYNAMO_DISABLE=0 to let them compile.

Examples::

    python examples/benchmarks/benchmark_step.py
    python examples/benchmarks/benchmark_step.py --shapes c --variants bk-fused-step opacus-hooks --rounds 5
    python examples/benchmarks/benchmark_step.py --shapes b --profile bk

The exit status is 1 when a variant failed; its traceback goes to stderr and the others are still measured.
"""

from __future__ import annotations

import os

# Read when torch._dynamo is first imported.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import argparse
import contextlib
import ctypes
import gc
import json
import math
import multiprocessing
import multiprocessing.dummy
import platform
import random
import shlex
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import opacus
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

import opacus_ac
from opacus_ac import PrivacyEngine
from opacus_ac.grad_sample import register_rules
from opacus_ac.grad_sample.one_backward import matmul as products
from opacus_ac.loss import fused_causal_lm_loss

Batch = dict[str, Tensor]
MIB = 2**20
PLAIN = "plain"
NO_NOISE = "-no-noise"
LOSS_TOLERANCE = {False: 1e-4, True: 2e-2}  # relative, without and with autocast


@dataclass(frozen=True)
class Shape:
    """A model and a batch; ``at_once`` variants live beside ``plain`` at the same time (0: all of them)."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    batch: int
    length: int
    tied: bool = True
    family: str = "Qwen2"
    lora_rank: int = 0
    at_once: int = 0

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        lora = f", LoRA r{self.lora_rank} on q and v" if self.lora_rank else ""
        size = f"hidden {self.hidden}, {self.layers} layers, vocabulary {self.vocab}"
        return f"{self.family}, {size}, {tied}{lora}; {self.batch} records of {self.length} tokens"


SHAPES = {
    "a-untied": Shape(384, 6, 6, 3, 1056, 8192, 8, 128, tied=False),
    "a-tied": Shape(384, 6, 6, 3, 1056, 8192, 8, 128),
    "b": Shape(512, 4, 8, 4, 1408, 49152, 8, 64),
    "c": Shape(896, 24, 14, 2, 4864, 151936, 2, 64, at_once=1),
    "bitnet": Shape(384, 6, 6, 3, 1056, 8192, 8, 128, family="BitNet"),
    "lora": Shape(512, 4, 8, 4, 1408, 49152, 8, 64, lora_rank=8),
    "gpu": Shape(576, 30, 9, 3, 1536, 49152, 16, 512),
    "tiny": Shape(32, 1, 4, 2, 48, 64, 2, 8, tied=False),
}
QUICK = [name for name in SHAPES if name not in ("c", "gpu", "tiny")]


@dataclass(frozen=True)
class Variant:
    """One way to take a step: ``engine`` is "", "opacus_ac" or "opacus"."""

    engine: str = ""
    mode: str = ""
    noise_multiplier: float = 1.0
    fused_loss: bool = False
    fused_step: bool = False
    onednn: bool = True
    """Whether oneDNN's products may be used where they are faster than torch's own."""


VARIANTS = {
    PLAIN: Variant(),
    "plain-fused-loss": Variant(fused_loss=True),
    "bk": Variant("opacus_ac", "bk"),
    "bk-no-noise": Variant("opacus_ac", "bk", 0.0),
    "bk-without-onednn": Variant("opacus_ac", "bk", onednn=False),
    "bk-fused-loss": Variant("opacus_ac", "bk", fused_loss=True),
    "bk-fused-step": Variant("opacus_ac", "bk", fused_loss=True, fused_step=True),
    "bk-fused-step-no-noise": Variant("opacus_ac", "bk", 0.0, fused_loss=True, fused_step=True),
    "hooks": Variant("opacus_ac", "hooks"),
    "hooks-no-noise": Variant("opacus_ac", "hooks", 0.0),
    "opacus-hooks": Variant("opacus", "hooks"),
    "opacus-ghost": Variant("opacus", "ghost"),
}
DEFAULT_VARIANTS = [name for name in VARIANTS if not name.startswith("hooks")]


def not_applicable(variant: str, shape: Shape) -> str:
    """Why a variant cannot run on a shape by its nature, or ""."""
    if variant == "opacus-ghost" and shape.tied and not shape.lora_rank:
        return "Opacus's ghost mode refuses tied weights"
    return ""


@dataclass(frozen=True)
class Options:
    """What every worker has to know."""

    threads: int = 2
    device: str = "cpu"
    autocast: bool = False
    ema: bool = False
    warmup: int = 4
    rounds: int = 9
    steps_per_round: int = 1
    memory_rounds: int = 3


# ---------------------------------------------------------------- model and batch


def new_model(shape: Shape) -> nn.Module:
    """Return the untrained model, the same at every call."""
    torch.manual_seed(0)
    config = {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": max(shape.length, 512),
        "tie_word_embeddings": shape.tied,
        "use_cache": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if shape.family == "BitNet":
        return _with_bit_linears(transformers.BitNetForCausalLM(transformers.BitNetConfig(**config))).train()
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config))
    if shape.lora_rank:
        from peft import LoraConfig, get_peft_model

        targets = ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=shape.lora_rank, target_modules=targets, task_type="CAUSAL_LM"))
    return model.train()


def _with_bit_linears(model: nn.Module) -> nn.Module:
    """Replace the linear layers by AutoBitLinear in its training form, with the same weights."""
    from transformers.integrations.bitnet import AutoBitLinear, replace_with_bitnet_linear

    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantisation = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    replace_with_bitnet_linear(model, modules_to_not_convert=["lm_head"], quantization_config=quantisation)
    for name, module in model.named_modules():
        if isinstance(module, AutoBitLinear):
            module.weight.data.copy_(weights[name])
            module.requires_grad_(True)
    return model


def new_batch(shape: Shape, device: str) -> Batch:
    """Return the fixed batch of random tokens, every one of them labelled."""
    ids = torch.randint(shape.vocab, (shape.batch, shape.length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device), "labels": ids.to(device)}


# ---------------------------------------------------------------- one variant


class Trial:
    """One variant of one shape, ready to take steps."""

    def __init__(self, shape: Shape, variant: Variant, options: Options) -> None:
        self.options = options
        self.before = torch.cuda.memory_allocated() if options.device == "cuda" else 0
        self.batch = new_batch(shape, options.device)
        self.model: Any = new_model(shape).to(options.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.counts = (sum(p.numel() for p in self.parameters), sum(p.numel() for p in self.model.parameters()))
        self.optimizer: Any = torch.optim.AdamW(self.parameters, lr=1e-6, fused=True)
        self.loss: Callable[[], Any] = self._fused_loss if variant.fused_loss else self._library_loss
        if variant.engine == "opacus_ac":
            self._make_private(shape, variant)
        elif variant.engine == "opacus":
            self._make_private_by_opacus(shape, variant)

    def _library_loss(self) -> Tensor:
        result: Tensor = self.model(**self.batch).loss
        return result

    def _fused_loss(self) -> Tensor:
        logits = self.model(input_ids=self.batch["input_ids"]).logits
        result: Tensor = fused_causal_lm_loss(logits, self.batch["labels"]).mean()
        return result

    def _ghost_loss(self) -> Any:
        logits = self.model(input_ids=self.batch["input_ids"]).logits[:, :-1]
        labels = self.batch["labels"][:, 1:]
        return self.criterion(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), shape=logits.shape)

    def _loader(self, shape: Shape) -> DataLoader[Batch]:
        rows: Any = [{"input_ids": torch.zeros(shape.length, dtype=torch.long)}] * (100 * shape.batch)
        return DataLoader(rows, batch_size=shape.batch)

    def _make_private(self, shape: Shape, variant: Variant) -> None:
        arguments: dict[str, Any] = {"ema_decay": 0.999 if self.options.ema else None}
        if variant.fused_step:
            arguments["fused_step"] = True
        self.model, self.optimizer, _ = PrivacyEngine().make_private(
            module=self.model,
            optimizer=self.optimizer,
            data_loader=self._loader(shape),
            noise_multiplier=variant.noise_multiplier,
            grad_sample_mode=variant.mode,
            **arguments,
        )
        self.optimizer.plan = None  # steps are taken by hand, without the loader

    def _make_private_by_opacus(self, shape: Shape, variant: Variant) -> None:
        register_rules(self.model)
        made = opacus.PrivacyEngine().make_private(
            module=self.model,
            optimizer=self.optimizer,
            criterion=nn.CrossEntropyLoss(),
            data_loader=self._loader(shape),
            noise_multiplier=variant.noise_multiplier,
            max_grad_norm=1.0,
            grad_sample_mode=variant.mode,
        )
        self.model, self.optimizer = made[:2]
        if variant.mode == "ghost":
            self.criterion = made[2]
            self.loss = self._ghost_loss

    def step(self) -> Any:
        """Take one step and free the gradients; return the loss."""
        with torch.autocast(self.options.device, torch.bfloat16, enabled=self.options.autocast):
            value = self.loss()
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def synchronize(self) -> None:
        if self.options.device == "cuda":
            torch.cuda.synchronize()

    def warm_up(self) -> float:
        """Take the first steps and return the loss before them.

        Raises:
            RuntimeError: the last one left the weights as they were, so that it was no whole step.
        """
        first = float(self.step().item())
        for _ in range(self.options.warmup - 2):
            self.step()
        before = [p.detach().reshape(-1)[:64].clone() for p in self.parameters]
        self.step()
        if all(torch.equal(b, p.detach().reshape(-1)[:64]) for b, p in zip(before, self.parameters, strict=True)):
            raise RuntimeError("the last warm-up step did not move the weights: take more of them (--warmup)")
        if self.options.device == "cuda":
            self.synchronize()
            self.own = (torch.cuda.memory_allocated() - self.before) / MIB
        return first

    def time(self, steps: int) -> float:
        """Return the seconds that a step took."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.synchronize()
        return (time.perf_counter() - start) / steps

    def memory(self) -> tuple[float, float]:
        """Return the peak of one step above the level between steps, and that level, in MiB; nan where unknown."""
        release_memory()
        if self.options.device == "cuda":
            self.synchronize()
            torch.cuda.reset_peak_memory_stats()
            level = torch.cuda.memory_allocated()
            self.step()
            self.synchronize()
            return (torch.cuda.max_memory_allocated() - level) / MIB, self.own
        if not reset_peak():
            return math.nan, resident("VmRSS")
        level = resident("VmRSS")
        self.step()
        return resident("VmHWM") - level, level


# ---------------------------------------------------------------- memory of a process


def release_memory() -> None:
    """Hand what is free back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no such function outside glibc
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> bool:
    """Make the process's peak memory start again from what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(name: str) -> float:
    """Return ``VmRSS`` or ``VmHWM`` of this process in MiB; nan without /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return next((float(line.split()[1]) / 1024 for line in lines if line.startswith(name)), math.nan)


# ---------------------------------------------------------------- workers


class Failed(Exception):
    """A worker failed; the message is its traceback."""


def serve(pipe: Connection, shape: Shape, variant: Variant, options: Options) -> None:
    """Body of a worker: do what the parent asks, one thing after the other, and block in between."""
    try:
        prepare_process(options)
        if not variant.onednn:
            products.onednn_is_faster = lambda: False
        trial: Any = None
        idle = Idle()
        while (request := pipe.recv()) != "stop":
            idle.ends()
            if request == "build":
                trial = Trial(shape, variant, options)
                answer: Any = {"loss": trial.warm_up(), "counts": trial.counts}
            elif request == "time":
                answer = trial.time(options.steps_per_round)
            elif request == "memory":
                answer = trial.memory()
            else:
                answer = idle.share()
            pipe.send(("done", answer))
            idle.starts()
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def prepare_process(options: Options) -> None:
    """Set threads and warnings as every measured process has them."""
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")


class Idle:
    """How much of a core this process uses while it waits for its turn."""

    def __init__(self) -> None:
        self.total = [0.0, 0.0]
        self.starts()

    def starts(self) -> None:
        self.since = (time.process_time(), time.perf_counter())

    def ends(self) -> None:
        self.total[0] += time.process_time() - self.since[0]
        self.total[1] += time.perf_counter() - self.since[1]

    def share(self) -> float:
        return self.total[0] / max(self.total[1], 1e-9)


class Worker:
    """The parent's end of one process, or of one thread where the work is on a GPU."""

    def __init__(self, context: Any, shape: Shape, variant: Variant, options: Options) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, shape, variant, options))
        self.process.daemon = True
        self.process.start()
        if options.device == "cpu":
            theirs.close()

    def ask(self, request: str) -> Any:
        """Let the worker do something and return its answer.

        Raises:
            Failed: it failed or died.
        """
        try:
            self.pipe.send(request)
            status, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise Failed(
                f"the process ended with status {self.process.exitcode} (-9: probably out of memory)"
            ) from None
        if status == "failed":
            raise Failed(answer)
        return answer

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("stop")
        self.process.join()
        self.pipe.close()


@dataclass
class Figures:
    """What was measured of one variant of one shape."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    noise_shares: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    resident_mib: list[float] = field(default_factory=list)
    idle_share: float = 0.0
    trained: int = 0
    parameters: int = 0
    failure: str = ""
    note: str = ""


# ---------------------------------------------------------------- measuring


class Group:
    """Variants that live at the same time, ``plain`` always among them."""

    def __init__(self, shape: Shape, names: Sequence[str], options: Options, results: dict[str, Figures]) -> None:
        self.options, self.results = options, results
        self.losses: dict[str, float] = {}
        context: Any = multiprocessing.get_context("spawn") if options.device == "cpu" else multiprocessing.dummy
        self.workers = {name: Worker(context, shape, VARIANTS[name], options) for name in names}

    def ask(self, name: str, request: str) -> Any:
        """Return the worker's answer; None once it has failed, which is noted and reported at once."""
        if name not in self.workers:
            return None
        try:
            return self.workers[name].ask(request)
        except Failed as error:
            self.fail(name, str(error))
            return None

    def fail(self, name: str, message: str) -> None:
        """Take a worker out of the group."""
        self.results[name].failure = message.strip()
        print(f"{name} failed:\n{message}", file=sys.stderr, flush=True)
        self.workers.pop(name).stop()

    def build(self) -> None:
        """Build and warm up one worker after the other; all must compute the same loss."""
        for name in list(self.workers):
            built = self.ask(name, "build")
            if built is None:
                continue
            self.results[name].trained, self.results[name].parameters = built["counts"]
            self.losses[name] = built["loss"]
            wanted = self.losses.get(PLAIN, built["loss"])
            if not math.isclose(built["loss"], wanted, rel_tol=LOSS_TOLERANCE[self.options.autocast]):
                self.fail(name, f"its first loss is {built['loss']:.6f}, that of {PLAIN} {wanted:.6f}")

    def run(self) -> None:
        """Build, time the rounds, measure memory."""
        self.build()
        order, shuffle = list(self.workers), random.Random(0).shuffle
        for number in range(self.options.rounds):
            shuffle(order)
            print(f"round {number + 1} of {self.options.rounds}", file=sys.stderr, flush=True)
            self.note_times({name: seconds for name in order if (seconds := self.ask(name, "time")) is not None})
        for _ in range(self.options.memory_rounds):
            for name in order:
                if (measured := self.ask(name, "memory")) is not None:
                    self.results[name].peak_mib.append(measured[0])
                    self.results[name].resident_mib.append(measured[1])
        for name in order:
            self.results[name].idle_share = max(self.results[name].idle_share, self.ask(name, "idle") or 0.0)

    def note_times(self, times: dict[str, float]) -> None:
        """Keep the times of one round with what is compared within it."""
        for name, seconds in times.items():
            figures = self.results[name]
            figures.seconds.append(seconds)
            if PLAIN in times:
                figures.ratios.append(seconds / times[PLAIN])
            if name + NO_NOISE in times:
                figures.noise_shares.append(1 - times[name + NO_NOISE] / seconds)

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop()


def groups(names: Sequence[str], at_once: int) -> Iterator[list[str]]:
    """Split variants into groups with ``plain`` in each; a variant without noise stays with its noisy one."""
    families: dict[str, list[str]] = {}
    for name in names:
        if name != PLAIN:
            families.setdefault(name.removesuffix(NO_NOISE), []).append(name)
    group: list[str] = []
    for family in families.values():
        if group and at_once and len(group) + len(family) > at_once:
            yield [PLAIN, *group]
            group = []
        group += family
    yield [PLAIN, *group]


def measure(shape: Shape, names: Sequence[str], options: Options, at_once: int) -> dict[str, Figures]:
    """Measure the named variants of a shape, ``plain`` with them."""
    results = {name: Figures(note=not_applicable(name, shape)) for name in dict.fromkeys([PLAIN, *names])}
    for members in groups([name for name, figures in results.items() if not figures.note], at_once):
        print(f"measuring {', '.join(members)}", file=sys.stderr, flush=True)
        group = Group(shape, members, options, results)
        try:
            group.run()
        finally:
            group.stop()
    return results


# ---------------------------------------------------------------- report


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def cell(value: float, pattern: str = ".0f") -> str:
    return "-" if math.isnan(value) else format(value, pattern)


def row(name: str, figures: Figures, plain: Figures) -> str:
    """One line of the table."""
    if figures.note or figures.failure:
        reason = figures.note or f"FAILED: {figures.failure.splitlines()[-1]}"
        return f"| {name} | - | - | - | - | - | - | - | {reason} |"
    ms = [1000 * seconds for seconds in figures.seconds]
    quartiles = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else [median(ms)] * 3
    digits = ".0f" if median(ms) >= 100 else ".1f"
    spread = " / ".join(format(value, digits) for value in (min(ms, default=math.nan), quartiles[0], quartiles[2]))
    peak = median(figures.peak_mib)
    noise = median(figures.noise_shares)
    columns = [
        name,
        cell(median(ms), digits),
        spread,
        cell(median(figures.ratios), ".2f"),
        cell(min(ms, default=math.nan) / 1000 / min(plain.seconds, default=math.nan), ".2f"),
        cell(peak),
        cell(peak / median(plain.peak_mib) if median(plain.peak_mib) > 0 else math.nan, ".2f"),
        cell(median(figures.resident_mib)),
        cell(noise, ".0%"),
    ]
    return f"| {' | '.join(columns)} |"


def report(name: str, shape: Shape, results: dict[str, Figures]) -> str:
    """Return the table of one shape."""
    plain = results[PLAIN]
    trained = f"{plain.trained / 1e6:.1f}M of {plain.parameters / 1e6:.1f}M parameters trained"
    header = [
        "variant",
        "ms per step",
        "min / quartiles",
        "time ratio",
        "of minima",
        "MB above",
        "memory ratio",
        "MB resident",
    ]
    idle = max(figures.idle_share for figures in results.values())
    lines = [
        f"### {name}: {shape}; {trained}",
        "",
        f"| {' | '.join([*header, 'noise'])} |",
        "|---" * (len(header) + 1) + "|",
        *(row(variant, figures, plain) for variant, figures in results.items()),
        "",
        f"{len(plain.seconds)} rounds of {PLAIN}; a waiting process used at most {idle:.1%} of a core; {load()}.",
    ]
    return "\n".join(lines) + "\n"


def load() -> str:
    """How many threads wanted a core lately, those measured here included."""
    try:
        return f"load average {os.getloadavg()[1]:.1f}"
    except (OSError, AttributeError):
        return "load unknown"


def cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(options: Options, arguments: Sequence[str]) -> dict[str, str]:
    """What the figures depend on beside the code."""
    versions = [f"{m.__name__} {m.__version__}" for m in (opacus_ac, opacus, torch, transformers)]
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_model()
    return {
        "versions": ", ".join(versions),
        "device": f"{device} ({torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores)",
        "threads": f"threads: {options.threads}",
        "products": f"products of mode bk: {'oneDNN' if products.onednn_is_faster() else 'as of torch'}",
        "dtype": "float32, bfloat16 autocast" if options.autocast else "float32",
        "command": shlex.join(["python", "examples/benchmarks/benchmark_step.py", *arguments]),
    }


def profile(shape: Shape, variant: Variant, options: Options) -> str:
    """Return the most expensive operators of one variant, from three steps in this process."""
    prepare_process(options)
    trial = Trial(shape, variant, options)
    trial.warm_up()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        trial.time(3)
    return profiler.key_averages().table(sort_by=f"self_{options.device}_time_total", row_limit=20)


# ---------------------------------------------------------------- command line


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return int(text)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of a private step beside the ordinary one.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=QUICK, metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=DEFAULT_VARIANTS, metavar="NAME", help=", ".join(VARIANTS)
    )
    parser.add_argument("--rounds", type=positive, default=Options.rounds)
    parser.add_argument("--steps-per-round", type=positive, default=Options.steps_per_round)
    parser.add_argument("--memory-rounds", type=positive, default=Options.memory_rounds)
    parser.add_argument("--warmup", type=int, choices=range(2, 100), default=Options.warmup, metavar="STEPS")
    parser.add_argument("--threads", type=positive, default=Options.threads)
    parser.add_argument("--device", choices=["cpu", "cuda"], default=Options.device)
    parser.add_argument("--autocast", choices=["bf16"], help="forward pass and loss under bfloat16 autocast")
    parser.add_argument("--ema", action="store_true", help="keep the average of the weights, as make_private does")
    parser.add_argument(
        "--at-once", type=int, help="variants alive beside plain at a time, 0 for all (default: all, but 1 for c)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures")
    parser.add_argument("--profile", choices=VARIANTS, metavar="NAME", help="print the top operators of one variant")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; return 1 when a variant failed."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parse(given)
    values = {name: getattr(arguments, name) for name in asdict(Options())} | {"autocast": bool(arguments.autocast)}
    options = Options(**values)
    facts = environment(options, given)
    print("; ".join(facts.values()) + "\n", flush=True)
    failed, raw = False, {}
    for name in dict.fromkeys(arguments.shapes):
        shape = SHAPES[name]
        if arguments.profile:
            print(f"{name}: {arguments.profile}\n{profile(shape, VARIANTS[arguments.profile], options)}")
            continue
        at_once = shape.at_once if arguments.at_once is None else arguments.at_once
        results = measure(shape, arguments.variants, options, at_once)
        print(report(name, shape, results), flush=True)
        raw[name] = {variant: asdict(figures) for variant, figures in results.items()}
        failed = failed or any(figures.failure for figures in results.values())
        if arguments.json:
            arguments.json.write_text(json.dumps({"environment": facts, "shapes": raw}, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
