"""Tables and figures of the study from its JSON lines; nothing is computed here that the lines do not hold."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.results import Result, mean_and_spread
from small_model.methods import METHODS

from opacus_ac.optimizer.momentum import planned_beta1

INK, GRID = "#808080", "#80808040"  # mid grey: readable on white and on black
COLOURS = ("#4c8bf5", "#e8833a", "#3aa675", "#b565d8", "#d64545", "#8c8c3c", "#33a8c7", "#8a6d5a")

LONG = 100  # steps, from which a run is a long one


def grouped(results: Iterable[Result], *names: str) -> dict[tuple[Any, ...], list[Result]]:
    """Return the results by the values of ``names``, in the order in which they came."""
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[tuple(result[name] for name in names)].append(result)
    return dict(groups)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


def _epsilon(value: float | None) -> str:
    return "∞" if value is None else f"{value:g}"


def losses_table(results: list[Result]) -> str:
    """Held-out loss by method and epsilon, for each model and tone."""
    parts = []
    for (model, tone), here in grouped(results, "model", "tone").items():
        epsilons = sorted({r["epsilon"] for r in here}, key=lambda e: math.inf if e is None else e)
        rows = []
        for (method,), mine in grouped(here, "method").items():
            by_epsilon = grouped(mine, "epsilon")
            rows.append(
                [
                    method,
                    *(
                        mean_and_spread([r["loss"] for r in by_epsilon.get((e,), [])]) if (e,) in by_epsilon else ""
                        for e in epsilons
                    ),
                ]
            )
        before = statistics.fmean(r["loss_before"] for r in here)
        seeds = len({r["seed"] for r in here})
        parts.append(f"### {model}, {tone}: held-out loss by epsilon, {before:.3f} before, {seeds} seeds\n")
        parts.append(markdown(["method", *map(_epsilon, epsilons)], rows) + "\n")
    return "\n".join(parts)


def effects_table(results: list[Result]) -> str:
    """Tone accuracy of generations and what was forgotten, by the default and without privacy."""
    rows = []
    shown = [r for r in results if r["method"] in ("dp-adam-ac", "non-private")]
    for (model, method, epsilon), mine in grouped(shown, "model", "method", "epsilon").items():
        columns = [mean_and_spread([r[name] for r in mine]) for name in ("loss", "other_tone", "general")]
        accuracy = mean_and_spread([100 * r["tone_accuracy"] for r in mine], 0)
        rows.append([model, method, _epsilon(epsilon), str(len(mine)), *columns, accuracy])
    head = ["model", "method", "epsilon", "runs", "loss", "loss, other tone", "loss, general text", "tone accuracy, %"]
    return "### Tone and forgetting, over tones and seeds\n\n" + markdown(head, rows) + "\n"


def differences(results: list[Result], reference: str, methods: Callable[[str], bool]) -> list[list[str]]:
    """Rows of the relative difference of loss to ``reference``, paired by everything else than the method."""
    keys = ("model", "tone", "epsilon", "seed", "data", "steps", "batch")
    base = {k: g[0]["loss"] for k, g in grouped([r for r in results if r["method"] == reference], *keys).items()}
    pairs: dict[tuple[str, Any, str], list[float]] = defaultdict(list)
    for r in results:
        key = tuple(r[k] for k in keys)
        if methods(r["method"]) and key in base:
            pairs[r["model"], r["epsilon"], r["method"]].append(100 * (r["loss"] / base[key] - 1))
    rows = []
    for (model, epsilon, method), values in pairs.items():
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        rows.append(
            [model, _epsilon(epsilon), method, str(len(values)), f"{statistics.fmean(values):+.1f} ± {error:.1f}"]
        )
    return rows


def parts_table(results: list[Result]) -> str:
    """What each part is worth: the loss without it, in per cent above the full method."""
    rows = differences(results, "dp-adam-ac+", lambda m: m.startswith("dp-adam-ac+ without"))
    head = ["model", "epsilon", "method", "pairs", "loss above dp-adam-ac+, % ± standard error"]
    return "### One part removed at a time\n\n" + markdown(head, rows) + "\n"


def tuning_table(results: list[Result]) -> str:
    """Best of the flat C and what the default does from each C0, per epsilon and kind of data."""
    parts = []
    for (data, epsilon), here in grouped(results, "data", "epsilon").items():
        rows = []
        table: dict[tuple[str, float], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for r in here:
            table[r["method"], r["bound"]][r["rate"]].append(r["loss"])
        rates = sorted({r["rate"] for r in here})
        means = {key: {rate: statistics.fmean(v) for rate, v in by_rate.items()} for key, by_rate in table.items()}
        flat = [min(m.values()) for (method, _), m in means.items() if method == "adamw-flat"]
        best = min(flat) if flat else math.nan
        for (method, bound), by_rate in means.items():
            ratio = min(by_rate.values()) / best
            rows.append(
                [
                    method,
                    f"{bound:g}",
                    *(mean_and_spread(table[method, bound][rate]) if rate in by_rate else "" for rate in rates),
                    f"{ratio:.3f}",
                ]
            )
        parts.append(f"### {data} data, epsilon {_epsilon(epsilon)}: held-out loss by learning rate\n")
        parts.append(
            markdown(["clipping", "C0", *(f"{rate:g}" for rate in rates), "best, over best flat"], rows) + "\n"
        )
    return "\n".join(parts)


def _beta1(result: Result) -> float:
    """Momentum of a row: its own, that of its method, or that of the planned steps."""
    for known in (result.get("beta1"), METHODS[result["method"]].beta1):
        if known is not None:
            return float(known)
    return planned_beta1(result["steps"])


def budget_table(results: list[Result]) -> str:
    """Held-out loss by batch size, momentum and learning rate at equal epsilon and as many records in all."""
    rows = []
    rates = sorted({r["rate"] for r in results})
    marked = [{**r, "beta1": _beta1(r)} for r in results]
    for (batch, steps, method, beta1), mine in grouped(marked, "batch", "steps", "method", "beta1").items():
        by_rate = grouped(mine, "rate")
        columns = [
            mean_and_spread([r["loss"] for r in by_rate[(rate,)]]) if (rate,) in by_rate else "" for rate in rates
        ]
        noise = mean_and_spread([r["noise_multiplier"] for r in mine]).split(" ")[0]
        rows.append([method, f"{beta1:g}", f"{batch} x {steps}", noise, *columns])
    head = ["method", "beta1", "batch x steps", "noise multiplier", *(f"lr {rate:g}" for rate in rates)]
    return "### Equal epsilon, equal compute\n\n" + markdown(head, rows) + "\n"


def momentum_table(results: list[Result]) -> str:
    """Held-out loss by momentum."""
    rows = []
    momenta = sorted({r["beta1"] for r in results}, reverse=True)
    for (epsilon, method), mine in grouped(results, "epsilon", "method").items():
        by_beta1 = grouped(mine, "beta1")
        columns = [mean_and_spread([r["loss"] for r in by_beta1[(b,)]]) if (b,) in by_beta1 else "" for b in momenta]
        rows.append([_epsilon(epsilon), method, *columns])
    return "### Momentum\n\n" + markdown(["epsilon", "method", *(f"beta1 {b:g}" for b in momenta)], rows) + "\n"


def lengths_table(results: list[Result]) -> str:
    """Held-out loss of the last and of the averaged weights, by the length of the run, and what the rate control did."""
    rows = []
    for (steps, method, rate), mine in sorted(grouped(results, "steps", "method", "rate").items()):
        last = [r["loss"] for r in mine]
        averaged = [r["loss_averaged"] for r in mine if "loss_averaged" in r]
        gain = f"{100 * (statistics.fmean(averaged) / statistics.fmean(last) - 1):+.1f} %" if averaged else ""
        factors = [factor for r in mine for factor in r["lr_multiplier"]]
        losses = [mean_and_spread(last), mean_and_spread(averaged) if averaged else ""]
        control = f"{min(factors):.2f} to {max(factors):.2f}"
        rows.append([str(steps), method, f"{rate:g}", str(len(mine)), *losses, gain, control])
    head = ["steps", "method", "learning rate", "runs", "last weights", "averaged weights", "averaged, over last"]
    return "### Length of the run\n\n" + markdown([*head, "factor of the rate control"], rows) + "\n"


def tables(results: list[Result]) -> str:
    """Return all tables that the results allow, as Markdown."""
    main = [r for r in results if r["bound"] is None and r["rate"] is None]
    parts = [losses_table(main), parts_table(main), effects_table(main)] if main else []
    tuned = [r for r in results if r["bound"] is not None]
    sized = [r for r in results if r["bound"] is None and r["rate"] is not None]
    moved = [r for r in sized if len({s.get("beta1") for s in sized}) > 2]  # the grid that varies it
    others = [tuning_table(tuned)] if tuned else []
    if any(r["steps"] >= LONG for r in sized):  # a grid that varies the length
        others.append(lengths_table(sized))
    elif sized:
        others.append(momentum_table(moved) if moved else budget_table(sized))
    return "\n".join([*parts, *others])


# ---------------------------------------------------------------- figures


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), dpi=120)
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.set_title(title, color=INK, fontsize=10)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.tick_params(colors=INK, which="both")
    axes.grid(color=GRID, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(GRID)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", transparent=True)
    plt.close(figure)
    return path


def _line(axes: Any, points: dict[float, list[float]], label: str, colour: str) -> None:
    xs = sorted(points)
    means = [statistics.fmean(points[x]) for x in xs]
    errors = [statistics.stdev(points[x]) if len(points[x]) > 1 else 0.0 for x in xs]
    axes.errorbar(xs, means, yerr=errors, label=label, color=colour, marker="o", markersize=3, linewidth=1.4, capsize=2)


def figures(results: list[Result], folder: Path) -> list[Path]:
    """Draw what the results allow and return the files."""
    made = []
    main = [r for r in results if r["bound"] is None and r["rate"] is None]
    for (model,), every in grouped(main, "model").items():
        tone = every[0]["tone"]  # the one that every method has
        here = [r for r in every if r["tone"] == tone]
        figure, axes = _axes(
            f"{model}, {tone} tone: held-out loss against epsilon (delta 1e-5)",
            "epsilon",
            "held-out loss, nats per token",
        )
        drawn = [
            (m, g)
            for (m,), g in grouped([r for r in here if r["epsilon"] is not None], "method").items()
            if "without" not in m
        ]
        for (method, mine), colour in zip(drawn, COLOURS, strict=False):
            _line(axes, {e: [r["loss"] for r in g] for (e,), g in grouped(mine, "epsilon").items()}, method, colour)
        for style, reference in (("--", "non-private"), (":", "paper-raw")):
            known = [r["loss"] for r in here if r["method"] == reference]
            if known:
                axes.axhline(
                    statistics.fmean(known), color=INK, linestyle=style, linewidth=1, label=f"{reference} (epsilon = ∞)"
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        made.append(_save(figure, axes, folder / f"study-{model}.png"))
    made += _course(main, folder)
    return made + _tuning(results, folder)


def _course(results: list[Result], folder: Path) -> list[Path]:
    """C over the steps, as released, for one run of each model at the largest epsilon."""
    chosen = [r for r in results if r["method"] == "dp-adam-ac" and r["epsilon"] is not None]
    if not chosen:
        return []
    largest = max(r["epsilon"] for r in chosen)
    figure, axes = _axes(
        f"C as released by dp-adam-ac at epsilon {largest:g} from C0 = 1, one seed each",
        "step",
        "clipping norm C (units of gradient norm)",
    )
    runs = grouped([r for r in chosen if r["epsilon"] == largest], "model", "tone")
    for ((model, tone), here), colour in zip(runs.items(), COLOURS, strict=False):
        axes.plot(range(1, len(here[0]["C"]) + 1), here[0]["C"], label=f"{model}, {tone}", color=colour)
    return [_save(figure, axes, folder / "study-clipping-norm.png")]


def _tuning(results: list[Result], folder: Path) -> list[Path]:
    """Best loss over the learning rates against C0, flat and adaptive."""
    made = []
    tuned = [r for r in results if r["bound"] is not None]
    for (data,), here in grouped(tuned, "data").items():
        figure, axes = _axes(
            f"{data} data: does C0 need tuning? (best learning rate of each point)",
            "C0",
            "held-out loss, nats per token",
        )
        lines = grouped(here, "method", "epsilon")
        for ((method, epsilon), mine), colour in zip(lines.items(), COLOURS, strict=False):
            points: dict[float, list[float]] = {}
            for (bound,), group in grouped(mine, "bound").items():
                by_rate = [[r["loss"] for r in g] for g in grouped(group, "rate").values()]
                points[bound] = min(by_rate, key=statistics.fmean)
            _line(axes, points, f"{method}, epsilon {_epsilon(epsilon)}", colour)
        axes.set_xscale("log")
        made.append(_save(figure, axes, folder / f"study-tuning-{data}.png"))
    return made
