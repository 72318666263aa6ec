"""Check this package on a GPU: is it exact there, how fast is it, and how much memory does it need?

One command of about eight minutes on one card for data centres:

    python examples/benchmarks/device_check.py

It needs the checkout, the packages of ``pip install -e ".[test]"``, and no network: models have the shapes of Qwen2.5-0.5B,
BitNet-b1.58-2B, Llama-3-8B, OPT-2.7B and ViT-B, with random weights. Its parts:

* exactness: the tests that take a device, among them every policy, mode and route, float32, bfloat16 autocast, checkpointing,
  the fused step, zeroth order, and FSDP2 on one rank;
* speed and memory of a step, beside the ordinary step and Opacus's, in turn, and how often a step waits for the device;
* the noise kernel beside the processor;
* peak memory against the length of a record.

Every entry has a time limit. What fails, or does not fit into memory, is a row with the reason. Results are kept in
``--out``, a line for each entry that has ended; the same command goes on with what is missing. A page of tables is printed at
the end and written to ``report.md`` beside them. On a GPU it says of every target whether it was reached.

``--tiny --device cpu`` runs every line with models of a few thousand weights; its figures mean nothing.

The exit status is 1 when an entry failed, 3 when there was no time for all of them, else 0.
"""

from __future__ import annotations

import os

# Read when torch._dynamo is first imported.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from device_checks.entries import ENTRIES, Process, allowance
from device_checks.report import whole
from device_checks.results import FAILED, Results
from step_benchmark.tables import cpu_model

PACKAGES = ("opacus_ac", "torch", "opacus", "transformers", "peft", "triton")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Exactness, speed and memory of this package on a device.")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument(
        "--tiny", action="store_true", help="models of a few thousand weights, to test the script itself"
    )
    parser.add_argument(
        "--only", nargs="+", default=list(ENTRIES), choices=ENTRIES, metavar="ENTRY", help=", ".join(ENTRIES)
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="no entry begins later (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("runs/device_check"), help="folder of the results")
    parser.add_argument("--again", action="store_true", help="run entries that failed once more")
    return parser.parse_args(argv)


def origin(device: str, tiny: bool) -> dict[str, str]:
    """What results must have in common to stand in one table."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_model()
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    sizes = "tiny" if tiny else "as people train"
    return {"device": name, "runtime": runtime if device == "cuda" else "processor", "sizes": sizes, **versions}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what has no result yet, print the tables, and return the exit status."""
    arguments = parse(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    facts = origin(device, arguments.tiny)
    try:
        results = Results(arguments.out / "results.jsonl", facts)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    again = {name for name, one in results.found.items() if one.status == FAILED} if arguments.again else set()
    process, start = Process(device, arguments.tiny), time.monotonic()
    try:
        for name in arguments.only:
            if name in results.found and name not in again:
                continue
            left = 60 * arguments.minutes - (time.monotonic() - start)
            if left <= 0:
                break
            print(f"{name} ...", file=sys.stderr, flush=True)
            result = process.run(name, arguments.out, allowance(name))
            print(f"{name}: {result.status} in {result.seconds:.0f} s {result.reason}", file=sys.stderr, flush=True)
            results.add(result)
    finally:
        process.stop()
    page = whole(results.found, facts, arguments.only, judge=device == "cuda")
    (arguments.out / "report.md").write_text(page, encoding="utf-8")
    print(page)
    found = [results.found.get(name) for name in arguments.only]
    if any(one is not None and one.status == FAILED for one in found):
        return 1
    return 3 if None in found else 0


if __name__ == "__main__":
    sys.exit(main())
