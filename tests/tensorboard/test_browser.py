"""The Privacy tab in real headless Chromium, under TensorBoard's own content security policy."""

import io
import re

import pytest
import tensorboard_browser
from tensorboard_browser import points, texts, wait_for
from tensorboard_runs import DELTA, private, steps
from torch.utils.tensorboard import SummaryWriter

from opacus_ac.release.running_mean import RunningMean, with_error
from opacus_ac.tensorboard import PrivacyDashboard
from opacus_ac.tensorboard.summaries import meta_summary

pytestmark = tensorboard_browser.NEEDS_A_BROWSER
EVIL = "<img src=x onerror=window.alert(1)>"
SCRIPT = "<script>window.pwned = 1</script><b>bold</b>"
CHARTS = ("epsilon", "max_grad_norm", "clip_rate", "lr_multiplier", "noisy_loss", "remaining_steps", "sample_rate",
          "noise_multiplier")  # fmt: skip


class Logs:
    """Two private runs, one that is not, and one written by somebody hostile; the first run can go on."""

    def __init__(self, folder):
        self.run = private(loss_bound=3.0)
        self.dashboard = PrivacyDashboard(folder / "first", self.run[0], self.run[2])
        self.mean = RunningMean()
        self.go_on(5)
        for name, count, options in (
            ("second", 3, {"loss_bound": 3.0, "batch_size_schedule": [16, 32]}),
            ("published", 2, {"noise_multiplier": 1.0, "clip_policy": "raw_percentile"}),
        ):
            run = private(**options)
            with PrivacyDashboard(folder / name, run[0], run[2], delta=DELTA) as dashboard:
                steps(run, dashboard, count, losses="loss_bound" in options)
        with SummaryWriter(str(folder / "second")) as writer:
            writer.add_scalar("eval/loss", 3.5, 1)
            writer.add_scalar("eval/loss", 2.5, 3)
        meta = {
            "version": 1,
            "private": True,
            "delta": SCRIPT,
            "unit": SCRIPT,
            "released": [SCRIPT],
            "warnings": [SCRIPT],
        }
        with SummaryWriter(str(folder / EVIL)) as writer:
            writer._get_file_writer().add_summary(meta_summary(meta), 0)
            for step, value in enumerate((1.0, float("nan"), 3.0)):
                writer.add_scalar("privacy/max_grad_norm", value, step)

    def go_on(self, count):
        for release in steps(self.run, self.dashboard, count, losses=True):
            self.mean.add(release.loss, self.run[2].statistics.loss_std(release))
        self.dashboard._writer.flush()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tab") / "logs"
    made = Logs(folder)
    made.folder = folder
    yield made
    made.dashboard.close()


@pytest.fixture(scope="module")
def port(logs):
    path = tensorboard_browser.entry_points(logs.folder.parent)
    with tensorboard_browser.serve(logs.folder, path) as port:
        yield port


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with tensorboard_browser.chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def is_open(driver):
    """Whether the driver shows the tab as a test before left it; stays in its frame if so."""
    driver.switch_to.default_content()
    if not (frame := driver.execute_script(tensorboard_browser.FIND_FRAME)):
        return False
    driver.switch_to.frame(frame)
    return driver.execute_script("return window.violations !== undefined && window.blocked === undefined")


@pytest.fixture
def tab(chromium, port):
    """The tab with its four runs; at the end of every test nothing may have complained."""
    if not is_open(chromium):
        tensorboard_browser.open_tab(chromium, port)
        chromium.execute_script(
            """window.violations = [];
               document.addEventListener('securitypolicyviolation', e => violations.push(e.blockedURI))"""
        )
    wait_for(lambda: len(texts(chromium, "label.run")) == 4)
    yield chromium
    assert tensorboard_browser.severe(chromium) == []
    assert chromium.execute_script("return window.violations") == []


