"""Figures and measurements of the Privacy tab, from a real private run.

    python tests/support/tensorboard_tour.py figures docs/figures
    python tests/support/tensorboard_tour.py measure

The runs train a small classifier for some seconds; noise and draws come from the system's entropy, so figures differ a little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tensorboard_browser import (
    FIND_FRAME,
    chromium,
    entry_points,
    open_tab,
    points,
    serve,
    set_dark,
    wait_for,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from opacus_ac import PrivacyEngine
from opacus_ac.tensorboard import PrivacyDashboard, tags

RECORDS, BATCH, LOSS_BOUND = 2000, 64, 4.0


def task(seed: int = 0) -> tuple[nn.Module, TensorDataset]:
    """A small network and synthetic records of three classes, a fifth of them with a random label."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(RECORDS, 16, generator=generator)
    labels = (inputs @ torch.randn(16, 3, generator=generator)).argmax(1)
    labels[::5] = torch.randint(0, 3, labels[::5].shape, generator=generator)
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 3)), TensorDataset(inputs, labels)


def train(
    folder: Path, steps: int, after_step: Callable[[int], None] = lambda step: None, planned: int = 0, **options: Any
) -> None:
    """Train privately and write every step's release; ``planned`` steps spend the whole budget."""
    model, data = task()
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        data_loader=DataLoader(data, batch_size=BATCH),
        target_epsilon=4.0,
        target_delta=1e-4,
        steps=planned or steps,
        loss_bound=LOSS_BOUND,
        **options,
    )
    with PrivacyDashboard(folder, engine, optimizer, delta=1e-4) as dashboard:
        while optimizer.steps_taken < steps:
            for inputs, labels in loader:
                optimizer.zero_grad()
                losses = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
                optimizer.record_losses(losses)
                losses.mean().backward()
                optimizer.step()
                dashboard.log_step()
                after_step(optimizer.steps_taken)
                if optimizer.steps_taken == steps:
                    break


def train_all(folder: Path) -> None:
    """Three runs to compare: the default, one that grows its batches, and the published rule, which is not private."""
    train(folder / "default", 120, planned=200)
    train(
        folder / "growing batches",
        120,
        planned=200,
        batch_size_schedule=[32 + 32 * min(step // 40, 3) for step in range(200)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(folder / "published rule", 120, planned=200, preset="paper", clip_policy="raw_percentile")


def choose(driver: Any, run: str, on: bool) -> None:
    """Tick or untick a run."""
    script = """for (const label of document.querySelectorAll('label.run'))
      if (label.textContent === arguments[0] && label.firstChild.checked !== arguments[1]) label.firstChild.click();"""
    driver.execute_script(script, run, on)


def figures(target: Path) -> None:
    """Write the tab in light, dark and narrow as PNG files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_all(folder / "logs")
        with (
            serve(folder / "logs", entry_points(folder)) as port,
            chromium(folder / "profile", 1400, 1800) as driver,
        ):
            open_tab(driver, port)
            wait_for(lambda: len(points(driver, "max_grad_norm")) == 3)
            set_dark(driver, True)
            save(driver, target / "privacy-tab-dark.png")
            set_dark(driver, False)
            choose(driver, "published rule", False)
            wait_for(lambda: len(points(driver, "max_grad_norm")) == 2)
            hover(driver)
            save(driver, target / "privacy-tab-light.png")
            driver.switch_to.default_content()
            driver.set_window_size(500, 1700)
            driver.switch_to.frame(wait_for(lambda: driver.execute_script(FIND_FRAME)))
            choose(driver, "growing batches", False)
            wait_for(lambda: len(points(driver, "max_grad_norm")) == 1)
            save(driver, target / "privacy-tab-narrow.png")


def hover(driver: Any) -> None:
    """Put the pointer on the clip-rate chart, so that crosshair and tooltip show."""
    driver.execute_script("""const svg = document.querySelector('#panel-clip_rate svg'), box = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + box.width * 0.7, clientY: box.top + 40}));""")


def save(driver: Any, path: Path) -> None:
    time.sleep(0.4)  # the theme's transition
    driver.save_screenshot(str(path))
    print(f"wrote {path}")


def large_run(folder: Path, steps: int = 10_000) -> None:
    """Write ``steps`` steps of every scalar tag, with values of no meaning."""
    folder.mkdir(parents=True)
    train(folder / "run", 2)
    with SummaryWriter(str(folder / "run"), max_queue=1000) as writer:
        for step in range(3, steps + 1):
            for i, tag in enumerate(tags.SCALARS):
                writer.add_scalar(tag, 0.5 + 0.4 * ((step * (i + 7)) % 97) / 97, step)


def measure() -> None:
    """Print times: page load to curves, write to point shown, and the page with a long run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = entry_points(folder)
        train(folder / "logs" / "run", 60, planned=400)
        with serve(folder / "logs", path) as port, chromium(folder / "profile") as driver:
            print(f"page load to curves, 60 steps: {times(lambda: open_tab(driver, port), 5)}")
            print(f"write to point shown (reload interval 1 s): {spread(shown(driver, folder / 'logs' / 'late'))}")
        large_run(folder / "large")
        for options in ((), ("--load_fast=false",)):
            with serve(folder / "large", path, *options) as port, chromium(folder / "profile") as driver:
                wait_until_loaded(port)
                label = f"{tags_count()} tags x 10,000 steps {' '.join(options)}"
                print(f"page load to curves, {label}: {times(lambda: open_tab(driver, port), 5)}")
                print(f"  of which the tab itself: {spread([tab_seconds(driver, port) for _ in range(5)])}")
                print(f"  answer of /series: {fetch_series(driver)}")


