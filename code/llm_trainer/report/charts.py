# SPDX-License-Identifier: Apache-2.0
"""The charts of the report: what each shows as numbers, in a sentence, and as a table. report.js draws them.

A chart's `data`, by its kind:

    lines     series [{name, style (`line`, `faint`, `marks`), points [[x, y]], band [[x, low, high]] or []}]
    heat      rows [name], columns [x], cells [[column, row, value]], range [lowest, highest]
    bars      labels [text], series [{name, values}]
    timeline  rows [name], bars [[row, start, end, text]], marks [[x, text]]
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llm_trainer.common.findings import GIB
from llm_trainer.common.units import show_count, show_duration, show_number, show_share
from llm_trainer.journal.series import Series
from llm_trainer.report.history import History

MAX_LINES = 4  # of one chart; more devices than that are a heat map
MAX_CELLS = 2400  # of a heat map: each is an element of the page
TABLE_ROWS = 24
HISTOGRAM_BINS = 40
MAX_TIMELINE_BARS = 150  # of one row

# Metric -> title, unit, and how many of the metric's own unit that is.
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
OFTEN_ZERO = ("gpu/throttled_percent", "host/shared_memory_used_bytes")  # then they are no chart


@dataclass
class Table:
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Chart:
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

    def drawing(self) -> dict[str, Any]:
        """What report.js needs."""
        told = ("kind", "x", "unit", "is_log", "from_zero", "summary")
        return {**{name: getattr(self, name) for name in told}, **self.data}


@dataclass
class Clock:
    """Time since the first record, in the unit that suits the job's duration."""

    start: float
    duration: float
    unit: str = field(init=False)
    seconds: int = field(init=False)

    def __post_init__(self) -> None:
        choices = (("hours", 3600), ("minutes", 60), ("seconds", 1))
        self.unit, self.seconds = next(choice for choice in choices if self.duration >= 3 * choice[1] or choice[1] == 1)

    @property
    def axis(self) -> str:
        return f"{self.unit} since the start"

    def read(self, time: float) -> float:
        return round((time - self.start) / self.seconds, 3)


def short(number: float) -> float:
    """Five significant digits: what a chart can show."""
    return float(f"{number:.5g}")


def line(name: str, series: Series, style: str = "line", with_band: bool = False) -> dict[str, Any]:
    points = [[round(bucket.x, 1), short(bucket.mean)] for bucket in series.buckets]
    band = [[round(bucket.x, 1), short(bucket.low), short(bucket.high)] for bucket in series.buckets]
    is_thinned = with_band and any(bucket.points > 1 for bucket in series.buckets)
    return {"name": name, "style": style, "points": points, "band": band if is_thinned else []}


def smoothed(name: str, series: Series) -> dict[str, Any]:
    points = [[round(bucket.x, 1), short(value)] for bucket, value in zip(series.buckets, series.smooth(), strict=True)]
    return {"name": name, "style": "line", "points": points, "band": []}


def describe(name: str, series: Series, unit: str = "") -> str:
    unit = unit and f" {unit}"
    first, last = series.buckets[0].mean, series.buckets[-1].mean if series.last is None else series.last
    return (
        f"{name} from {show_number(first)}{unit} to {show_number(last)}{unit}, lowest {show_number(series.low)}{unit}, "
        f"highest {show_number(series.high)}{unit}"
    )


def tabulate(x: str, named: dict[str, Series]) -> Table:
    """Each series in a thinned table: mean, and from where to where its values lie."""
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
    """What is logged by step: loss first."""
    yield from draw_steps(history, "loss", "Loss", {"train_loss": "training", "eval_loss": "evaluation"}, is_wide=True)
    accuracies = {"train_token_accuracy": "training", "eval_mean_token_accuracy": "evaluation"}
    yield from draw_steps(history, "accuracy", "Token accuracy", accuracies)
    yield from draw_steps(history, "learning_rate", "Learning rate", {"learning_rate": "learning rate"}, smooth=False)
    yield from draw_steps(history, "grad_norm", "Gradient norm", {"grad_norm": "gradient norm"})
    speed = {"tokens_per_second": "tokens a second"}
    yield from draw_steps(history, "speed", "Throughput", speed, unit="tokens/s")
    yield from draw_steps(history, "mfu", "Model FLOPs utilization", {"mfu": "MFU"})


