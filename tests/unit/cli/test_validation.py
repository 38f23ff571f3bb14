# SPDX-License-Identifier: Apache-2.0
"""What is found out about a job is printed for a person, and for a program."""

import json
import sys

from llm_trainer.cli.validation import Validation, collect_findings, format_table, format_text, print_validation
from llm_trainer.data.report import DataReport


def build_validation(num_errors: int = 0) -> Validation:
    validation = Validation()
    validation.add_findings("settings", "ok", ["3 given"])
    validation.add_findings("job", "warning", ["slow"])
    validation.add_findings("inputs", "error", [f"wrong {number}" for number in range(num_errors)])
    return validation


def test_texts_are_found_by_their_verdict():
    validation = build_validation(num_errors=2)
    assert validation.list_texts("ok") == ["3 given"]
    assert validation.list_texts("error") == ["wrong 0", "wrong 1"]


def test_the_last_line_is_the_verdict():
    *_, verdict = format_text(build_validation(), in_colour=False)
    assert verdict == "errors: 0, warnings: 1; this job would start."
    *_, verdict = format_text(build_validation(num_errors=1), in_colour=False)
    assert verdict == "errors: 1, warnings: 1; this job would fail."


def test_what_two_splits_have_in_common_is_told_once():
    validation = build_validation(num_errors=2)
    validation.add_findings("inputs", "error", ["wrong 1", "wrong 2", "wrong 2"])
    assert validation.list_texts("error") == ["wrong 0", "wrong 1", "wrong 2"]


def test_images_are_a_column_where_a_split_has_some():
    validation = build_validation()
    validation.reports = {"train": DataReport(num_rows=4, num_images=3), "validation": DataReport(num_rows=2)}
    table = [line.split() for line in format_text(validation, in_colour=False)][-4:-1]
    assert [line[1:3] for line in table] == [["rows", "images"], ["4", "3"], ["2", "0"]]
    validation.reports["train"].num_images = 0
    assert "images" not in " ".join(format_text(validation, in_colour=False))


def test_many_errors_are_counted():
    lines = list(format_text(build_validation(num_errors=23), in_colour=False))
    assert "and 3 more errors, which --json lists." in lines


def test_a_plan_says_who_checks_the_data():
    validation = build_validation()
    validation.memory = {"training": {"parts": {"base weights": 2**30}, "total_bytes": 2**31}}
    lines = list(format_text(validation, in_colour=False))
    assert lines[-1].endswith("this job would start by its plan (`validate` checks its data).")
    assert [line.split() for line in lines[3:6]] == [
        ["GiB", "a", "GPU", "training"],
        ["base", "weights", "1.00"],
        ["in", "all", "2.00"],
    ]


def test_cells_are_right_aligned_below_the_names_of_their_columns():
    rows = {"train": {"rows": "1,000", "cut": "0"}, "validation": {"rows": "4", "cut": "12345"}}
    assert list(format_table(rows, "data")) == [
        "data         rows    cut",
        "train       1,000      0",
        "validation      4  12345",
    ]
    rows = {"train": {"rows": "0", "bad": "4"}, "validation": {"rows": "4", "p50": "9", "bad": "0"}}
    assert list(format_table(rows, "data")) == [
        "data        rows  bad  p50",
        "train          0    4     ",
        "validation     4    0    9",
    ]


def test_json_is_alone_on_standard_output(capsys):
    def examine(in_colour: bool) -> Validation:
        print("a library's word")
        assert not in_colour
        return build_validation(num_errors=1)

    assert print_validation(examine, as_json=True) == 1
    output = capsys.readouterr()
    values = json.loads(output.out)
    assert (values["ok"], values["problems"], values["warnings"]) == (False, ["wrong 0"], ["slow"])
    assert output.err == "a library's word\n"


def test_what_nobody_foresaw_is_the_last_finding(tmp_path, monkeypatch, capfd):
    def examine(validation: Validation) -> None:
        validation.add_findings("settings", "ok", ["3 given"])
        raise KeyError("odd")

    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    assert print_validation(lambda in_colour: collect_findings(examine), as_json=True) == 1
    output = capfd.readouterr()
    (problem,) = json.loads(output.out)["problems"]
    assert problem.startswith("The check failed with KeyError: 'odd' (the traceback is in the log")
    assert 'raise KeyError("odd")' in output.err
    (traceback,) = (tmp_path / "output/data/failures").glob("*-check.txt")
    assert "KeyError" in traceback.read_text()


def test_text_has_colours_only_on_a_terminal(capsys, monkeypatch):
    assert print_validation(lambda in_colour: build_validation(), as_json=False) == 0
    assert "\033" not in capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_validation(lambda in_colour: build_validation(), as_json=False)
    assert "\033[33mwarning" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    print_validation(lambda in_colour: build_validation(), as_json=False)
    assert "\033" not in capsys.readouterr().out