def folded(driver):
    """Charts that are not shown because they say nothing but one number."""
    script = "return arguments[0].filter(id => document.querySelector(`#panel-${id}`).hidden)"
    return set(driver.execute_script(script, list(CHARTS)))


def choose(driver, *runs):
    """Show just these runs."""
    driver.execute_script(
        """for (const wanted of [true, false]) for (const text of [...document.querySelectorAll('label.run')].map(l => l.textContent)) {
             const label = [...document.querySelectorAll('label.run')].find(l => l.textContent === text);
             if (arguments[0].includes(text) === wanted && label.firstChild.checked !== wanted) label.firstChild.click();
           }""",
        list(runs),
    )
    wait_for(lambda: sorted(texts(driver, ".card h2 span")) == sorted(runs))


def card(driver, run):
    """Return the figures of a run's card by name."""
    script = """const card = [...document.querySelectorAll('.card')].find(c => c.getAttribute('aria-label') === arguments[0]);
      return Object.fromEntries([...card.querySelectorAll('[data-figure]')].map(f => [f.dataset.figure, f.textContent]))"""
    return driver.execute_script(script, run)


def test_every_chart_has_the_points_of_every_run(tab, logs):
    choose(tab, "first", "second")
    count = logs.run[2].steps_taken
    wait_for(lambda: sorted(points(tab, "max_grad_norm")) == sorted([count, 3]))
    assert folded(tab) - {"lr_multiplier"} == {"noise_multiplier"}
    for chart in set(CHARTS) - folded(tab):
        extra = 1 if chart in ("epsilon", "remaining_steps") else 0  # they are known before the first step
        assert sorted(points(tab, chart)) == sorted([count + extra, 3 + extra]), chart
    wait_for(lambda: points(tab, "epsilon", "projection") == [2, 2])
    assert len(points(tab, "epsilon", "target")) >= 1
    assert points(tab, "clip_rate", "target")
    assert tab.execute_script("return document.querySelectorAll('#panel-clip_rate .band').length") >= 1


def test_noisy_curves_have_a_running_mean_and_the_band_of_their_noise(tab, logs):
    choose(tab, "first")
    optimizer, count = logs.run[2], logs.run[2].steps_taken
    for chart in ("noisy_loss", "clip_rate"):
        wait_for(lambda chart=chart: points(tab, chart, "noisy") == points(tab, chart) == [count])
        assert tab.execute_script(f"return document.querySelectorAll('#panel-{chart} .band.noise').length") == 1
    assert points(tab, "max_grad_norm", "noisy") == []
    mean, error = logs.mean.known
    assert error == pytest.approx(optimizer.statistics.loss_std(optimizer.released) / len(logs.mean._steps) ** 0.5)
    assert card(tab, "first")["loss"] == with_error(mean, error)
    label = "return document.querySelector('#panel-noisy_loss svg').getAttribute('aria-label')"
    assert f"first: running mean {with_error(mean, error)} at step {count}" in tab.execute_script(label)


def test_the_page_shows_errors_as_the_package_does(tab):
    script = """const done = arguments[1], address = performance.getEntriesByType('resource').map(r => r.name)
      .find(n => n.endsWith('/scale.js')); import(address).then(m => done(arguments[0].map(p => m.withError(...p))))"""
    pairs = [(3.14159, 0.42), (3.14159, 0.031), (3.14159, 0.96), (31.4, 12.3), (3.14159, 0.0), (-2.5, 0.5), (1e-5, 3e-6),
             (123.4, 250.0), (0.9, 0.0996)]  # fmt: skip
    assert tab.execute_async_script(script, pairs) == [with_error(*pair) for pair in pairs]


