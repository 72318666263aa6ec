"""The Privacy tab's server side: its answers on both data servers, untrusted input, light imports, packaging."""

import gzip
import json
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from urllib.request import Request, urlopen

import numpy as np
import pytest
import tensorboard_browser
from checkout import ROOT
from tensorboard.backend import application
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.util.tensor_util import make_tensor_proto
from tensorboard_runs import private, resumed, steps
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from opacus_ac.tensorboard import PrivacyDashboard
from opacus_ac.tensorboard import plugin as plugin_module
from opacus_ac.tensorboard.loader import PrivacyLoader
from opacus_ac.tensorboard.plugin import FILES, POINTS, STATIC, PrivacyPlugin, norms, plain
from opacus_ac.tensorboard.summaries import meta_summary

META = {"version": 1, "private": True, "delta": 1e-5, "released": ["the sum of clipped gradients"], "warnings": []}
EVIL = "<img src=x onerror=alert(1)>"


def write(folder, meta=META, steps=range(1, 4), tag="privacy/epsilon", value=lambda step: step / 10):
    with SummaryWriter(str(folder)) as writer:
        if meta is not None:
            writer._get_file_writer().add_summary(meta_summary(meta), 0)
        for step in steps:
            writer.add_scalar(tag, value(step), step)


def client(folder):
    multiplexer = EventMultiplexer(size_guidance={"tensors": 10_000, "scalars": 0})
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    plugin = PrivacyPlugin(
        SimpleNamespace(data_provider=MultiplexerDataProvider(multiplexer, str(folder)), logdir=str(folder))
    )
    apps = plugin.get_plugin_apps()

    def get(path, **query):
        return Client(apps[path]).get(path, query_string=query)

    return get


def test_only_runs_with_a_record_are_listed_latest_first(tmp_path):
    write(tmp_path / "b" / "first")
    write(tmp_path / "a")
    write(tmp_path / "public", meta=None)
    answer = client(tmp_path)("/runs").get_json()
    assert [run["run"] for run in answer["runs"]] == ["a", "b/first"]
    assert answer["runs"][0]["meta"] == META


def test_the_newest_record_counts(tmp_path):
    write(tmp_path / "run")
    tensorboard_browser.next_second()
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer._get_file_writer().add_summary(meta_summary({**META, "private": False}), 3)
    (run,) = client(tmp_path)("/runs").get_json()["runs"]
    assert run["meta"]["private"] is False


def test_series_are_columns_of_the_listed_tags_only(tmp_path):
    write(tmp_path / "run")
    write(tmp_path / "run", meta=None, tag="train/loss")
    get = client(tmp_path)
    assert get("/series", run="run").get_json()["run"]["curves"] == {"epsilon": [[1, 2, 3], [0.1, 0.2, 0.3]]}
    assert get("/series").get_json() == {}
    assert get("/series", run="../run").get_json() == {}


def test_the_state_of_a_run_and_its_verdicts_are_sent_and_age_with_its_files(tmp_path):
    write(tmp_path / "run")
    (file,) = (tmp_path / "run").glob("*tfevents*")
    get = client(tmp_path)
    found = get("/series", run="run").get_json()["run"]
    assert (found["state"], found["verdicts"]) == ("running", [["good", "running, step 3"]])
    os.utime(file, (time.time() - 400, time.time() - 400))
    found = get("/series", run="run").get_json()["run"]
    assert found["state"] == "silent"
    assert found["verdicts"] == [["warning", "no data for 6 min: the run was stopped, or a step takes this long"]]


def test_a_run_without_a_record_has_no_curves_here(tmp_path):
    write(tmp_path / "run")
    write(tmp_path / "public", meta=None)
    assert set(client(tmp_path)("/series", run=["run", "public"]).get_json()) == {"run"}


def test_the_held_out_loss_of_a_private_run_is_sent_and_no_other_public_tag(tmp_path):
    write(tmp_path / "run", tag="eval/loss", value=lambda step: 4.0 - step)
    write(tmp_path / "run", meta=None, tag="eval/accuracy")
    write(tmp_path / "public", meta=None, tag="eval/loss")
    found = client(tmp_path)("/series", run=["run", "public"]).get_json()
    assert {run: part["curves"] for run, part in found.items()} == {
        "run": {"held_out_loss": [[1, 2, 3], [3.0, 2.0, 1.0]]}
    }