def draw_steps(
    history: History,
    name: str,
    title: str,
    metrics: dict[str, str],
    unit: str = "",
    smooth: bool = True,
    is_wide: bool = False,
) -> Iterator[Chart]:
    """A chart of these metrics, if any was logged: where they are noisy, a smoothed line over the values themselves."""
    shown = {label: history.values(metric) for metric, label in metrics.items() if history.values(metric)}
    lines, not_finite = [], 0
    for label, series in shown.items():
        not_finite += len(series.not_finite_at)
        if label == "evaluation":
            lines.append(line(label, series, "marks"))
        elif smooth and len(series.buckets) >= 20:
            lines += [line(f"{label}, as logged", series, "faint", with_band=True), smoothed(label, series)]
        else:
            lines.append(line(label, series))
    if lines:
        positive = all(series.low > 0 for series in shown.values())
        spread = (
            max(series.high for series in shown.values()) / min(series.low for series in shown.values())
            if positive
            else 1
        )
        yield Chart(
            name,
            title,
            "lines",
            f"{title} by step: " + "; ".join(describe(label, series, unit) for label, series in shown.items()) + ".",
            tabulate("step", shown),
            {"series": lines},
            x="step",
            unit=unit,
            is_log=name in ("loss", "grad_norm") and spread > 100,
            is_wide=is_wide,
            from_zero=name in ("speed", "mfu"),
            note=f"Left out, since not a number: {not_finite}." if not_finite else "",
        )


def draw_devices(history: History, clock: Clock, wanted: dict[str, tuple[str, str, int]]) -> Iterator[Chart]:
    """A chart over time of every such metric of GPUs or hosts: lines for a few devices, a heat map for many."""
    for what, (title, unit, size) in wanted.items():
        devices = {device: series.scale(1 / size) for device, series in history.by_device(what).items()}
        if not devices or (what in OFTEN_ZERO and not any(series.high for series in devices.values())):
            continue
        lowest = min(devices, key=lambda device: devices[device].mean)
        highest = max(devices, key=lambda device: devices[device].mean)
        mean = sum(series.mean for series in devices.values()) / len(devices)
        summary = f"{title} over time: {show_number(mean)} {unit} on average over {len(devices)} "
        summary += "GPUs" if what.startswith("gpu/") else "hosts"
        if len(devices) > 1:
            least, most = show_number(devices[lowest].mean), show_number(devices[highest].mean)
            summary += f", from {least} ({lowest}) to {most} ({highest})"
        few = len(devices) <= MAX_LINES
        yield Chart(
            what.replace("/", "-"),
            title,
            "lines" if few else "heat",
            summary + ".",
            Table(
                ["GPU" if what.startswith("gpu/") else "Host", "Mean", "Lowest", "Highest"],
                [
                    [device, *map(show_number, (series.mean, series.low, series.high))]
                    for device, series in devices.items()
                ],
            ),
            draw_lines(devices, clock) if few else draw_heat(devices, clock),
            x=clock.axis,
            unit=unit,
            from_zero=unit not in ("°C", "MHz"),
        )


def draw_lines(devices: dict[str, Series], clock: Clock) -> dict[str, Any]:
    lines = [line(device, series, with_band=len(devices) == 1) for device, series in devices.items()]
    for drawn in lines:
        for point in [*drawn["points"], *drawn["band"]]:
            point[0] = clock.read(point[0])
    return {"series": lines}


def draw_heat(devices: dict[str, Series], clock: Clock) -> dict[str, Any]:
    """A row for each device, a column for each span of time; a cell is the mean in it."""
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
        cells += [[column, row, short(total / count)] for column, (total, count) in columns.items()]
    values = [value for _, _, value in cells]
    return {
        "rows": list(devices),
        "columns": [clock.read(clock.start + (column + 0.5) * width) for column in range(num_columns)],
        "cells": cells,
        "range": [min(values), max(values)],
    }