def tags_count() -> int:
    return len(tags.SCALARS)


def times(action: Callable[[], None], repeats: int) -> str:
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return spread(found)


def spread(seconds: list[float]) -> str:
    return f"median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}, n = {len(seconds)})"


def shown(driver: Any, folder: Path) -> list[float]:
    """Return the time from each write of a new run's step to its point in the chart."""
    waits: list[float] = []

    def wait_for_point(step: int) -> None:
        start = time.perf_counter()
        wait_for(lambda: step in points(driver, "max_grad_norm"), pause=0.02)
        if step > 2:  # the run itself must be found first
            waits.append(time.perf_counter() - start)
        time.sleep(step * 0.618 % 1)  # so that writes do not fall into step with flushes, reloads and polls

    train(folder, 22, wait_for_point, planned=400)
    return waits


def wait_until_loaded(port: int) -> None:
    """Wait until the server has read all events."""
    from urllib.request import urlopen

    address = f"http://127.0.0.1:{port}/data/plugin/opacus_ac/series?run=run"
    wait_for(lambda: b"10000" in urlopen(address).read(), seconds=120, pause=0.5)


def tab_seconds(driver: Any, port: int) -> float:
    """Return the time from the start of the tab's frame to its curves, without TensorBoard's own page."""
    open_tab(driver, port)
    milliseconds: float = driver.execute_script("return performance.getEntriesByName('privacy-curves')[0].startTime")
    return milliseconds / 1000


def fetch_series(driver: Any) -> str:
    """Return size over the wire and time of the curves' answer, as the page gets it."""
    script = """const done = arguments[0], url = new URL('./series?run=run', document.baseURI);
      const start = performance.now();
      fetch(url).then(r => r.text()).then(text => { const e = performance.getEntriesByName(url.href).at(-1);
        done(`${(e.encodedBodySize / 1024).toFixed(1)} KiB gzip (${(text.length / 1024).toFixed(0)} KiB), ` +
             `${(performance.now() - start).toFixed(0)} ms`); });"""
    answer: str = driver.execute_async_script(script)
    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("figures").add_argument("target", type=Path)
    commands.add_parser("measure")
    chosen = parser.parse_args()
    sys.exit(figures(chosen.target) if chosen.command == "figures" else measure())