def test_the_last_noisy_histogram_is_sent(tmp_path):
    run = private()
    with PrivacyDashboard(tmp_path / "run", run[0], run[2]) as dashboard:
        release = steps(run, dashboard, 3)[-1]
    found = client(tmp_path)("/series", run="run").get_json()["run"]["norms"]
    assert found["step"] == 3
    edges = np.log10(release.histogram.window.edges)
    edges = np.array([edges[0] - 0.2, *edges, edges[-1] + 0.2])
    below = np.cumsum([0, *np.maximum(release.histogram.counts, 0)])
    assert found["edges"][0] == pytest.approx(edges[0], abs=1e-5)
    assert len(found["counts"]) > 5  # TensorBoard puts empty bins at the beginning together
    np.testing.assert_allclose(
        np.cumsum([0, *found["counts"]]), np.interp(found["edges"], edges, below), atol=0.01 * below[-1]
    )


@pytest.mark.parametrize(
    ("table", "sent"),
    [
        ([[0.0, 1.0, 2.5]], {"step": 7, "edges": [0.0, 1.0], "counts": [2.5]}),
        ([[0.0, 1.0, math.nan]], {"step": 7, "edges": [0.0, 1.0], "counts": [None]}),
        ([0.0, 1.0, 2.0], None),
        ([[0.0, 1.0]], None),
        (np.zeros((201, 3)), None),
        (np.zeros((0, 3)), None),
        ([["a", "b", "c"]], None),
    ],
)
def test_a_histogram_that_is_none_is_left_out(table, sent):
    assert norms([SimpleNamespace(step=7, numpy=np.array(table))]) == sent
    assert norms([]) is None


def test_a_run_that_was_resumed_in_another_folder_is_one_run(tmp_path):
    logs, saved = tmp_path / "logs", tmp_path / "saved.pt"
    first = private()
    with PrivacyDashboard(logs / "one", first[0], first[2]) as dashboard:
        steps(first, dashboard, 3)
        first[0].save_checkpoint(path=saved, module=first[1], optimizer=first[2])
        steps(first, dashboard, 2)
    again = private()
    again[0].load_checkpoint(path=saved, module=again[1], optimizer=again[2])
    with PrivacyDashboard(logs / "two", again[0], again[2]) as dashboard:
        releases = steps(again, dashboard, 4)
    get = client(logs)
    (listed,) = get("/runs").get_json()["runs"]
    assert (listed["run"], listed["parts"], listed["meta"]["first_step"]) == ("two", ["one"], 3)
    curves = get("/series", run="two").get_json()["two"]["curves"]
    assert curves["max_grad_norm"][0] == [1, 2, 3, 4, 5, 6, 7]
    assert curves["epsilon"][0] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert curves["max_grad_norm"][1][3:] == pytest.approx([r.max_grad_norm for r in releases], rel=1e-6)


def test_a_std_has_three_digits_and_a_point_only_where_it_changes(tmp_path):
    values = {1: 0.12341, 2: 0.12339, 3: 0.2, 4: 0.2, 5: 0.12341}
    write(tmp_path / "run", steps=values, tag="privacy/noisy_loss_std", value=values.get)
    write(tmp_path / "run", meta=None, steps=[1], tag="privacy/noisy_loss_mean", value=lambda step: 1.2345678)
    found = client(tmp_path)("/series", run="run").get_json()["run"]["curves"]
    assert found["noisy_loss_std"] == [[1, 3, 5], [0.123, 0.2, 0.123]]
    assert found["noisy_loss_mean"] == [[1], [1.2346]]


def test_long_curves_are_thinned_and_keep_their_end(tmp_path):
    write(tmp_path / "run", steps=range(POINTS * 3))
    steps, values = client(tmp_path)("/series", run="run").get_json()["run"]["curves"]["epsilon"]
    assert len(steps) == len(values) == POINTS
    assert steps[-1] == 3 * POINTS - 1
    assert steps == sorted(set(steps))


def test_no_more_runs_than_colours_are_sent(tmp_path):
    names = [f"run{i:02}" for i in range(plugin_module.MAX_RUNS + 2)]
    for name in names:
        write(tmp_path / name, steps=[1])
    assert set(client(tmp_path)("/series", run=names).get_json()) == set(names[: plugin_module.MAX_RUNS])


