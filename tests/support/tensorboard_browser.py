"""TensorBoard and headless Chromium for tests, figures and measurements of the Privacy tab; local addresses only."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
AVAILABLE = CHROMIUM and DRIVER and importlib.util.find_spec("selenium")
NEEDS_A_BROWSER = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not AVAILABLE and os.environ.get("OPACUS_AC_REQUIRE_BROWSER") != "1",
        reason="needs chromium, chromium-driver and selenium; OPACUS_AC_REQUIRE_BROWSER=1 makes this an error",
    ),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip
FIND_FRAME = """
function walk(node) {
  for (const child of node.querySelectorAll('*')) {
    if (child.tagName === 'IFRAME' && child.clientWidth > 0) return child;
    const found = child.shadowRoot ? walk(child.shadowRoot) : null;
    if (found) return found;
  }
  return null;
}
return walk(document);
"""


def entry_points(folder: Path) -> str:
    """Write the package's metadata, with its entry points, into ``folder``; return a PYTHONPATH that has it."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return os.pathsep.join((str(folder), str(ROOT)))


@contextlib.contextmanager
def serve(logdir: Path, path: str, *options: str) -> Iterator[int]:
    """Run TensorBoard on a free local port in a process group of its own; yield the port."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    with open(logdir.parent / "tensorboard.log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*command, "--reload_interval", "1", *options],
            env={**os.environ, "PYTHONPATH": path},
            cwd=logdir.parent,  # not the checkout, which would come before PYTHONPATH
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield _port(process, Path(log.name))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=20)


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text(encoding="utf-8")):
            return int(found[1])
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"TensorBoard did not start:\n{log.read_text(encoding='utf-8')}")


@contextlib.contextmanager
def chromium(profile: Path, width: int = 1400, height: int = 1000) -> Iterator[Any]:
    """Yield a Selenium driver of headless Chromium with a fresh profile."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    if not (CHROMIUM and DRIVER):
        raise RuntimeError("chromium or chromedriver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--window-size={width},{height}", f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def next_second() -> None:
    """Sleep into the next second: readers sort event files by name, which has the second and then a count without zeros."""
    time.sleep(1.01 - time.time() % 1)


def wait_for(condition: Callable[[], Any], seconds: float = 30.0, pause: float = 0.05) -> Any:
    """Return the first true value of ``condition``; an exception counts as false until the time is up."""
    deadline = time.monotonic() + seconds
    while True:
        last: Any = None
        try:
            if value := condition():
                return value
        except Exception as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s; last error: {last}")
        time.sleep(pause)


def open_tab(driver: Any, port: int) -> None:
    """Open the Privacy tab and switch into its frame, once curves are drawn."""
    # Another fragment of the same address would not load the page again.
    driver.get("about:blank")
    driver.get(f"http://127.0.0.1:{port}/#opacus_ac")
    frame = wait_for(lambda: driver.execute_script(FIND_FRAME))
    driver.switch_to.frame(frame)
    wait_for(lambda: points(driver, "max_grad_norm"))


def points(driver: Any, panel: str, kind: str = "value") -> list[int]:
    """Return the number of points of each line of a chart."""
    script = "return [...document.querySelectorAll(arguments[0])].map(p => Number(p.dataset.points))"
    found: list[int] = driver.execute_script(script, f"#panel-{panel} path.line.{kind}")
    return found


def texts(driver: Any, selector: str) -> list[str]:
    """Return the text of every element that matches."""
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    found: list[str] = driver.execute_script(script, selector)
    return found


def set_dark(driver: Any, dark: bool) -> None:
    """Make TensorBoard's page dark or light, as its own switch does; stays inside the frame."""
    driver.execute_script("window.parent.document.body.classList.toggle('dark-mode', arguments[0])", dark)


def severe(driver: Any) -> list[str]:
    """Return the severe console entries since the last call."""
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
