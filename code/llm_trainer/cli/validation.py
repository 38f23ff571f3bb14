# SPDX-License-Identifier: Apache-2.0
"""Findings of `validate` and `plan` about a job, printed as text for a person or as JSON."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llm_trainer.common.errors import MAX_LISTED_PROBLEMS
from llm_trainer.common.hub import expect_network
from llm_trainer.common.library_noise import silence_libraries
from llm_trainer.common.units import GIB, MIB
from llm_trainer.data.report import DataReport
from llm_trainer.host.findings import Finding, Verdict, format_finding, wants_colours
from llm_trainer.launcher.last_words import explain_crash


@dataclass
class Validation:
    """All that is known of a job before it starts."""

    findings: list[Finding] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # those that the user gave, without secrets
    reports: dict[str, DataReport] = field(default_factory=dict)  # by the name of the split
    memory: dict[str, Any] = field(default_factory=dict)  # bytes that a GPU needs, and their parts
    sample: str = ""  # a training row whose trained part is marked
    sample_name: str = "the first row"
    instances: dict[str, Any] = field(default_factory=dict)  # what `plan` tells of instance types, for JSON
    instance_lines: list[str] = field(default_factory=list)  # and for a person

    def add_findings(self, subject: str, verdict: Verdict, texts: Iterable[str]) -> None:
        """Add a finding for each text that is not among them yet."""
        for finding in (Finding(subject, verdict, text) for text in texts):
            if finding not in self.findings:
                self.findings.append(finding)

    def list_texts(self, verdict: Verdict) -> list[str]:
        """Return the texts of the findings with this verdict."""
        return [finding.text for finding in self.findings if finding.verdict == verdict]

    def describe(self) -> dict[str, Any]:
        """Return all that is known as values of JSON."""
        problems = self.list_texts("error")
        return {
            "ok": not problems,
            "problems": problems,
            "warnings": self.list_texts("warning"),
            "data": {name: report.summary() for name, report in self.reports.items()},
            "memory": self.memory,
            "sample": self.sample,
            "settings": self.settings,
            **self.instances,
        }


def collect_findings(examine: Callable[[Validation], None]) -> Validation:
    """Return what the function finds out. Where it fails in a way nobody foresaw, that is the last finding."""
    validation = Validation()
    try:
        with expect_network():  # a person waits for the findings
            examine(validation)
    except Exception as error:  # whatever it is, the user must learn what was found before
        validation.add_findings("check", "error", [explain_crash(error, "check").reason])
    return validation


def print_validation(examine: Callable[[bool], Validation], as_json: bool) -> int:
    """Print what the function finds out, and return the exit code: 1 when there are errors.

    The function is told whether its texts may have colours.
    """
    silence_libraries()
    in_colour = not as_json and wants_colours()
    # A library, or a wait for the Hub, may print too, and must not break the JSON.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        validation = examine(in_colour)
    lines = [show_json(validation.describe())] if as_json else format_text(validation, in_colour)
    print(*lines, sep="\n")
    return 1 if validation.list_texts("error") else 0


def show_json(values: dict[str, Any]) -> str:
    """Return values as one JSON object; those that JSON has no words for, such as paths, as texts."""
    return json.dumps(values, default=str)


def format_text(validation: Validation, in_colour: bool) -> Iterator[str]:
    """Yield the lines for a person: findings, tables of the data and of the memory, a sample, and the verdict."""
    errors = [finding for finding in validation.findings if finding.verdict == "error"]
    unlisted = errors[MAX_LISTED_PROBLEMS:]
    for finding in validation.findings:
        if finding not in unlisted:
            yield format_finding(finding, in_colour)
    if unlisted:
        yield f"and {len(unlisted)} more errors, which --json lists."
    if validation.reports:
        has_images = any(report.num_images for report in validation.reports.values())
        rows = {name: format_counts(report, has_images) for name, report in validation.reports.items()}
        yield from ("", *format_table(rows, "data"))
    yield from format_answers(validation.reports)
    if validation.instance_lines:
        yield from ("", *validation.instance_lines)
    elif validation.memory:
        yield from ("", *format_memory(validation.memory))
    if validation.sample:
        from llm_trainer.data.preview import describe_marks

        marks = describe_marks(in_colour, validation.reports["train"].has_pairs)
        yield from ("", f"Data train, {validation.sample_name} ({marks}):", validation.sample)
    num_warnings = len(validation.list_texts("warning"))
    is_plan = validation.memory and not validation.reports
    verdict = "fail" if errors else "start by its plan (`validate` checks its data)" if is_plan else "start"
    yield f"errors: {len(errors)}, warnings: {num_warnings}; this job would {verdict}."


def format_counts(report: DataReport, has_images: bool) -> dict[str, str]:
    """Return the figures of a split by the names of their columns, with its images where any split has some."""
    counts = {
        "rows": report.num_rows,
        **({"images": report.num_images} if has_images else {}),
        "tokens": report.num_tokens,
        "trained on": f"{report.supervised_share:.1%}",
        **report.length_percentiles(),
        "cut": report.num_truncated_rows,
        "left out": report.num_left_out,
        "bad": report.num_bad_rows,
        "duplicates": report.num_duplicate_rows,
        "in validation": report.num_rows_in_validation,
    }
    return {name: f"{value:,}" if isinstance(value, int) else str(value) for name, value in counts.items()}


def format_answers(reports: dict[str, DataReport]) -> Iterator[str]:
    """Yield a table of the splits of pairs, and one of those of judged answers, where there are any."""
    pairs = {name: format_pairs(report) for name, report in reports.items() if report.has_pairs}
    judged = {name: format_judged(report) for name, report in reports.items() if report.is_judged}
    for title, rows in (("pairs", pairs), ("answers", judged)):
        if rows:
            yield from ("", *format_table(rows, title))


def format_pairs(report: DataReport) -> dict[str, str]:
    """Return the figures of a split that only pairs have, by the names of their columns. Tokens are the answers'."""
    pairs = report.describe_pairs()
    counts = {name.replace("_", " "): pairs[name] for name in ("equal", "swapped", "cut_answers")}
    return format_sides(counts, pairs, ("chosen", "rejected"))