@pytest.mark.parametrize(
    ("value", "shown"),
    [(math.inf, "infinity"), (-math.inf, "-infinity"), (math.nan, None), (0.1 + 1e-9, 0.1), (-3.0, -3.0)],
)
def test_numbers_that_json_lacks(value, shown, tmp_path):
    assert plain(value) == shown
    write(tmp_path / "run", steps=[1], value=lambda step: value)
    assert client(tmp_path)("/series", run="run").get_json()["run"]["curves"]["epsilon"] == [[1], [shown]]


UNREADABLE = {
    "no json": b"{",
    "no object": b"[]",
    "other version": b'{"version": 99}',
    "too deep": b"[" * 30_000,
    "too long": b'{"version": 1, "x": "' + b"x" * 70_000 + b'"}',
    "not utf-8": b"\xff\xfe\xff",
    "a number": make_tensor_proto(3.0),
    "a vector": make_tensor_proto([1.0, 2.0]),
    "no number at all": make_tensor_proto([], dtype="float32"),
    "several texts": make_tensor_proto([b"{}", b"{}"]),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_record_that_cannot_be_read_is_said_to_be_so(case, tmp_path):
    summary = meta_summary(META)
    if isinstance(UNREADABLE[case], bytes):
        summary.value[0].tensor.string_val[0] = UNREADABLE[case]
    else:
        summary.value[0].tensor.CopyFrom(UNREADABLE[case])
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer._get_file_writer().add_summary(summary, 0)
    write(tmp_path / "good")
    runs = {run["run"]: run["meta"] for run in client(tmp_path)("/runs").get_json()["runs"]}
    assert "cannot be read" in runs["run"]["unreadable"]
    assert runs["good"] == META


def test_numbers_in_a_record_that_json_lacks_are_text(tmp_path):
    summary = meta_summary(META)
    summary.value[0].tensor.string_val[0] = b'{"version": 1, "delta": NaN, "released": [Infinity, {"a": 1}]}'
    with SummaryWriter(str(tmp_path / "run")) as writer:
        writer._get_file_writer().add_summary(summary, 0)
    (run,) = client(tmp_path)("/runs").get_json()["runs"]
    assert run["meta"] == {"version": 1, "delta": None, "released": ["infinity", {"a": 1}]}


def test_untrusted_text_is_json_with_a_type_that_is_not_sniffed(tmp_path):
    write(tmp_path / EVIL, meta={**META, "unit": "<script>alert(1)</script>"})
    response = client(tmp_path)("/runs")
    assert response.headers["Content-Type"].startswith("application/json")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.get_json()["runs"][0]["run"] == EVIL


def test_every_static_file_is_served_with_its_type(tmp_path):
    (tmp_path / "logs").mkdir()
    get = client(tmp_path / "logs")
    assert {f"/{path.name}" for path in STATIC.iterdir()} == set(FILES)
    for route, kind in FILES.items():
        response = get(route)
        assert response.headers["Content-Type"].startswith(kind)
        assert response.text == (STATIC / route[1:]).read_text()


# Ways for text to become markup or code, and anything from another address.
FORBIDDEN = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc", "DOMParser",
             "createContextualFragment", "onclick", "//cdn", "@import", "url(")  # fmt: skip


@pytest.mark.parametrize("path", sorted(STATIC.iterdir()), ids=lambda p: p.name)
def test_the_page_interprets_no_text_and_loads_nothing_from_elsewhere(path):
    text = path.read_text()
    assert [word for word in FORBIDDEN if word in text] == []
    assert set(re.findall(r"https?://[^\"']+", text)) <= {"http://www.w3.org/2000/svg"}
    assert {f"/{name}" for name in re.findall(r'from "\./([^"]+)"', text)} <= set(FILES)


def test_the_plugin_is_light():
    code = "import sys; import opacus_ac.tensorboard.loader, opacus_ac.tensorboard.plugin, opacus_ac.tensorboard as t; dir(t)"
    code += "; print([m for m in ('torch', 'opacus', 'scipy', 'tensorflow') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
    )