def test_held_out_loss_and_noisy_norms_are_there_where_a_run_has_them(tab, logs):
    hidden = "return ['held_out_loss', 'norms'].map(id => document.querySelector(`#panel-${id}`).hidden)"
    choose(tab, "published")
    wait_for(lambda: tab.execute_script(hidden) == [True, True])
    choose(tab, "first", "second")
    wait_for(lambda: points(tab, "held_out_loss") == [2])
    assert card(tab, "second")["held-out"] == "2.5"
    bins = logs.run[2].released.histogram.counts.size
    assert points(tab, "norms") == [2 * (bins + 1)] * 2
    assert points(tab, "norms", "target") == [2, 2]
    assert texts(tab, "#panel-norms .axis") == ["gradient norm"]
    press = """const svg = document.querySelector('#panel-norms svg'); svg.focus();
      svg.dispatchEvent(new KeyboardEvent('keydown', {key: 'Home', cancelable: true}))"""
    tab.execute_script(press)
    assert "records at norm" in texts(tab, ".spoken")[0]
    visible = "return [...document.querySelectorAll('.cursor')].filter(c => c.getAttribute('visibility') === 'visible').length"
    assert tab.execute_script(visible) == 1  # the crosshair of a norm is not one of a step
    tab.execute_script(press.replace("Home", "Escape"))


def test_cards_say_in_which_settings_runs_differ(tab):
    lines = lambda run: texts(tab, f".card[aria-label={run}] .quiet")  # noqa: E731
    differs = lambda run: [line for line in lines(run) if line.startswith("differs in: ")]  # noqa: E731
    choose(tab, "first", "published")
    (line,) = differs("first")
    assert "clip policy percentile" in line
    assert "target epsilon 8" in line
    assert "dataset size" not in line  # it is the same
    assert "clip policy raw_percentile" in differs("published")[0]
    choose(tab, "first")
    assert differs("first") == []


def test_runs_are_filtered_by_name_and_setting_and_sorted(tab):
    type_in = """const [selector, value, event] = arguments, box = document.querySelector(selector); box.value = value;
      box.dispatchEvent(new Event(event))"""
    shown = lambda: texts(tab, "label.run span")  # noqa: E731
    choose(tab, "second", "first")
    tab.execute_script(type_in, ".tools input", "raw_perc", "input")
    assert shown() == ["published"]
    assert "3 do not match the filter" in texts(tab, ".runs legend")[0]
    assert sorted(texts(tab, ".card h2 span")) == ["first", "second"]  # what is chosen stays
    tab.execute_script(type_in, ".tools input", "", "input")
    tab.execute_script(type_in, ".tools select", "name", "change")
    assert shown() == [EVIL, "first", "published", "second"]
    assert texts(tab, ".card h2 span") == ["first", "second"]
    tab.execute_script(type_in, ".tools select", "epsilon", "change")
    assert set(shown()[2:]) == {EVIL, "published"}
    tab.execute_script(type_in, ".tools select", "latest", "change")


def test_names_of_runs_are_short_and_all_different(tab):
    script = """const done = arguments[1], address = performance.getEntriesByType('resource').map(r => r.name)
      .find(n => n.endsWith('/runs.js')); import(address).then(m => done(arguments[0].map(names => [...m.labels(names).values()])))"""
    cases = {
        ("out/runs/Nov29_08-19-09_host-name", "out/runs/Nov30_10-00-00_host-name"): ["29 Nov 08:19:09", "30 Nov 10:00:00"],
        ("a/runs/Nov29_08-19-09_h", "b/runs/Nov29_08-19-09_h"): ["a / 29 Nov 08:19:09", "b / 29 Nov 08:19:09"],
        ("runs/Nov29_08-19-09_one", "runs/Nov29_08-19-09_two"): ["runs/Nov29_08-19-09_one", "runs/Nov29_08-19-09_two"],
        (".",): ["this folder"],
        ("x/y", "x"): ["x / y", "x"],
        ("long/shared/first", "long/shared/second"): ["first", "second"],
    }  # fmt: skip
    assert tab.execute_async_script(script, [list(names) for names in cases]) == list(cases.values())


