"""The pages that teach: their code runs as printed, their tables are what the commands print, their figures what the script draws."""

from __future__ import annotations

import json
import math
import re
import runpy
import shlex

import plot_clipping
import pytest
from checkout import ROOT

from opacus_ac import cli
from opacus_ac.clipping import POLICIES, ClipPolicy

DOCS = ROOT / "docs"
SCRIPT = runpy.run_path(str(DOCS / "notebooks.py"))
AS_NOTEBOOK = {page: ROOT / "examples" / "notebooks" / name for page, name in SCRIPT["PAGES"].items()}
PAGES = {
    "quickstart.md": "epsilon 7.99",
    "from-opacus.md": "-differential privacy by",
    "choosing.md": "norm of the noise of a step 23.18 C",
    "adaptive-clipping.md": "sensitivity 1.0204",
    "bitnet.md": "AutoBitLinear",
    "lora.md": "640 of 21280 weights are trained",
    "extending.md": "1.0000 of the declared sensitivity",
}


#: Pages that show all that their code prints.
SHOWN = {"quickstart.md"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def masked(text: str) -> str:
    """Printed text without the numbers that follow from noise and draws."""
    return re.sub(r"\b(C|clip rate|noisy loss|next C =|rows:|before,) [\d.]+", r"\1 *", text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(POLICIES, "halving", ClipPolicy)  # the name that extending.md gives; undone after the test
    scope: dict[str, object] = {"__name__": page}
    for code in SCRIPT["code"](AS_NOTEBOOK[page]) if page in AS_NOTEBOOK else blocks(page, "python"):
        exec(compile(code, page, "exec"), scope)
    printed = capsys.readouterr().out
    assert PAGES[page] in printed
    if page in SHOWN:
        (shown,) = blocks(page, "text")
        assert masked(shown).splitlines() == masked(printed).splitlines(), (
            f"{page} shows what the code no longer prints"
        )


@pytest.mark.parametrize("page", AS_NOTEBOOK)
def test_a_notebook_is_its_page(page):
    """The test above runs its cells."""
    path = AS_NOTEBOOK[page]
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == SCRIPT["notebook"](page), "run: python docs/notebooks.py"
    assert [code.strip() for code in SCRIPT["code"](path)] == [code.strip() for code in blocks(page, "python")]
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


TRANSCRIPTS = [text for page in PAGES for text in blocks(page, "console")]


@pytest.mark.parametrize("text", TRANSCRIPTS, ids=lambda text: text.splitlines()[0][2:])
def test_a_table_is_what_its_command_prints(text, capsys):
    command, *printed = text.splitlines()
    words = shlex.split(command)
    assert words[:2] == ["$", "opacus-ac"]
    assert cli.main(words[2:]) == cli.OK
    out = capsys.readouterr().out.splitlines()
    assert len(printed) >= 3
    assert printed == out[: len(printed)]  # the legend below the table is printed once on the page
    assert all(
        line.startswith(("noise: ", "of the run: ", "caught: ", "--learning_rate auto")) for line in out[len(printed) :]
    )


def test_there_are_tables_to_compare():
    assert len(TRANSCRIPTS) == 6


def test_links_lead_somewhere():
    for page in [*PAGES, "allocation.md"]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (DOCS / page).read_text(encoding="utf-8")):
            assert target.startswith("http") or (DOCS / target).exists(), f"{page}: {target}"


def test_every_page_says_what_it_guarantees_before_its_second_heading():
    for page in PAGES:
        head = (DOCS / page).read_text(encoding="utf-8").split("\n## ")[0]
        assert re.search(r"guarantee|epsilon|refused", head), page


# ---- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", plot_clipping.STARTS)
def test_c_follows_the_percentile_from_any_start(start):
    """The caption: found within 6 steps, and then within 11 % (the lag of a fall of 3 % a step is some steps)."""
    course = plot_clipping.simulate(start)["C"]
    assert course[0] == start
    errors = [abs(math.log(c / plot_clipping.true_percentile(step, 0.9))) for step, c in enumerate(course)]
    assert max(errors[6:]) < 0.11


def test_runs_from_different_starts_agree():
    courses = [plot_clipping.simulate(start)["C"][11:] for start in plot_clipping.STARTS]
    assert max(max(c) / min(c) for c in zip(*courses, strict=True)) < 1.01


def test_scaling_keeps_the_steps_of_adam():
    last = {
        n: plot_clipping.simulate(4.0, normalize=n, adam=True)["moved"][-1] / plot_clipping.DIMENSION**0.5
        for n in (True, False)
    }
    assert last[True] == pytest.approx(1.0, abs=0.03)
    assert last[False] < 0.5


def test_weights_of_the_encoding():
    edges, weights = plot_clipping.encoding(plot_clipping.DEFAULT_WEIGHT)
    assert weights[edges >= 1] == pytest.approx(math.sqrt(0.0412))
    assert (plot_clipping.encoding(0.0)[1][edges >= 1] == 0).all()
    assert weights[0] == pytest.approx(math.sqrt(1.0412), rel=1e-3)


def test_figures_are_drawn(tmp_path):
    plot_clipping.draw(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "figures").glob("clipping-*.svg")}
    shown = {
        name for page in PAGES for name in re.findall(r"figures/(clipping[^)]*)", (DOCS / page).read_text("utf-8"))
    }
    assert shown == drawn