def draw_lengths(history: History) -> Iterator[Chart]:
    """How long the rows are, as shares of each split's, since a validation split is much smaller."""
    splits = {
        name: {int(length): rows for length, rows in record["lengths"].items()}
        for name, record in history.data.items()
        if record.get("lengths")
    }
    if not splits:
        return
    width = choose_bin_width(max(splits.values(), key=max))
    num_bins = max(bin_of(max(lengths), width) for lengths in splits.values()) + 1
    series, parts = [], []
    for name, lengths in splits.items():
        total, bins = sum(lengths.values()), [0] * num_bins
        for length, rows in lengths.items():
            bins[bin_of(length, width)] += rows
        series.append({"name": name, "values": [short(100 * rows / total) for rows in bins]})
        parts.append(f"{name}: {show_count(total)} rows, at most {show_count(max(lengths))} tokens")
    starts = [place * width + 1 for place in range(num_bins)]
    labels = [f"{start:,}" if width == 1 else f"{start:,}-{start + width - 1:,}" for start in starts]
    rows = [[label, *(f"{drawn['values'][place]:.2f} %" for drawn in series)] for place, label in enumerate(labels)]
    yield Chart(
        "lengths",
        "Length of the rows",
        "bars",
        "Lengths of the rows in tokens. " + "; ".join(parts) + ".",
        Table(["Tokens", *splits], rows),
        {"labels": labels, "series": series},
        x="tokens",
        unit="% of rows",
        is_wide=True,
    )


def choose_bin_width(lengths: dict[int, int]) -> int:
    """For some HISTOGRAM_BINS bars; a multiple of the width that the journal's own bins have, each named by its end."""
    own = math.gcd(*sorted(lengths)[:-1]) if len(lengths) > 2 else 1
    return own * max(1, math.ceil(max(lengths) / own / HISTOGRAM_BINS))


def bin_of(length: int, width: int) -> int:
    return max(0, length - 1) // width


def draw_timeline(history: History, clock: Clock) -> Iterator[Chart]:
    """What the job did when: a row for each phase, and a line for every new attempt."""
    spans: dict[str, list[tuple[float, float, str]]] = {}
    for phase in sorted(history.phases, key=lambda phase: phase.start):
        text = show_duration(phase.seconds) + (f" on {phase.host}" if phase.host else "")
        spans.setdefault(phase.name.replace("_", " "), []).append((phase.start, phase.start + phase.seconds, text))
    for record in history.checkpoints:
        seconds = record.get("seconds", 0)
        text = f"step {record.get('step', 0):,}, {show_duration(seconds)}"
        spans.setdefault("checkpoints", []).append((record["time"] - seconds, record["time"], text))
    if not spans:
        return
    spans = dict(sorted(spans.items(), key=lambda item: item[1][0][0]))
    marks = [[clock.read(start), f"attempt {number}"] for number, start in enumerate(history.attempts[1:], 2)]
    bars, rows = [], []
    for row, (name, times) in enumerate(spans.items()):
        drawn = join_spans(times)
        bars += [[row, clock.read(start), clock.read(end), f"{name}: {text}"] for start, end, text in drawn]
        rows.append(
            [
                name,
                show_number(clock.read(times[0][0])),
                show_duration(sum(end - start for start, end, _ in times)),
                str(len(times)),
            ]
        )
    longest = max(spans, key=lambda name: sum(end - start for start, end, _ in spans[name]))
    seconds = sum(end - start for start, end, _ in spans[longest])
    yield Chart(
        "timeline",
        "Timeline",
        "timeline",
        f"What the job did when, over {show_duration(clock.duration)}: {', '.join(spans)}. The longest part is "
        f"{longest}, {show_duration(seconds)}." + (f" It was started {len(history.attempts)} times." if marks else ""),
        Table(["Phase", f"Start, {clock.axis}", "In all", "Times"], rows),
        {"rows": list(spans), "bars": bars, "marks": marks, "end": clock.read(clock.start + clock.duration)},
        x=clock.axis,
        is_wide=True,
    )


def join_spans(spans: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Of very many, so many neighbours as one that a row can be drawn."""
    stride = -(-len(spans) // MAX_TIMELINE_BARS)
    if stride == 1:
        return spans
    groups = [spans[place : place + stride] for place in range(0, len(spans), stride)]
    return [(group[0][0], group[-1][1], f"{len(group)} times, {group[0][2]} and on") for group in groups]


def describe_supervision(history: History) -> list[tuple[str, float, str]]:
    """Of each split: its name, the share of its tokens that is trained on, and that as text."""
    found = []
    for name, record in history.data.items():
        tokens = record.get("tokens") or 0
        if tokens:
            share = (record.get("supervised_tokens") or 0) / tokens
            found.append((name, share, f"{show_share(share)} of {show_count(tokens)} tokens are trained on"))
    return found