def test_lazy_names():
    import opacus_ac.tensorboard as package

    assert dir(package) == ["PrivacyDashboard", "keep_time_out"]
    assert package.PrivacyDashboard.__module__ == "opacus_ac.tensorboard.dashboard"
    with pytest.raises(AttributeError, match="nonsense"):
        package.nonsense  # noqa: B018


def test_a_plugin_that_cannot_be_imported_or_built_is_left_out(monkeypatch, caplog):
    context = SimpleNamespace(data_provider=None)
    assert isinstance(PrivacyLoader().load(context), PrivacyPlugin)
    assert PrivacyLoader().load(None) is None
    monkeypatch.setitem(sys.modules, "opacus_ac.tensorboard.plugin", None)
    assert PrivacyLoader().load(context) is None
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "the Privacy tab of opacus_ac is left out"
    ] * 2


def test_the_loader_is_what_tensorboard_accepts():
    assert isinstance(application.make_plugin_loader(PrivacyLoader), PrivacyLoader)


def test_the_package_has_its_entry_point_and_its_page(tmp_path):
    folder = tensorboard_browser.entry_points(tmp_path).split(":")[0]
    code = "from importlib.metadata import entry_points as e; print([p.value for p in e(group='tensorboard_plugins')])"
    found = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": f"{folder}:{ROOT}"}, check=True, capture_output=True, text=True
    )
    assert "opacus_ac.tensorboard.loader:PrivacyLoader" in found.stdout
    build = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        str(tmp_path),
        "build_py",
        "-d",
        str(tmp_path / "b"),
    ]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    built = tmp_path / "b" / "opacus_ac" / "tensorboard" / "static"
    assert {path.name for path in built.iterdir()} == {path.name for path in STATIC.iterdir()}


def fetch(port, path):
    request = Request(f"http://127.0.0.1:{port}/data/{path}", headers={"Accept-Encoding": "gzip"})
    with urlopen(request, timeout=20) as response:
        body = response.read()
        zipped = response.headers.get("Content-Encoding") == "gzip"
    return json.loads(gzip.decompress(body) if zipped else body), zipped


@pytest.mark.parametrize("options", [[], ["--load_fast=false"]], ids=["rust", "python"])
def test_both_data_servers_answer_alike(options, tmp_path):
    logs = tmp_path / "logs"
    write(logs / "long", steps=range(20_000))
    resumed(logs / "resumed", tmp_path / "saved.pt", tensorboard_browser.next_second)
    with tensorboard_browser.serve(logs, tensorboard_browser.entry_points(tmp_path), *options) as port:
        listing = lambda: fetch(port, "plugins_listing")[0].get("opacus_ac", {}).get("enabled")  # noqa: E731
        tensorboard_browser.wait_for(listing)
        series = lambda name: fetch(port, f"plugin/opacus_ac/series?run={name}")  # noqa: E731
        tensorboard_browser.wait_for(lambda: series("long")[0]["long"]["curves"]["epsilon"][0][-1] == 19_999, 120)
        tensorboard_browser.wait_for(
            lambda: series("resumed")[0]["resumed"]["curves"]["max_grad_norm"][0] == [1, 2, 3, 4, 5], 120
        )
        answer, zipped = series("long")
        assert zipped
        assert 900 <= len(answer["long"]["curves"]["epsilon"][0]) <= POINTS
        metas = {run["run"]: run["meta"] for run in fetch(port, "plugin/opacus_ac/runs")[0]["runs"]}
        assert metas["long"] == META
        assert metas["resumed"]["dataset_size"] == 64


def test_tensorboard_starts_without_the_tab_when_the_tab_is_broken(tmp_path):
    path = tensorboard_browser.entry_points(tmp_path)
    package = tmp_path / "broken" / "opacus_ac" / "tensorboard"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("")
    (package / "loader.py").write_text((STATIC.parent / "loader.py").read_text())
    (package / "plugin.py").write_text("raise RuntimeError('broken')")
    write(tmp_path / "logs" / "run")
    with tensorboard_browser.serve(tmp_path / "logs", f"{tmp_path / 'broken'}:{path.split(':')[0]}") as port:
        assert tensorboard_browser.wait_for(lambda: fetch(port, "runs")[0]) == ["run"]
        assert "opacus_ac" not in fetch(port, "plugins_listing")[0]
    assert "left out: RuntimeError: broken" in (tmp_path / "tensorboard.log").read_text()
