# SPDX-License-Identifier: Apache-2.0
"""What a chart shows is what the journal holds; tests/unit/report/test_page.py has them on the page."""

import pytest

from llm_trainer.journal.series import Series
from llm_trainer.report.charts import (
    MAX_LINES,
    MAX_TIMELINE_BARS,
    TABLE_ROWS,
    Clock,
    Span,
    draw_curves,
    draw_devices,
    draw_lengths,
    draw_timeline,
    join_spans,
    tabulate_series,
)
from llm_trainer.report.history import History, Phase


def build_series(values):
    series = Series()
    for x, y in enumerate(values):
        series.add(x, y)
    return series


@pytest.mark.parametrize(
    ("duration", "unit", "elapsed"), [(5, "seconds", 60), (180, "minutes", 1), (3 * 3600, "hours", 0.017)]
)
def test_the_clock_has_the_unit_of_the_job(duration, unit, elapsed):
    clock = Clock(1000.0, duration)
    assert (clock.unit, clock.axis, clock.read(1060.0)) == (unit, f"{unit} since the start", elapsed)


def test_a_noisy_metric_has_a_smoothed_line_over_its_values_and_an_evaluation_has_marks():
    history = History()
    history.metrics["train_loss"] = build_series([200.0, *([1.0] * 29)])
    history.metrics["eval_loss"] = build_series([3.0, 2.0])
    history.metrics["learning_rate"] = build_series([0.0] * 30)
    loss, rate = draw_curves(history)
    assert [(line["name"], line["style"]) for line in loss.data["series"]] == [
        ("training, as logged", "faint"),
        ("training", "line"),
        ("evaluation", "marks"),
    ]
    assert (loss.is_log, loss.is_wide, loss.from_zero) == (True, True, False)  # 200 is over 100 times 1
    assert loss.summary.startswith("Loss by step: training from 200 to 1, lowest 1, highest 200; evaluation from 3")
    assert [(line["name"], line["style"]) for line in rate.data["series"]] == [("learning rate", "line")]


def test_pairs_have_charts_of_their_rewards():
    history = History()
    for name in ("accuracies", "margins", "chosen", "rejected"):
        history.metrics[f"rewards/{name}"] = history.metrics[f"eval_rewards/{name}"] = build_series([0.5, 1.0])
    names = {chart.name: [line["name"] for line in chart.data["series"]] for chart in draw_curves(history)}
    both = ["training", "evaluation"]
    assert names == {"ranked_right": both, "margins": both, "rewards": ["chosen", "rejected"]}


def test_many_devices_are_a_heat_map_and_few_are_lines():
    history = History()
    for number in range(MAX_LINES + 1):
        history.system[f"gpu/a/{number}/power_watts"] = build_series([100.0 + number, 102.0 + number])
    history.system["host/a/cpu_percent"] = build_series([5.0])
    clock = Clock(0.0, 2.0)
    (heat,) = draw_devices(history, clock, {"gpu/power_watts": ("GPU power", "W", 1)})
    assert (heat.kind, heat.data["rows"]) == ("heat", [f"a/{number}" for number in range(MAX_LINES + 1)])
    assert heat.data["range"] == [100, 102 + MAX_LINES]
    assert heat.summary == "GPU power over time: 103 W on average over 5 GPUs, from 101 (a/0) to 105 (a/4)."
    (lines,) = draw_devices(history, clock, {"host/cpu_percent": ("CPU", "%", 1)})
    assert (lines.kind, lines.summary) == ("lines", "CPU over time: 5 % on average over 1 hosts.")
    assert lines.table.columns[0] == "Host"


def test_what_is_always_zero_is_no_chart():
    history = History()
    history.system["gpu/a/0/throttled_percent"] = build_series([0.0, 0.0])
    assert list(draw_devices(history, Clock(0.0, 2.0), {"gpu/throttled_percent": ("Throttled", "%", 1)})) == []


def test_the_timeline_has_a_row_for_each_phase_in_their_order():
    history = History(attempts=[0.0, 50.0])
    history.phases = [Phase("first_step", 30.0, 5.0, "a"), Phase("data", 0.0, 30.0, "")]
    history.checkpoints = [{"time": 45.0, "kind": "checkpoint", "step": 1000, "seconds": 4.0}]
    (chart,) = draw_timeline(history, Clock(0.0, 180.0))
    assert chart.data["rows"] == ["data", "first step", "checkpoints"]
    assert chart.data["bars"][0] == [0, 0, 0.5, "data: 30 s"]
    assert chart.data["bars"][2] == [2, 0.683, 0.75, "checkpoints: step 1,000, 4.0 s"]
    assert chart.data["marks"] == [[0.833, "attempt 2"]]
    assert chart.summary.endswith("The longest part is data, 30 s. It was started 2 times.")


def test_very_many_spans_are_joined():
    spans = [Span(float(number), number + 0.5, "0.5 s") for number in range(2 * MAX_TIMELINE_BARS)]
    joined = join_spans(spans)
    assert len(joined) == MAX_TIMELINE_BARS
    assert joined[0] == (0.0, 1.5, "2 times, 0.5 s and on")
    assert join_spans(spans[:3]) == spans[:3]


def test_a_table_is_thinned_and_loses_no_extreme():
    table = tabulate_series("step", {"loss": build_series([9.0 if x == 70 else 1.0 for x in range(100)])})
    assert table.columns == ["Curve", "Step", "Mean", "Lowest", "Highest"]
    assert len(table.rows) <= TABLE_ROWS
    assert max(float(row[4]) for row in table.rows) == 9


def test_lengths_are_those_of_sequences_where_rows_are_pairs():
    history = History()
    history.data = {"train": {"lengths": {"10": 3, "20": 1}}}
    (rows,) = draw_lengths(history)
    assert (rows.title, rows.unit) == ("Length of the rows", "% of rows")
    assert rows.summary == "Lengths of the rows in tokens. train: 4 rows, at most 20 tokens."
    sides = {f"{side}_tokens": {"mean": mean} for side, mean in (("chosen", 8.4), ("rejected", 5.0))}
    history.data["train"] |= {"sequences_a_row": 2, "summary": {"pairs": sides}}
    (pairs,) = draw_lengths(history)
    assert (pairs.title, pairs.unit) == ("Length of the sequences", "% of sequences")
    assert pairs.summary.endswith(" Mean tokens of the answers alone, train: chosen 8, rejected 5.")