def format_judged(report: DataReport) -> dict[str, str]:
    """Return the figures of a split that only judged answers have, by the names of their columns."""
    judged = report.describe_judged()
    sides = ("desirable", "undesirable")
    counts = {name.replace("_", " "): judged[name] for name in (*sides, "cut_answers")}
    return format_sides(counts, judged, sides)


def format_sides(counts: dict[str, int], figures_of: dict[str, Any], sides: tuple[str, str]) -> dict[str, str]:
    """Return counts, and the lengths of the answers of both sides behind them."""
    for side in sides:
        tokens = figures_of[f"{side}_tokens"]
        figures = {"mean": round(tokens["mean"]), "p95": tokens.get("p95", 0), "longest": tokens["longest"]}
        counts |= {f"{side} {name}": value for name, value in figures.items()}
    return {name: f"{value:,}" for name, value in counts.items()}


def format_memory(memory: dict[str, Any]) -> Iterator[str]:
    """Yield a table of the GiB that each part takes on a GPU, with a column for each way of training."""
    needs = memory if "estimate" not in memory else {"here": memory["estimate"]} if memory["estimate"] else {}
    names = dict.fromkeys(part for need in needs.values() for part, size in need["parts"].items() if size >= MIB)
    rows = {part: {way: f"{need['parts'].get(part, 0) / GIB:.2f}" for way, need in needs.items()} for part in names}
    rows["in all"] = {way: f"{need['total_bytes'] / GIB:.2f}" for way, need in needs.items()}
    yield from format_table(rows, "GiB a GPU")


def format_table(rows: dict[str, dict[str, str]], title: str) -> Iterator[str]:
    """Yield a line with the names of the columns, and a line for each row, with the cells right-aligned."""
    columns = {column: column for row in rows.values() for column in row}
    widths = {column: max(len(column), *(len(row.get(column, "")) for row in rows.values())) for column in columns}
    name_width = max(10, *map(len, rows))
    for name, cells in (title, columns), *rows.items():
        yield f"{name:{name_width}}" + "".join(f"  {cells.get(column, ''):>{widths[column]}}" for column in columns)