def test_every_card_says_in_words_how_its_run_is(tab, logs):
    choose(tab, "first", "second", "published")
    state = lambda run: texts(tab, f".card[aria-label={run}] .verdicts li")  # noqa: E731
    assert f"✓running, step {logs.run[2].steps_taken}" in state("first")
    remaining = card(tab, "second")["remaining"].split("projection")[0]
    assert f"–ended after step 3; {remaining} more steps fit the budget" in state("second")
    assert "✕not private: no finite epsilon holds" in state("published")
    assert texts(tab, ".status")[0].startswith("live, step")
    choose(tab, "second")
    assert texts(tab, ".status") == ["no run is going on; last step 3"]


def test_epsilon_and_remaining_steps_are_the_engines(tab, logs):
    choose(tab, "first")
    engine = logs.run[0]
    found = card(tab, "first")
    assert found["epsilon"] == f"{float(f'{engine.get_epsilon(DELTA):.4g}'):g} of 8"
    assert found["remaining"] == str(engine.remaining_steps())
    end = logs.run[2].steps_taken + engine.remaining_steps()
    assert any(f"projection: target reached at step {end}" in text for text in texts(tab, ".card .detail"))
    assert texts(tab, ".alert") == [f"first: {w}" for w in engine.privacy_report().warnings]


def test_a_new_point_appears_without_a_reload(tab, logs):
    choose(tab, "first")
    wait_for(lambda: points(tab, "max_grad_norm") == [logs.run[2].steps_taken])
    tab.execute_script("window.same = true")
    logs.go_on(2)
    wait_for(lambda: points(tab, "max_grad_norm") == [logs.run[2].steps_taken])
    expected = f"{float(f'{logs.run[0].get_epsilon(DELTA):.4g}'):g} of 8"
    assert card(tab, "first")["epsilon"] == expected
    assert tab.execute_script("return window.same") is True


def test_runs_overlay_in_colours_of_their_own_and_can_be_chosen(tab):
    choose(tab, "first", "second", "published")
    colours = tab.execute_script(
        "return [...document.querySelectorAll('#panel-max_grad_norm path.value')].map(p => getComputedStyle(p).stroke)"
    )
    assert len(set(colours)) == 3
    choose(tab, "second")
    assert len(points(tab, "max_grad_norm")) == 1
    choose(tab)
    assert texts(tab, ".status") == ["No run is chosen: tick one."]


def test_a_run_that_is_not_private_says_so_loudly(tab):
    choose(tab, "published", "second")
    (alert,) = texts(tab, ".alert.loud")
    assert alert.startswith("published is NOT PRIVATE, epsilon = infinity: ")
    assert "un-noised" in alert
    assert card(tab, "published")["epsilon"] == "infinity"
    assert "remaining" not in card(tab, "published")
    claims = texts(tab, ".claim")
    assert "NOT PRIVATE: epsilon = infinity" in claims
    assert any("-differential privacy after 3 steps" in claim for claim in claims)
    choose(tab, "published")
    assert texts(tab, "#panel-epsilon .empty") == ["Epsilon is infinite: no bound holds."]


def test_untrusted_text_is_shown_as_text(tab):
    choose(tab, EVIL)
    assert EVIL in texts(tab, "label.run span")
    shown = texts(tab, ".statement dd") + texts(tab, ".alert")
    assert sum(SCRIPT in text for text in shown) >= 3
    assert tab.execute_script("return document.querySelectorAll('img, b, main script').length") == 0
    assert tab.execute_script("return window.pwned === undefined && window.parent.pwned === undefined")
    wait_for(lambda: points(tab, "max_grad_norm") == [2])  # NaN is a gap


def test_the_statement_stays_unfolded_while_the_run_goes_on(tab, logs):
    choose(tab, "first")
    tab.execute_script("document.querySelector('.statement summary').click()")
    logs.go_on(1)
    wait_for(lambda: points(tab, "max_grad_norm") == [logs.run[2].steps_taken])
    assert tab.execute_script("return document.querySelector('.statement').open") is True
    released = logs.run[0].privacy_report().released
    assert set(released) <= set(texts(tab, ".statement dd"))


