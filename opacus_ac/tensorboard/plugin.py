"""The server side of the Privacy tab: which runs have a privacy record, and their curves.

Imports tensorboard and werkzeug only. Everything in an event file is untrusted text here; the page shows it as text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tensorboard import plugin_util
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from opacus_ac.tensorboard.idle import Idle
from opacus_ac.tensorboard.resumed import candidates, first_step, join, merge
from opacus_ac.tensorboard.tags import HISTOGRAM_TAG, META_TAG, META_VERSION, PLUGIN_NAME, PUBLIC_DATA, SCALARS
from opacus_ac.tensorboard.verdicts import judge

POINTS = 1000
"""Most points of a curve that are sent."""

MAX_RUNS = 8
"""Most runs whose curves are sent at once; the page has as many colours."""

MAX_BINS = 200
"""Most bins of a histogram that is sent; the release has 22 by default."""

META_BYTES = 65_536
"""Largest privacy record that is read."""

STATIC = Path(__file__).parent / "static"
FILES = {
    "/index.js": "text/javascript",
    "/panels.js": "text/javascript",
    "/chart.js": "text/javascript",
    "/save.js": "text/javascript",
    "/scale.js": "text/javascript",
    "/runs.js": "text/javascript",
    "/summary.js": "text/javascript",
    "/style.css": "text/css",
}


class PrivacyPlugin(base_plugin.TBPlugin):
    """The Privacy tab; it appears as soon as a run has written its privacy record."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: Any) -> None:
        self._provider = context.data_provider
        self._joined: dict[str, dict[str, list[str]]] = {}
        self._idle = Idle(getattr(context, "logdir", None))

    def is_active(self) -> bool:
        """Return False: asked only while no run has a privacy record."""
        return False

    def frontend_metadata(self) -> Any:
        """Return where the page's module is, and the name of the tab."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Privacy")

    def get_plugin_apps(self) -> dict[str, Callable[..., Any]]:
        """Return the routes: fixed files, ``/runs`` and ``/series``; no path comes from the URL."""
        files = {route: _file(STATIC / route[1:], kind) for route, kind in FILES.items()}
        return {**files, "/runs": self._application(self._runs), "/series": self._application(self._series)}

    def _application(self, answer: Callable[[Any, Any], Any]) -> Callable[..., Any]:
        @wrappers.Request.application
        def application(request: Any) -> Any:
            content = json.dumps(answer(plugin_util.context(request.environ), request), allow_nan=False)
            return http_util.Respond(request, content, "application/json")

        wrapped: Callable[..., Any] = application
        return wrapped

    def _runs(self, context: Any, request: Any) -> dict[str, Any]:
        """Return every run that has a privacy record, latest first, with that record and the runs that it continues."""
        experiment = plugin_util.experiment_id(request.environ)
        records = self._records(context, experiment)
        started = {
            run.run_name: run.start_time or 0.0
            for run in self._provider.list_runs(context, experiment_id=experiment)
            if run.run_name in records
        }
        order = sorted(records, key=lambda run: (-started.get(run, 0.0), run))
        joined = self._join(context, experiment, records, order)
        parts = {part for chain in joined.values() for part in chain}
        runs = [{"run": r, "meta": records[r], "parts": joined.get(r, [])} for r in order if r not in parts]
        return {"max_runs": MAX_RUNS, "runs": runs}

    def _join(
        self, context: Any, experiment: str, records: dict[str, dict[str, Any]], order: list[str]
    ) -> dict[str, list[str]]:
        """Find which runs continue others, and keep it for the curves."""
        asked = candidates(records)
        found = self._scalars(context, experiment, asked, ["privacy/max_grad_norm"]) if asked else {}
        bounds = {run: columns(tags["privacy/max_grad_norm"]) for run, tags in found.items()}
        self._joined[experiment] = join(records, order, bounds)
        return self._joined[experiment]

    def _scalars(self, context: Any, experiment: str, runs: list[str], tags: list[str]) -> Any:
        return self._provider.read_scalars(
            context,
            experiment_id=experiment,
            plugin_name="scalars",
            downsample=POINTS,
            run_tag_filter=provider.RunTagFilter(runs=runs, tags=tags),
        )

    def _records(self, context: Any, experiment: str, runs: list[str] | None = None) -> dict[str, dict[str, Any]]:
        """Return the privacy records by run: of some runs, or of all."""
        found = self._provider.read_tensors(
            context,
            experiment_id=experiment,
            plugin_name=PLUGIN_NAME,
            downsample=1,
            run_tag_filter=provider.RunTagFilter(runs=runs, tags=[META_TAG]),
        )
        return {run: read_meta(tags[META_TAG]) for run, tags in found.items()}

    def _series(self, context: Any, request: Any) -> dict[str, Any]:
        """Return curves, state and verdicts of the runs asked for.

        ``{run: {"curves": {tag: [steps, values]}, "norms": ..., "state": ..., "verdicts": [[level, text], ...]}}``.
        A curve has at most ``POINTS`` points for each run that it was put together from. ``norms`` is the last noisy
        histogram, or None.
        """
        runs = request.args.getlist("run")[:MAX_RUNS]
        if not runs:
            return {}
        experiment = plugin_util.experiment_id(request.environ)
        joined = self._joined.get(experiment, {})
        chains = {run: [*joined.get(run, []), run] for run in runs}
        every = [part for chain in chains.values() for part in chain]
        records = self._records(context, experiment, every)
        found = self._scalars(context, experiment, every, [*SCALARS, *PUBLIC_DATA])
        histograms = self._provider.read_tensors(
            context,
            experiment_id=experiment,
            plugin_name="histograms",
            downsample=1,
            run_tag_filter=provider.RunTagFilter(runs=runs, tags=[HISTOGRAM_TAG]),
        )
        answer = {}
        for run, chain in chains.items():
            known = [
                (first_step(records[part]), curves_of(found[part]))
                for part in chain
                if part in records and part in found
            ]
            if run in records and known:
                answer[run] = self._run(run, records[run], merge(known) if len(known) > 1 else known[0][1])
                answer[run]["norms"] = norms(histograms.get(run, {}).get(HISTOGRAM_TAG, ()))
        return answer

    def _run(self, run: str, meta: dict[str, Any], curves: dict[str, list[list[Any]]]) -> dict[str, Any]:
        newest = tuple(sorted((name, column[0][-1]) for name, column in curves.items() if column[0]))
        judged = judge(meta, curves, self._idle.seconds(run, newest))
        return {"curves": curves, "state": judged.state, "verdicts": [list(verdict) for verdict in judged.verdicts]}


def curves_of(tags: dict[str, Any]) -> dict[str, list[list[Any]]]:
    """Return ``[steps, values]`` of the scalars of a run by the names that the page knows."""
    return {PUBLIC_DATA.get(tag, tag.removeprefix("privacy/")): curve(tag, points) for tag, points in tags.items()}


def curve(tag: str, points: Iterable[Any]) -> list[list[Any]]:
    """Return ``[steps, values]`` of scalar points.

    A std has three digits and a point only where it changes. A running mean has five digits.
    """
    if not tag.endswith(("_std", "_mean")):
        return columns(points)
    digits = 3 if tag.endswith("_std") else 5
    steps, values = columns(points, digits)
    if digits == 3:
        kept = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
        steps, values = [steps[i] for i in kept], [values[i] for i in kept]
    return [steps, values]


def norms(points: Iterable[Any]) -> dict[str, Any] | None:
    """Return the last histogram as ``{"step", "edges", "counts"}``: edges are log10 of norms, one more than counts.

    None if there is no histogram or it is not one.
    """
    found = list(points)
    if not found:
        return None
    table = found[-1].numpy
    if table.ndim != 2 or table.shape[1] != 3 or not 0 < len(table) <= MAX_BINS or table.dtype.kind != "f":
        return None
    left, right, counts = (column.tolist() for column in table.T)
    edges = [plain(edge, 6) for edge in [*left, right[-1]]]
    return {"step": found[-1].step, "edges": edges, "counts": [plain(count, 4) for count in counts]}


def columns(points: Iterable[Any], digits: int = 7) -> list[list[Any]]:
    """Return ``[steps, values]`` of scalar points."""
    known = list(points)
    return [[point.step for point in known], [plain(point.value, digits) for point in known]]


def plain(value: float, digits: int = 7) -> float | str | None:
    """Return ``value`` as JSON has it: seven digits (event files hold 32-bit floats), "infinity", or None for NaN."""
    if math.isnan(value):
        return None
    if math.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    return float(f"{value:.{digits}g}")


def read_meta(points: Iterable[Any]) -> dict[str, Any]:
    """Return the newest privacy record, or only a warning when it cannot be read."""
    found = list(points)[-1].numpy
    try:
        content = found.item() if found.ndim == 0 else None
        if not isinstance(content, bytes | str):
            raise ValueError("it is no text")
        if len(content) > META_BYTES:
            raise ValueError("it is too long")
        meta = json.loads(content)
        if not isinstance(meta, dict) or meta.get("version") != META_VERSION:
            raise ValueError(f"it is not of version {META_VERSION}")
    except (ValueError, RecursionError) as error:
        return {"version": META_VERSION, "unreadable": f"the privacy record of this run cannot be read: {error}"}
    return finite(meta)


def finite(meta: Any) -> Any:
    """Return ``meta`` with its non-finite numbers as text: JSON from a file may hold them, an answer must not."""
    if isinstance(meta, dict):
        return {key: finite(value) for key, value in meta.items()}
    if isinstance(meta, list):
        return [finite(value) for value in meta]
    return plain(meta) if isinstance(meta, float) and not math.isfinite(meta) else meta


def _file(path: Path, content_type: str) -> Callable[..., Any]:
    """Return an application that serves one file of this package."""

    @wrappers.Request.application
    def application(request: Any) -> Any:
        return http_util.Respond(request, path.read_text(encoding="utf-8"), content_type)

    wrapped: Callable[..., Any] = application
    return wrapped
