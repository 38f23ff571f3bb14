# SPDX-License-Identifier: Apache-2.0
"""The charts of the report: each as numbers, as a sentence and as a table. assets/report.js draws them.

A chart's `data` has these fields, by the chart's kind:

    lines     series [{name, style (`line`, `faint`, `marks`), points [[x, y]], band [[x, low, high]] or []}]
    heat      rows [name], columns [x], cells [[column, row, value]], range [lowest, highest]
    bars      labels [text], series [{name, values}]
    timeline  rows [name], bars [[row, start, end, text]], marks [[x, text]]
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_trainer.common.units import GIB, show_count, show_duration, show_number, show_share
from llm_trainer.journal.records import DataRecord
from llm_trainer.journal.series import Series
from llm_trainer.report.history import History

MAX_LINES = 4  # of one chart; more devices than that are a heat map
MAX_CELLS = 2400  # of a heat map, since each is an element of the page
TABLE_ROWS = 24
HISTOGRAM_BINS = 40
MAX_TIMELINE_BARS = 150  # of one row

# By metric: title, unit, and how many of the metric's own units that unit is.
GPU_CHARTS = {
    "gpu/utilization_percent": ("GPU utilization", "%", 1),
    "gpu/sm_activity_percent": ("Busy multiprocessors (SMs)", "%", 1),
    "gpu/memory_percent": ("GPU memory in use", "%", 1),
    "gpu/power_watts": ("GPU power", "W", 1),
    "gpu/temperature_celsius": ("GPU temperature", "°C", 1),
    "gpu/sm_clock_mhz": ("GPU clock", "MHz", 1),
    "gpu/throttled_percent": ("Throttled by heat, power supply or fault", "% of samples", 1),
}
HOST_CHARTS = {
    "host/cpu_percent": ("CPU", "%", 1),
    "host/memory_percent": ("Memory in use", "%", 1),
    "host/shared_memory_used_bytes": ("Shared memory in use (/dev/shm)", "GiB", GIB),
    "host/checkpoints_free_bytes": ("Free on the disk of the checkpoints", "GiB", GIB),
    "host/temp_free_bytes": ("Free on the disk of /tmp", "GiB", GIB),
    "host/disk_read_bytes_per_second": ("Read from disks", "MB/s", 1_000_000),
    "host/disk_written_bytes_per_second": ("Written to disks", "MB/s", 1_000_000),
    "host/network_received_bytes_per_second": ("Received from the network", "MB/s", 1_000_000),
    "host/network_sent_bytes_per_second": ("Sent to the network", "MB/s", 1_000_000),
}
OFTEN_ZERO = ("gpu/throttled_percent", "host/shared_memory_used_bytes")  # no chart where they always are


@dataclass
class Table:
    """The figures of a chart, for whoever cannot see it."""

    columns: list[str]
    rows: list[list[str]]


@dataclass
class Chart:
    """A chart of the report."""

    name: str
    title: str
    kind: str
    summary: str  # for whoever cannot see it
    table: Table
    data: dict[str, Any]
    x: str = ""
    unit: str = ""
    is_log: bool = False
    is_wide: bool = False
    from_zero: bool = False
    note: str = ""

    def describe_drawing(self) -> dict[str, Any]:
        """Return the fields that report.js needs."""
        told = ("kind", "x", "unit", "is_log", "from_zero", "summary")
        return {**{name: getattr(self, name) for name in told}, **self.data}


@dataclass
class Clock:
    """Time since the first record, in the unit that suits the job's duration."""

    start: float  # seconds since the epoch
    duration: float  # seconds
    unit: str = field(init=False)
    seconds: int = field(init=False)  # of the unit

    def __post_init__(self) -> None:
        """Choose the largest unit that fits three times into the duration."""
        choices = (("hours", 3600), ("minutes", 60), ("seconds", 1))
        self.unit, self.seconds = next(choice for choice in choices if self.duration >= 3 * choice[1] or choice[1] == 1)

    @property
    def axis(self) -> str:
        """Title of a time axis."""
        return f"{self.unit} since the start"

    def read(self, time: float) -> float:
        """Return a time, given in seconds since the epoch, in the clock's unit since the start."""
        return round((time - self.start) / self.seconds, 3)