def background(driver):
    return driver.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_dark_mode_follows_tensorboard(tab):
    choose(tab, "first")
    tensorboard_browser.set_dark(tab, True)
    wait_for(lambda: background(tab) == "rgb(33, 33, 33)")
    assert tab.execute_script("return getComputedStyle(document.body).color") == "rgb(240, 240, 240)"
    tensorboard_browser.set_dark(tab, False)
    wait_for(lambda: background(tab) == "rgb(245, 245, 245)")


def test_narrow_windows_have_one_column_and_no_sideways_scroll(tab):
    choose(tab, "first", EVIL)
    columns = "return getComputedStyle(document.querySelector('.panels')).gridTemplateColumns.split(' ').length"
    assert tab.execute_script(columns) == 3
    chart = "return Number(document.querySelector('#panel-epsilon svg').getAttribute('width'))"
    wide = tab.execute_script(chart)
    tab.execute_script(
        "const f = window.frameElement; window.wide = f.style.cssText; f.style.width = '360px'; f.style.minWidth = '0'"
    )
    try:
        wait_for(lambda: tab.execute_script("return document.documentElement.clientWidth") <= 360)
        assert tab.execute_script(columns) == 1
        fits = "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        wait_for(lambda: tab.execute_script(chart) != wide and tab.execute_script(fits))
    finally:
        tab.execute_script("window.frameElement.style.cssText = window.wide")


def test_keys_move_the_crosshair_and_say_the_values(tab, logs):
    choose(tab, "first")
    press = """const svg = document.querySelector('#panel-max_grad_norm svg'); svg.focus();
      svg.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], cancelable: true}))"""
    tab.execute_script(press, "Home")
    assert texts(tab, ".spoken")[0].startswith("first: 1 at step 1")
    tab.execute_script(press, "ArrowRight")
    assert texts(tab, ".spoken")[0].endswith("at step 2")
    visible = "return [...document.querySelectorAll('.cursor')].filter(c => c.getAttribute('visibility') === 'visible').length"
    assert tab.execute_script(visible) == len(set(CHARTS) - folded(tab))
    assert tab.execute_script("return document.querySelectorAll('.tooltip:not([hidden])').length") == 1
    tab.execute_script(press, "Escape")
    assert tab.execute_script(visible) == 0


def test_charts_have_labels_units_and_ticks(tab):
    choose(tab, "first")
    for chart in set(CHARTS) - folded(tab):
        label = tab.execute_script(
            "return document.querySelector(arguments[0]).getAttribute('aria-label')", f"#panel-{chart} svg"
        )
        title, unit = texts(tab, f"#panel-{chart} h2")[0], texts(tab, f"#panel-{chart} .unit")[0]
        assert label.startswith(f"{title}, {unit}. first: ")
        assert len(texts(tab, f"#panel-{chart} .tick.x")) >= 2
        assert len(texts(tab, f"#panel-{chart} .tick.y")) >= 2
        assert texts(tab, f"#panel-{chart} .axis") == ["step"]


def test_a_server_that_does_not_answer_is_said_and_waited_for(tab, logs):
    choose(tab, "first")
    tab.execute_script("window.kept = window.fetch; window.fetch = () => Promise.reject(new Error('gone'))")
    said = "No answer (gone); trying again. Is tensorboard still running? What is shown is of "
    wait_for(lambda: texts(tab, ".status")[0].startswith(said))
    assert tab.execute_script("return document.querySelectorAll('.panels.stale').length") == 1
    wait_for(lambda: points(tab, "max_grad_norm") == [logs.run[2].steps_taken])
    tab.execute_script("window.fetch = window.kept")
    wait_for(lambda: texts(tab, ".status")[0].startswith("live, step"))
    assert tab.execute_script("return document.querySelectorAll('.panels.stale').length") == 0


