"""Writes a private run to TensorBoard: releases and public constants only."""

from __future__ import annotations

import math
import time
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars

from opacus_ac.engine.privacy_engine import PrivacyEngine
from opacus_ac.engine.report import PrivacyReport
from opacus_ac.optimizer.optimizer import AdaptiveClipDPOptimizer
from opacus_ac.release.values import StepRelease
from opacus_ac.tensorboard import tags
from opacus_ac.tensorboard.summaries import (
    NoiseOfCurves,
    histogram_arguments,
    hparams_summaries,
    meta_of,
    meta_summary,
    scalars_of,
)

FLUSH_SECONDS = 1.0


def keep_time_out(writer: SummaryWriter) -> None:
    """Give all later events of ``writer`` the present time: how long a private step takes depends on its batch."""
    file, now = writer._get_file_writer(), time.time()
    add_event = file.add_event

    def add(event: Any, step: int | None = None, walltime: float | None = None) -> None:
        add_event(event, step, now)

    file.add_event = add


class _RemainingSteps:
    """Steps that still fit the target: asked of the engine once, then counted down while rate and noise stay."""

    def __init__(self, engine: PrivacyEngine, optimizer: AdaptiveClipDPOptimizer) -> None:
        self._engine, self._optimizer = engine, optimizer
        self._count: int | None = None
        self._step = 0
        self._priced: tuple[float, float] | None = None

    def _next(self) -> tuple[float, float] | None:
        """Return (noise multiplier, rate) of the next step; None without Poisson sampling, where passes are counted."""
        plan = self._optimizer.plan
        if plan is None or plan.sampling != "poisson":
            return None
        return self._optimizer.noise_multiplier, plan.sizes.rate(plan.step)

    def pass_step(self, release: StepRelease) -> None:
        """Take note of a step that was taken."""
        follows = self._priced is not None and release.step == self._step + 1
        same = follows and (release.noise_multiplier, release.sample_rate) == self._priced == self._next()
        self._count = self._count - 1 if same and self._count else None
        self._step = release.step

    def value(self) -> int:
        """Return how many steps fit at the next step's rate and noise."""
        if self._count is None:
            self._count, self._priced, self._step = (
                self._engine.remaining_steps(),
                self._next(),
                self._optimizer.steps_taken,
            )
        return self._count