class StepChart(NamedTuple):
    """A chart of metrics by step."""

    name: str
    title: str
    metrics: dict[str, str]  # label of each metric
    unit: str = ""
    smooth: bool = True
    is_wide: bool = False
    from_zero: bool = False
    may_be_log: bool = False  # where the values differ by more than a factor of 100


STEP_CHARTS = (
    StepChart("loss", "Loss", {"train_loss": "training", "eval_loss": "evaluation"}, is_wide=True, may_be_log=True),
    StepChart("reward", "Reward", {"reward": "training", "eval_reward": "evaluation"}),
    StepChart(
        "ranked_right",
        "Pairs ranked right",
        {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"},
        from_zero=True,
    ),
    StepChart(
        "margins",
        "Reward margin of the chosen answer",
        {"rewards/margins": "training", "eval_rewards/margins": "evaluation"},
    ),
    StepChart("rewards", "Rewards", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    StepChart(
        "accuracy",
        "Token accuracy",
        {"train_token_accuracy": "training", "eval_mean_token_accuracy": "evaluation"},
    ),
    StepChart("entropy", "Entropy of a token", {"entropy": "training", "eval_entropy": "evaluation"}),
    StepChart("learning_rate", "Learning rate", {"learning_rate": "learning rate"}, smooth=False),
    StepChart("grad_norm", "Gradient norm", {"grad_norm": "gradient norm"}, may_be_log=True),
    StepChart("speed", "Throughput", {"tokens_per_second": "tokens a second"}, unit="tokens/s", from_zero=True),
    StepChart("mfu", "Model FLOPs utilization", {"mfu": "MFU"}, from_zero=True),
)


def round_value(number: float) -> float:
    """Return five significant digits, as many as a chart can show."""
    return float(f"{number:.5g}")


def draw_line(name: str, series: Series, style: str = "line", with_band: bool = False) -> dict[str, Any]:
    """Return a line of the buckets' means, with a band of their ranges where it is asked for and they have any."""
    points = [[round(bucket.x, 1), round_value(bucket.mean)] for bucket in series.buckets]
    band = [[round(bucket.x, 1), round_value(bucket.low), round_value(bucket.high)] for bucket in series.buckets]
    is_thinned = with_band and any(bucket.points > 1 for bucket in series.buckets)
    return {"name": name, "style": style, "points": points, "band": band if is_thinned else []}


def draw_smoothed_line(name: str, series: Series) -> dict[str, Any]:
    """Return a line of the running mean."""
    means = zip(series.buckets, series.smooth(), strict=True)
    points = [[round(bucket.x, 1), round_value(value)] for bucket, value in means]
    return {"name": name, "style": "line", "points": points, "band": []}


def describe_course(name: str, series: Series, unit: str = "") -> str:
    """Return a series' first, last, lowest and highest value in words."""
    unit = unit and f" {unit}"
    first, last = series.buckets[0].mean, series.buckets[-1].mean if series.last is None else series.last
    return (
        f"{name} from {show_number(first)}{unit} to {show_number(last)}{unit}, lowest {show_number(series.low)}{unit}, "
        f"highest {show_number(series.high)}{unit}"
    )


def tabulate_series(x: str, named: dict[str, Series]) -> Table:
    """Return each series in at most TABLE_ROWS rows of mean, lowest and highest value."""
    rows = []
    for name, series in named.items():
        stride = max(1, -(-len(series.buckets) // TABLE_ROWS))
        for start in range(0, len(series.buckets), stride):
            bucket = series.buckets[start]
            for other in series.buckets[start + 1 : start + stride]:
                bucket = bucket.join(other)
            rows.append([name, *map(show_number, (bucket.x, bucket.mean, bucket.low, bucket.high))])
    return Table(["Curve", x.capitalize(), "Mean", "Lowest", "Highest"], rows)


def draw_curves(history: History) -> Iterator[Chart]:
    """Yield a chart of each group of metrics that was logged, loss first."""
    for asked in STEP_CHARTS:
        logged = {label: history.find_metric(metric) for metric, label in asked.metrics.items()}
        shown = {label: series for label, series in logged.items() if series}
        if shown:
            yield draw_steps(asked, shown)


def draw_steps(asked: StepChart, shown: dict[str, Series]) -> Chart:
    """Return a chart of metrics by step. A noisy metric has a smoothed line over its values."""
    lines = [drawn for label, series in shown.items() for drawn in draw_metric(label, series, asked.smooth)]
    not_finite = sum(len(series.not_finite_at) for series in shown.values())
    courses = "; ".join(describe_course(label, series, asked.unit) for label, series in shown.items())
    return Chart(
        asked.name,
        asked.title,
        "lines",
        f"{asked.title} by step: {courses}.",
        tabulate_series("step", shown),
        {"series": lines},
        x="step",
        unit=asked.unit,
        is_log=asked.may_be_log and measure_spread(shown.values()) > 100,
        is_wide=asked.is_wide,
        from_zero=asked.from_zero,
        note=f"Left out, since not a number: {not_finite}." if not_finite else "",
    )


def draw_metric(label: str, series: Series, smooth: bool) -> list[dict[str, Any]]:
    """Return the lines of one metric."""
    if label == "evaluation":
        return [draw_line(label, series, "marks")]
    if smooth and len(series.buckets) >= 20:
        faint = draw_line(f"{label}, as logged", series, "faint", with_band=True)
        return [faint, draw_smoothed_line(label, series)]
    return [draw_line(label, series)]


def measure_spread(shown: Collection[Series]) -> float:
    """Return the highest value divided by the lowest one, or 1 where not all values are positive."""
    lowest = min(series.low for series in shown)
    return max(series.high for series in shown) / lowest if lowest > 0 else 1


def draw_devices(history: History, clock: Clock, wanted: dict[str, tuple[str, str, int]]) -> Iterator[Chart]:
    """Yield a chart over time of every such metric of GPUs or hosts: lines for a few devices, a heat map for many."""
    for what, (title, unit, size) in wanted.items():
        devices = {device: series.scale(1 / size) for device, series in history.list_devices(what).items()}
        if not devices or (what in OFTEN_ZERO and not any(series.high for series in devices.values())):
            continue
        few = len(devices) <= MAX_LINES
        noun = "GPU" if what.startswith("gpu/") else "host"
        rows = [
            [device, *map(show_number, (series.mean, series.low, series.high))] for device, series in devices.items()
        ]
        yield Chart(
            what.replace("/", "-"),
            title,
            "lines" if few else "heat",
            f"{title} over time: {describe_devices(devices, noun, unit)}.",
            Table([f"{noun[0].upper()}{noun[1:]}", "Mean", "Lowest", "Highest"], rows),
            draw_lines(devices, clock) if few else draw_heat(devices, clock),
            x=clock.axis,
            unit=unit,
            from_zero=unit not in ("°C", "MHz"),
        )


def describe_devices(devices: dict[str, Series], noun: str, unit: str) -> str:
    """Return the mean over all devices, and those with the lowest and the highest mean, in words."""
    lowest = min(devices, key=lambda device: devices[device].mean)
    highest = max(devices, key=lambda device: devices[device].mean)
    mean = sum(series.mean for series in devices.values()) / len(devices)
    text = f"{show_number(mean)} {unit} on average over {len(devices)} {noun}s"
    if len(devices) > 1:
        least, most = show_number(devices[lowest].mean), show_number(devices[highest].mean)
        text += f", from {least} ({lowest}) to {most} ({highest})"
    return text


def draw_lines(devices: dict[str, Series], clock: Clock) -> dict[str, Any]:
    """Return a line for each device, over the clock's time."""
    lines = [draw_line(device, series, with_band=len(devices) == 1) for device, series in devices.items()]
    for drawn in lines:
        for point in [*drawn["points"], *drawn["band"]]:
            point[0] = clock.read(point[0])
    return {"series": lines}


def draw_heat(devices: dict[str, Series], clock: Clock) -> dict[str, Any]:
    """Return a row for each device and a column for each span of time. A cell is the mean in the span."""
    num_columns = max(24, min(120, MAX_CELLS // len(devices)))
    width = max(clock.duration, 1e-9) / num_columns
    cells = []
    for row, series in enumerate(devices.values()):
        columns: dict[int, list[float]] = {}
        for bucket in series.buckets:
            column = min(num_columns - 1, max(0, int((bucket.x - clock.start) / width)))
            total = columns.setdefault(column, [0.0, 0.0])
            total[0] += bucket.mean * bucket.points
            total[1] += bucket.points
        cells += [[column, row, round_value(total / count)] for column, (total, count) in columns.items()]
    values = [value for _, _, value in cells]
    return {
        "rows": list(devices),
        "columns": [clock.read(clock.start + (column + 0.5) * width) for column in range(num_columns)],
        "cells": cells,
        "range": [min(values), max(values)],
    }


def draw_lengths(history: History) -> Iterator[Chart]:
    """Yield a histogram of the rows' lengths, in percent of each split's rows, as splits differ in size.

    A pair of answers is two sequences.
    """
    splits = {
        name: {int(length): rows for length, rows in record["lengths"].items()}
        for name, record in history.data.items()
        if record.get("lengths")
    }
    if not splits:
        return
    width = choose_bin_width(max(splits.values(), key=max))
    num_bins = max(find_bin(max(lengths), width) for lengths in splits.values()) + 1
    shares = {name: count_bins(lengths, width, num_bins) for name, lengths in splits.items()}
    noun = name_sequences(history.data)
    labels = label_bins(width, num_bins)
    rows = [[label, *(f"{each[place]:.2f} %" for each in shares.values())] for place, label in enumerate(labels)]
    yield Chart(
        "lengths",
        f"Length of the {noun}",
        "bars",
        f"Lengths of the {noun} in tokens. {list_totals(splits, noun)}.{describe_answers(history.data)}",
        Table(["Tokens", *splits], rows),
        {"labels": labels, "series": [{"name": name, "values": each} for name, each in shares.items()]},
        x="tokens",
        unit=f"% of {noun}",
        is_wide=True,
    )


def name_sequences(data: Mapping[str, DataRecord]) -> str:
    """Return the word for what a split's lengths are of."""
    return "sequences" if any(record.get("sequences_a_row", 1) > 1 for record in data.values()) else "rows"


def list_totals(splits: Mapping[str, dict[int, int]], noun: str) -> str:
    """Return the number and the longest length of each split, given with its counts by length."""
    return "; ".join(
        f"{name}: {show_count(sum(lengths.values()))} {noun}, at most {show_count(max(lengths))} tokens"
        for name, lengths in splits.items()
    )


def describe_answers(data: Mapping[str, DataRecord]) -> str:
    """Return a sentence on the lengths of chosen and rejected answers in each split of pairs; empty without pairs."""
    pairs = {name: record.get("summary", {}).get("pairs") for name, record in data.items()}
    parts = [
        f"{name}: chosen {own['chosen_tokens']['mean']:.0f}, rejected {own['rejected_tokens']['mean']:.0f}"
        for name, own in pairs.items()
        if own
    ]
    return f" Mean tokens of the answers alone, {'; '.join(parts)}." if parts else ""


def count_bins(lengths: dict[int, int], width: int, num_bins: int) -> list[float]:
    """Return the percentage of rows in each bin."""
    total, bins = sum(lengths.values()), [0] * num_bins
    for length, rows in lengths.items():
        bins[find_bin(length, width)] += rows
    return [round_value(100 * rows / total) for rows in bins]


def label_bins(width: int, num_bins: int) -> list[str]:
    """Return the range of lengths in each bin."""
    starts = [place * width + 1 for place in range(num_bins)]
    return [f"{start:,}" if width == 1 else f"{start:,}-{start + width - 1:,}" for start in starts]


def choose_bin_width(lengths: dict[int, int]) -> int:
    """Return the width for some HISTOGRAM_BINS bars, in tokens.

    It is a multiple of the width of the journal's own bins, which are named by their ends.
    """
    own = math.gcd(*sorted(lengths)[:-1]) if len(lengths) > 2 else 1
    return own * max(1, math.ceil(max(lengths) / own / HISTOGRAM_BINS))


def find_bin(length: int, width: int) -> int:
    """Return the number of the bin that holds a length, from 0."""
    return max(0, length - 1) // width


class Span(NamedTuple):
    """A part of the job on the timeline, from start to end in seconds since the epoch."""

    start: float
    end: float
    text: str

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.end - self.start


def draw_timeline(history: History, clock: Clock) -> Iterator[Chart]:
    """Yield a chart of the job over time: a row for each phase, and a line for every new attempt."""
    spans = collect_spans(history)
    if not spans:
        return
    totals = {name: sum(span.seconds for span in times) for name, times in spans.items()}
    marks = [[clock.read(start), f"attempt {number}"] for number, start in enumerate(history.attempts[1:], 2)]
    bars = [
        [row, clock.read(span.start), clock.read(span.end), f"{name}: {span.text}"]
        for row, (name, times) in enumerate(spans.items())
        for span in join_spans(times)
    ]
    rows = [
        [name, show_number(clock.read(times[0].start)), show_duration(totals[name]), str(len(times))]
        for name, times in spans.items()
    ]
    longest = max(totals, key=lambda name: totals[name])
    yield Chart(
        "timeline",
        "Timeline",
        "timeline",
        f"What the job did when, over {show_duration(clock.duration)}: {', '.join(spans)}. The longest part is "
        f"{longest}, {show_duration(totals[longest])}."
        + (f" It was started {len(history.attempts)} times." if marks else ""),
        Table(["Phase", f"Start, {clock.axis}", "In all", "Times"], rows),
        {"rows": list(spans), "bars": bars, "marks": marks, "end": clock.read(clock.start + clock.duration)},
        x=clock.axis,
        is_wide=True,
    )


def collect_spans(history: History) -> dict[str, list[Span]]:
    """Return the spans of each phase, and of the checkpoints, in the order in which the phases began."""
    spans: dict[str, list[Span]] = {}
    for phase in sorted(history.phases, key=lambda phase: phase.start):
        text = show_duration(phase.seconds) + (f" on {phase.host}" if phase.host else "")
        span = Span(phase.start, phase.start + phase.seconds, text)
        spans.setdefault(phase.name.replace("_", " "), []).append(span)
    for record in history.checkpoints:
        seconds = record.get("seconds", 0)
        text = f"step {record.get('step', 0):,}, {show_duration(seconds)}"
        spans.setdefault("checkpoints", []).append(Span(record["time"] - seconds, record["time"], text))
    return dict(sorted(spans.items(), key=lambda item: item[1][0].start))


def join_spans(spans: list[Span]) -> list[Span]:
    """Join neighbours where there are too many spans for a row."""
    stride = -(-len(spans) // MAX_TIMELINE_BARS)
    if stride == 1:
        return spans
    groups = [spans[place : place + stride] for place in range(0, len(spans), stride)]
    return [Span(group[0].start, group[-1].end, f"{len(group)} times, {group[0].text} and on") for group in groups]


def describe_supervision(history: History) -> list[tuple[str, float, str]]:
    """Return for each split its name, the share of its tokens that is trained on, and the share as text."""
    found = []
    for name, record in history.data.items():
        tokens = record.get("tokens") or 0
        if tokens:
            share = (record.get("supervised_tokens") or 0) / tokens
            found.append((name, share, f"{show_share(share)} of {show_count(tokens)} tokens are trained on"))
    return found