def test_constant_curves_are_in_the_card(tab, logs):
    choose(tab, "first")
    wait_for(lambda: {"sample_rate", "noise_multiplier"} <= folded(tab))
    (line,) = [text for text in texts(tab, ".card .quiet") if text.startswith("constant: ")]
    assert "sampling rate 0.25" in line
    assert f"noise multiplier {float(f'{logs.run[2].noise_multiplier:.4g}'):g}" in line


def test_an_empty_chart_says_what_to_do(tab):
    choose(tab, EVIL)
    assert texts(tab, "#panel-noisy_loss .empty")[0].startswith("No loss is released: pass loss_bound=")
    assert texts(tab, "#panel-remaining_steps .empty")[0].startswith("No target epsilon: make_private_with_epsilon")


POINTER = """const [chart, events] = arguments, svg = document.querySelector(`#panel-${chart} svg`), box = svg.getBoundingClientRect();
  const plot = [58, box.width - 14]; // the margins of the axes
  for (const [name, share] of events) svg.dispatchEvent(new (name === 'dblclick' ? MouseEvent : PointerEvent)(name, {button: 0,
    clientX: box.left + plot[0] + share * (plot[1] - plot[0]), clientY: box.top + 60}));"""


def test_the_tooltip_is_below_the_curve(tab, logs):
    choose(tab, "first")
    wait_for(lambda: points(tab, "noisy_loss") == [logs.run[2].steps_taken])
    tab.execute_script(POINTER, "max_grad_norm", [["pointermove", 0.3]])
    below = """const panel = document.querySelector('#panel-max_grad_norm'), tip = panel.querySelector('.tooltip:not([hidden])');
      return tip.getBoundingClientRect().top >= panel.querySelector('.base').getBoundingClientRect().bottom"""
    assert tab.execute_script(below) is True
    tab.execute_script(POINTER, "max_grad_norm", [["pointerleave", 0.3]])


def test_dragging_zooms_all_charts_and_a_double_click_shows_everything(tab, logs):
    choose(tab, "first")
    wait_for(lambda: points(tab, "noisy_loss") == [logs.run[2].steps_taken])
    last = lambda chart: int(texts(tab, f"#panel-{chart} .tick.x")[-1])  # noqa: E731
    first = lambda chart: int(texts(tab, f"#panel-{chart} .tick.x")[0])  # noqa: E731
    count = logs.run[2].steps_taken
    tab.execute_script(POINTER, "max_grad_norm", [["pointerdown", 0.3], ["pointermove", 0.5], ["pointerup", 0.9]])
    for chart in ("max_grad_norm", "noisy_loss", "epsilon"):
        assert first(chart) >= 0.3 * count - 1e-9
        assert last(chart) <= 0.9 * count + 1e-9
    tab.execute_script(POINTER, "epsilon", [["dblclick", 0.5]])
    assert first("max_grad_norm") == 0
    tab.execute_script(POINTER, "max_grad_norm", [["pointerdown", 0.3], ["pointerup", 0.301]])  # a click is no drag
    assert first("max_grad_norm") == 0


def test_a_chart_is_saved_as_csv_and_png(tab, logs):
    choose(tab, "first")
    wait_for(lambda: points(tab, "noisy_loss") == [logs.run[2].steps_taken])
    catch = """window.saved = []; window.make = URL.createObjectURL; HTMLAnchorElement.prototype.click = function () {};
      URL.createObjectURL = blob => { blob.arrayBuffer().then(b => saved.push([blob.type, [...new Uint8Array(b)]])); return 'about:blank'; }"""
    tab.execute_script(catch)
    try:
        tab.execute_script("for (const b of document.querySelectorAll('#panel-noisy_loss .save button')) b.click()")
        saved = dict(wait_for(lambda: tab.execute_script("return saved.length === 2 && saved")))
    finally:
        tab.execute_script("URL.createObjectURL = window.make; delete HTMLAnchorElement.prototype.click")
    rows = [line.split(",") for line in bytes(saved["text/csv"]).decode().splitlines()]
    assert rows[0] == ["run", "what", "step", "noisy_loss", "noise_std"]
    count = logs.run[2].steps_taken
    assert [row[1] for row in rows[1:]] == ["released"] * count + ["running mean"] * count
    assert float(rows[-1][3]) == pytest.approx(logs.mean.known[0], rel=1e-4)
    assert bytes(saved["image/png"]).startswith(b"\x89PNG")
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(bytes(saved["image/png"]))).convert("RGB")
    colour = tab.execute_script(
        "return getComputedStyle(document.querySelector('#panel-noisy_loss .line.value')).stroke"
    )
    wanted = tuple(int(part) for part in re.findall(r"\d+", colour))
    assert sum(pixel == wanted for pixel in image.getdata()) > 100  # the curve is in it, with its style


