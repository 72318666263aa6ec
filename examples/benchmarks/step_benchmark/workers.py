"""Processes that take steps when they are asked to, one of them at a time."""

from __future__ import annotations

import contextlib
import time
import traceback
import warnings
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from opacus_ac.grad_sample.one_backward import matmul as products
from step_benchmark.memory import release_memory
from step_benchmark.shapes import Shape
from step_benchmark.syncs import count_syncs
from step_benchmark.variants import Options, Variant


def in_processes(options: Options) -> bool:
    """Say whether variants have processes of their own; else they are threads that take turns."""
    return options.apart and options.device == "cpu"


class Failed(Exception):
    """A worker failed; the message is its traceback."""


def serve(pipe: Connection, shape: Shape, variant: Variant, options: Options) -> None:
    """Body of a worker: do what the parent asks, one thing after the other, and block in between."""
    try:
        prepare_process(options)
        if not variant.onednn:
            products.onednn_is_faster = lambda *_: False
        trial: Any = None
        idle = Idle()
        while (request := pipe.recv()) != "stop":
            idle.ends()
            if request == "build":
                trial, loss, parts = fitting(shape, variant, options)
                answer: Any = {"loss": loss, "counts": trial.counts, "parts": parts}
            elif request == "time":
                answer = trial.time(options.steps_per_round)
            elif request == "memory":
                answer = trial.memory()
            elif request == "syncs":
                answer = count_syncs(trial, options.device)
            else:
                answer = idle.share()
            pipe.send(("done", answer))
            idle.starts()
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))


def fitting(shape: Shape, variant: Variant, options: Options) -> tuple[Any, float, int]:
    """Return the variant, warmed up, with its first loss and the number of parts of its step.

    Where that is allowed, a batch that does not fit into memory is halved, and the step has twice as many parts.
    """
    while True:
        trial = None
        try:
            trial = variant.ready(shape, options)
            return trial, trial.warm_up(), shape.parts
        except torch.OutOfMemoryError:
            if not options.halve or shape.batch % 2:
                raise
            shape = replace(shape, batch=shape.batch // 2, parts=2 * shape.parts)
        trial = None
        release_memory()
        if options.device == "cuda":
            torch.cuda.empty_cache()


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
        if in_processes(options):
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
