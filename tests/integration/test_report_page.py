# SPDX-License-Identifier: Apache-2.0
"""The report in a headless Chromium: it draws all of its charts, asks for nothing, and anybody can use it."""

from importlib.resources import files
from importlib.util import find_spec

import pytest

from llm_trainer.report.page import write_report
from support.chromium import EXECUTABLE, Page
from support.journals import FakeJournal, write_long_job
from support.report_picture import WIDTH, take_picture

pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason="No Chromium here: apt-get install chromium runs these tests."
)

JOBS = {
    "many": {"num_hosts": 2, "num_gpus": 8, "num_steps": 2000, "hours": 1},
    "one": {"num_hosts": 1, "num_gpus": 1, "num_steps": 300, "hours": 0.9},
}
# Of each chart: its name, its height, and how many visible shapes its SVG has.
MEASURE = """[...document.querySelectorAll('.chart')].map((chart) => [
  chart.dataset.chart,
  chart.getBoundingClientRect().height,
  chart.querySelectorAll('svg path, svg polyline, svg rect').length,
  chart.querySelector('svg')?.getBoundingClientRect().width ?? 0,
  chart.parentElement.getBoundingClientRect().width,
  chart.getAttribute('aria-label'),
])"""


@pytest.fixture(scope="module")
def page():
    page = Page()
    yield page
    page.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A report of each kind of job."""
    written = {}
    for name, shape in JOBS.items():
        folder = tmp_path_factory.mktemp(name)
        write_report(write_long_job(folder / "metrics.jsonl", **shape), folder)
        written[name] = folder / "report.html"
    folder = tmp_path_factory.mktemp("failed")
    journal = FakeJournal(folder / "metrics.jsonl")
    journal.add(0, "job", name="failed", hosts=["algo-1"], world_size=1, settings={"lora_r": 0}, attempt=1)
    journal.add(1, "end", status="failed", reason="lora_r=0 is not valid: it must be at least 1.")
    write_report(journal.write(), folder)
    return written | {"failed": folder / "report.html"}


@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize(("name", "num_charts"), [("many", 20), ("one", 19), ("failed", 0)])
def test_every_chart_shows_its_data_and_fits_the_window(page, reports, name, num_charts, width):
    page.open(reports[name], width)
    charts = page.run(MEASURE)
    assert len(charts) == num_charts
    for chart, height, shapes, svg_width, panel_width, label in charts:
        assert height > 140, chart
        assert shapes >= 6, chart
        assert 0.8 * panel_width < svg_width < panel_width, chart
        assert len(label) > 30, chart
    assert page.run("document.documentElement.scrollWidth") == width
    assert page.complaints == []
    assert page.requests == [reports[name].as_uri()]


def test_the_curve_of_the_loss_goes_down(page, reports):
    page.open(reports["many"])
    option = page.run("echarts.getInstanceByDom(document.getElementById('chart-loss')).getOption()")
    drawn = {series["name"]: series["data"] for series in option["series"]}
    assert drawn["training"][0][1] > drawn["training"][-1][1] > 0.5
    assert [step for step, _ in drawn["evaluation"]] == [500, 1000, 1500, 2000]
    lines = "[...document.querySelectorAll('#chart-loss svg path')].map((path) => path.getAttribute('d').length)"
    assert max(page.run(lines)) > 500  # a line of many points


def test_a_heat_map_has_a_cell_for_every_gpu_and_time(page, reports):
    page.open(reports["many"])
    cells = page.run("document.querySelectorAll('#chart-gpu-temperature_celsius svg path').length")
    assert cells >= 16 * 100


def test_a_change_of_the_colour_scheme_redraws_the_charts(page, reports):
    page.open(reports["one"], scheme="light")
    ink = "getComputedStyle(document.querySelector('#chart-loss svg text')).fill"
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.run(ink), page.run(ground)
    page.emulate("dark")
    dark = page.run(ink), page.run(ground)
    assert light != dark
    assert light[0] != dark[0]


def test_paper_is_light_and_shows_whole_charts(page, reports, tmp_path):
    page.open(reports["one"], scheme="dark")
    page.run("addEventListener('afterprint', () => { window.wasPrinted = true })")
    page.run(
        "addEventListener('beforeprint', () => { window.printed = [getComputedStyle(document.body).backgroundColor,"
        " document.querySelector('#chart-loss svg').getBoundingClientRect().width] })"
    )
    page.print_pdf(tmp_path / "report.pdf")
    ground, width = page.run("window.printed")
    assert ground == "rgb(255, 255, 255)"
    assert 500 < width <= 180 / 25.4 * 96
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert page.run("window.wasPrinted && getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 23)"


def test_a_picture_of_it_ends_below_the_first_charts(reports, tmp_path):
    take_picture(reports["one"], tmp_path / "images/report.png")
    header = (tmp_path / "images/report.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
    assert width == WIDTH
    assert 800 < height < 3000


def test_values_open_by_keyboard(page, reports):
    page.open(reports["one"])
    page.run("document.querySelector('#chart-loss').parentElement.querySelector('summary').focus()")
    for kind in ("keyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
    table = page.run("document.querySelector('#chart-loss').parentElement.querySelector('table').innerText")
    assert "training" in table


@pytest.mark.skipif(find_spec("axe_core_python") is None, reason="No axe-core here: pip install axe-core-python.")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
@pytest.mark.parametrize("name", ["one", "failed"])
def test_axe_finds_nothing_that_shuts_anybody_out(page, reports, name, width, scheme):
    page.open(reports[name], width, scheme)
    # The tables are all alike: a few of them open are enough, and all take axe a quarter of a minute.
    page.run("[...document.querySelectorAll('details')].slice(0, 3).forEach((details) => { details.open = true })")
    page.run((files("axe_core_python") / "axe.min.js").read_text() + ";0")
    result = page.run("axe.run(document, { resultTypes: ['violations'] })")
    assert [(found["id"], [node["html"] for node in found["nodes"]]) for found in result["violations"]] == []
    assert len(result["passes"]) > 15