def test_cells_of_a_csv_are_text_and_no_formulas(tab):
    script = """const done = arguments[1], address = performance.getEntriesByType('resource').map(r => r.name)
      .find(n => n.endsWith('/save.js')); import(address).then(m => done(arguments[0].map(m.cell)))"""
    cells = {
        "=1+1": "'=1+1",
        "+a": "'+a",
        "@b": "'@b",
        "a,b": '"a,b"',
        'q"q': '"q""q"',
        "-x\ny": '"\'-x\ny"',
        "run": "run",
    }
    assert tab.execute_async_script(script, list(cells)) == list(cells.values())
    assert tab.execute_async_script(script, [-1.5, None]) == ["-1.5", ""]


def test_the_policy_is_in_force_and_blocks_what_we_do_not_use(chromium, port):
    """Without this, the absence of violations in the other tests would show nothing."""
    tensorboard_browser.open_tab(chromium, port)
    chromium.execute_script(
        """window.blocked = [];
           document.addEventListener('securitypolicyviolation', e => blocked.push(e.effectiveDirective));
           const inline = document.createElement('script'); inline.textContent = 'window.ran = 1';
           const image = document.createElement('img'); image.src = 'https://example.invalid/x.png';
           document.head.append(inline, image);"""
    )
    blocked = wait_for(lambda: chromium.execute_script("return blocked.length > 1 && blocked"))
    assert {entry.split("-")[0] for entry in blocked} >= {"script", "img"}
    assert chromium.execute_script("return window.ran") is None
    assert tensorboard_browser.severe(chromium)  # a violation is a severe entry
    chromium.switch_to.default_content()


def test_the_tab_works_without_the_rust_server(chromium, logs, tmp_path):
    path = tensorboard_browser.entry_points(tmp_path)
    with tensorboard_browser.serve(logs.folder, path, "--load_fast=false") as port:
        tensorboard_browser.open_tab(chromium, port)
        wait_for(lambda: sorted(texts(chromium, "label.run span")) == sorted([EVIL, "first", "published", "second"]))
        wait_for(lambda: logs.run[2].steps_taken in points(chromium, "max_grad_norm"))
        assert tensorboard_browser.severe(chromium) == []
        chromium.switch_to.default_content()


def test_tensorboards_own_pages_show_the_run_too(chromium, port):
    """Custom Scalars has our charts, and Text the statement."""
    chromium.get("about:blank")
    tensorboard_browser.severe(chromium)  # what a page of an earlier server has left behind
    for fragment, words in (("custom_scalars", "Privacy budget"), ("text", "privacy/statement")):
        chromium.get("about:blank")
        chromium.get(f"http://127.0.0.1:{port}/#{fragment}")
        script = """const walk = n => (n.shadowRoot ? walk(n.shadowRoot) : '') +
          [...n.childNodes].map(c => c.nodeType === 3 ? c.textContent : walk(c)).join(' '); return walk(document.body)"""
        wait_for(lambda words=words, script=script: words in chromium.execute_script(script))
    assert tensorboard_browser.severe(chromium) == []