class PrivacyDashboard:
    """Writes epsilon, C, noisy clip rate and the rest of each step's release for TensorBoard and its Privacy tab.

    Args:
        writer_or_logdir: a ``torch.utils.tensorboard.SummaryWriter``, which the caller has to close, or a folder. For a
            folder, a writer is opened here and closed by :meth:`close`.
        engine: the engine that made ``optimizer`` private.
        optimizer: the private optimizer; after resuming, with its checkpoint loaded already.
        delta: delta to report epsilon at; by default the target's.
        every: epsilon and remaining steps are written every so many steps, and at the end. "vrdp" computes epsilon in
            well under a millisecond; Opacus's "prv" takes tenths of a second, and some seconds for the remaining steps,
            which are counted down until rate or noise change.
        histograms: write the noisy histogram of gradient norms, where one is released.

    Guarantees:
        Reads ``optimizer.released``, the accountant and public constants; every tag is on an allow-list
        (:data:`opacus_ac.tensorboard.tags.ALLOWED`). All events carry the time at which the dashboard was opened:
        the time that a step takes depends on how many records it drew. A run that is not private (un-noised clip rule,
        seeded noise, noise multiplier 0) is written with epsilon = infinity.

    Raises:
        ValueError: If the optimizer is not the engine's, there is no delta, ``every`` is below 1, the writer is of
            another kind, or the folder holds another run already.

    >>> import tempfile, torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from opacus_ac import PrivacyEngine
    >>> from opacus_ac.tensorboard import PrivacyDashboard
    >>> model, engine = torch.nn.Linear(4, 2), PrivacyEngine()
    >>> data = TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
    >>> model, optimizer, loader = engine.make_private_with_epsilon(
    ...     module=model, optimizer=torch.optim.AdamW(model.parameters()), data_loader=DataLoader(data, batch_size=16),
    ...     target_epsilon=8.0, target_delta=1e-3, epochs=1)
    >>> with tempfile.TemporaryDirectory() as logdir, PrivacyDashboard(logdir, engine, optimizer) as dashboard:
    ...     for x, y in loader:
    ...         optimizer.zero_grad()
    ...         torch.nn.functional.cross_entropy(model(x), y).backward()
    ...         _ = optimizer.step()
    ...         written = dashboard.log_step()
    >>> written
    True
    """

    def __init__(
        self,
        writer_or_logdir: SummaryWriter | str | PathLike[str],
        engine: PrivacyEngine,
        optimizer: AdaptiveClipDPOptimizer,
        *,
        delta: float | None = None,
        every: int = 1,
        histograms: bool = True,
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a whole number of steps >= 1, got {every!r}")
        if not engine.accounts_for(optimizer):
            raise ValueError(
                "this engine does not account for this optimizer: pass the engine and the optimizer that its last "
                "make_private returned"
            )
        self._engine, self._optimizer, self._every, self._histograms = engine, optimizer, every, histograms
        target = engine.target_budget
        if delta is None and target is None:
            raise ValueError("the dashboard needs delta=... when no target was set (make_private without epsilon)")
        self._target = None if target is None else target[0]
        self._delta = target[1] if delta is None and target is not None else delta
        report = engine.privacy_report(self._delta)
        self._owned = not isinstance(writer_or_logdir, SummaryWriter)
        self._writer: SummaryWriter | None = self._open(writer_or_logdir)
        self._remaining = _RemainingSteps(engine, optimizer)
        self._noise = NoiseOfCurves()
        self._time = self._flushed = time.time()
        self._step = self._accounted = optimizer.steps_taken
        self._place: dict[str, Any] = {"first_step": self._step, "first_bound": optimizer.policy.bound, "ended": False}
        self._meta: dict[str, Any] = {}
        if self._step > 0:
            self._hide_from(self._step + 1)  # what an interrupted run wrote after its checkpoint
        self._begin(report)

    # ---------------------------------------------------------------- writing

    def log_step(self) -> bool:
        """Write the release of the last step; call it after every ``optimizer.step()``.

        Returns:
            Whether something was written. Nothing is written after a physical batch that only accumulated, or twice
            for one step.

        Raises:
            ValueError: If the dashboard is closed.
        """
        self._open_writer()
        release = self._optimizer.released
        if release is None or release.step == self._step:
            return False
        if release.step < self._step:
            self._hide_from(release.step)  # an earlier checkpoint was loaded in between
            self._noise = NoiseOfCurves()
        self._step = release.step
        self._remaining.pass_step(release)
        noise = self._noise.scalars(release, self._optimizer)
        for tag, value in {**scalars_of(release, self._optimizer), **noise}.items():
            self.add_scalar(tag, value, release.step)
        if self._histograms:
            self._add_histogram(release)
        if release.step % self._every == 0:
            self._add_budget(release.step)
        self._flush()
        return True

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Write one value of an allowed tag.

        Raises:
            ValueError: If the tag is not a release or a public constant, or the dashboard is closed.
        """
        tags.expect_allowed(tag)
        self._open_writer().add_scalar(tag, value, step, walltime=self._time)

    def close(self) -> None:
        """Write the last epsilon and the privacy statement; close the writer if it was opened here."""
        if self._writer is None:
            return
        if self._step != self._accounted:
            self._add_budget(self._step)
        report = self._engine.privacy_report(self._delta)
        self._place |= {"ended": True, "next_bound": self._optimizer.policy.bound}
        self._update_meta(report)
        self._add_statement(report)
        self._writer.flush()
        if self._owned:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> PrivacyDashboard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- parts

    def _open(self, given: SummaryWriter | str | PathLike[str]) -> SummaryWriter:
        """Return the writer; a folder that holds a run is continued after the optimizer's step, or refused."""
        if isinstance(given, SummaryWriter):
            return given
        if not isinstance(given, str | PathLike):
            raise ValueError(
                f"writer_or_logdir is a {type(given).__module__}.{type(given).__name__}: pass a "
                "torch.utils.tensorboard.SummaryWriter or a folder"
            )
        steps = self._optimizer.steps_taken
        if steps == 0 and any(Path(given).glob("*tfevents*")):
            raise ValueError(
                f"{given} holds the events of another run: choose another folder; to continue that run load its "
                "checkpoint first; to replace it delete its event files"
            )
        return SummaryWriter(str(given), flush_secs=int(FLUSH_SECONDS))

    def _open_writer(self) -> SummaryWriter:
        if self._writer is None:
            raise ValueError("the privacy dashboard is closed: make a new one to write more steps")
        return self._writer

    def _begin(self, report: PrivacyReport) -> None:
        """Write what is known before the first step."""
        self._update_meta(report)
        for summary in (custom_scalars(tags.LAYOUT), *hparams_summaries(self._meta)):
            self._add_summary(summary, self._step)
        self._add_statement(report)
        if self._step == 0:
            self._add_budget(0)
        self._flush()

    def _add_summary(self, summary: Any, step: int) -> None:
        self._open_writer()._get_file_writer().add_summary(summary, step, self._time)

    def _is_private(self, report: PrivacyReport) -> bool:
        """Return whether a finite epsilon holds: whoever knows a seed can remove the noise."""
        mechanism = self._optimizer.mechanism
        noised = self._optimizer.policy.is_private and mechanism.stream.secret and mechanism.noise_multiplier > 0
        return noised and math.isfinite(report.epsilon)

    def _update_meta(self, report: PrivacyReport) -> None:
        """Write the privacy record if it is new or has changed, such as by a warning."""
        meta = meta_of(report, self._optimizer, self._target, self._is_private(report)) | self._place
        if meta != self._meta:
            self._meta = meta
            self._add_summary(meta_summary(meta), self._step)

    def _add_budget(self, step: int) -> None:
        """Write epsilon, its target and the remaining steps."""
        report = self._engine.privacy_report(self._delta, tight=False)
        private = self._is_private(report)
        self._accounted = step
        self._update_meta(report)
        assert self._delta is not None
        self.add_scalar("privacy/epsilon", self._engine.get_epsilon(self._delta) if private else math.inf, step)
        if self._target is not None:
            self.add_scalar("privacy/epsilon_target", self._target, step)
            if private:
                self.add_scalar("privacy/remaining_steps", self._remaining.value(), step)

    def _add_histogram(self, release: StepRelease) -> None:
        if release.histogram is not None:
            arguments = histogram_arguments(release.histogram)
            writer = self._open_writer()
            writer.add_histogram_raw(tags.HISTOGRAM_TAG, **arguments, global_step=release.step, walltime=self._time)

    def _add_statement(self, report: PrivacyReport) -> None:
        """Write the statement as text; a run that is not private says so in its first line."""
        lines = str(report).splitlines()
        if not self._is_private(report):
            lines = ["NOT PRIVATE: epsilon = infinity", *lines[1:]]
        # An indented block: Markdown shows it as it is.
        text = "\n".join(f"    {line}" for line in lines)
        self._open_writer().add_text(tags.STATEMENT_TAG, text, self._step, walltime=self._time)

    def _hide_from(self, step: int) -> None:
        """Hide what the folder holds from ``step`` on; a writer of the caller's may have other tags and steps."""
        if not self._owned:
            return
        # Twice: TensorBoard's Python reader takes the first such mark of a run for its beginning and hides nothing.
        # The purge_step of SummaryWriter would not do for the same reason.
        for _ in range(2):
            event = Event(step=step, session_log=SessionLog(status=SessionLog.START))
            self._open_writer()._get_file_writer().add_event(event, walltime=self._time)

    def _flush(self) -> None:
        if time.time() - self._flushed >= FLUSH_SECONDS:
            self._open_writer().flush()
            self._flushed = time.time()
