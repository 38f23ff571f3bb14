# SPDX-License-Identifier: Apache-2.0
"""The image curves.png of the curves, for a mail or a page that shows no HTML."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # a figure of its own needs no display and no global state

from llm_trainer.common.files import replace_file
from llm_trainer.report.charts import Chart

COLOURS = ("#0b62a4", "#b3560b", "#4c7a34", "#8a4a86")
DRAWN = ("loss", "accuracy", "learning_rate", "grad_norm", "speed")
COLUMNS = 2
PANEL_INCHES = (6.0, 3.4)


def write_image(charts: list[Chart], file: Path) -> None:
    """Write a panel for each chart that belongs into the image; no file where there is none."""
    drawn = [chart for chart in charts if chart.name in DRAWN]
    if not drawn:
        return
    rows = -(-len(drawn) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL_INCHES[0], rows * PANEL_INCHES[1]), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes in list(panels)[len(drawn) :]:
        axes.remove()
    for axes, chart in zip(panels, drawn, strict=False):
        draw_panel(chart, axes)
    with replace_file(file) as unfinished:
        figure.savefig(unfinished, format="png")


def draw_panel(chart: Chart, axes: Any) -> None:
    """Draw the lines, bands and titles of a chart."""
    for curve, colour in zip(chart.data["series"], choose_colours(chart), strict=True):
        if curve["band"]:
            x, low, high = zip(*curve["band"], strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        x, y = zip(*curve["points"], strict=True)
        marker = "o" if curve["style"] == "marks" or len(x) == 1 else ""
        alpha = 0.3 if curve["style"] == "faint" else 1
        axes.plot(x, y, color=colour, alpha=alpha, linewidth=1.5, marker=marker, markersize=3.5, label=curve["name"])
    axes.set_title(chart.title, loc="left")
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.unit)
    axes.set_yscale("log" if chart.is_log else "linear")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(chart.data["series"]) > 1:
        axes.legend(frameon=False)


def choose_colours(chart: Chart) -> list[str]:
    """Return a colour for each curve. A curve and its smoothed form share one."""
    names = list(dict.fromkeys(drawn["name"].partition(", ")[0] for drawn in chart.data["series"]))
    return [COLOURS[names.index(drawn["name"].partition(", ")[0]) % len(COLOURS)] for drawn in chart.data["series"]]
