# SPDX-License-Identifier: Apache-2.0
"""The plan of a job on instances, as a person reads it: one screen, and a remedy where nothing fits."""

import re
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from transformers import LlamaConfig

from llm_trainer.cli.plan_instances import PlanOptions, add_candidates, explain_lack, read_job_prices
from llm_trainer.cli.plan_table import LEAST_FIRST, format_plan
from llm_trainer.cli.validation import Validation
from llm_trainer.planning.candidates import list_candidates
from llm_trainer.planning.choice import choose
from llm_trainer.planning.prices import write_prices
from support.planned_jobs import PRICES, outline_job

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def outline():
    return outline_job(lengths={100: 100_000}, prices=PRICES)


@pytest.fixture(scope="module")
def candidates(outline):
    return list_candidates(outline)


@pytest.mark.parametrize("in_colour", [False, True])
def test_a_plan_fills_one_screen_and_names_the_three_that_matter(outline, candidates, in_colour):
    lines = list(format_plan(candidates, choose(candidates), outline, in_colour))
    assert len(lines) < 35
    assert any("\x1b[" in line for line in lines) == in_colour
    text = [ESCAPES.sub("", line) for line in lines]
    assert all(len(line) < 170 for line in text)
    for title in ("cheapest: ", "fastest: ", "best value (price x hours): "):
        (line,) = [line for line in text if line.startswith(title)]
        assert " USD (" in line
    assert any(f"{candidates[0].dollars:,.2f}" in line for line in text)
    assert any("prices of us-east-1 in USD, asked on 2026-11-26" in line for line in text)
    (missing,) = [line for line in text if line.startswith("No price in us-east-1 (not offered there, or not in the ")]
    assert re.search(r"\): (ml\.[a-z0-9.-]+, ){3}ml\.[a-z0-9.-]+ and 43 more\.$", missing)
    assert sum("no price" in line for line in text) == 13  # of sixteen rows


@pytest.mark.parametrize(("columns", "left_out"), [(200, set()), (80, {"steps", "batch", "GiB a GPU", "range"})])
def test_a_terminal_has_the_columns_that_it_is_wide_enough_for(outline, candidates, monkeypatch, columns, left_out):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    header, *rows = list(format_plan(candidates, {}, outline, in_colour=False))[:17]
    assert all(len(row) <= columns for row in (header, *rows))
    assert {title for title in LEAST_FIRST if title not in header} >= left_out
    assert "on demand" in header
    assert "steps" in next(format_plan(candidates, {}, outline, in_colour=False)) or left_out


def test_a_model_that_is_planned_by_formula_is_told_so(outline, candidates):
    first = candidates[0]
    fit, step = replace(first.fit, by_formula=True), replace(first.step, is_traced=False)
    for known in (replace(first, fit=fit), replace(first, step=step)):
        (line,) = [line for line in format_plan([known], {}, outline, in_colour=False) if "by formula" in line]
        assert line.startswith("The model's code cannot be followed")
    assert not any("by formula" in line for line in format_plan(candidates, {}, outline, in_colour=False))


@pytest.mark.parametrize(
    ("known", "asked", "warned"),
    [("eu-west-3", None, True), ("eu-west-3", "us-east-1", False), ("us-east-1", None, False)],
)
def test_prices_of_another_region_than_awss_settings_are_warned_of(tmp_path, monkeypatch, known, asked, warned):
    monkeypatch.setenv("AWS_REGION", known)
    file, validation = tmp_path / "prices.json", Validation()
    write_prices(PRICES.model_copy(update={"asked_at": datetime.now(UTC)}), file)
    assert read_job_prices(PlanOptions(prices_file=str(file), region=asked), validation).region == "us-east-1"
    found = validation.list_texts("warning")
    assert [text.startswith("The prices are those of us-east-1, and the job is for eu-west-3") for text in found] == (
        [True] if warned else []
    )


def test_what_is_missing_is_named(outline, candidates):
    unpriced = list(format_plan(candidates, {}, outline_job(lengths={100: 10}), in_colour=False))
    assert unpriced[-1].startswith("For dollars give --prices")
    unknown = outline_job()
    assert list(format_plan(list_candidates(unknown), {}, unknown, in_colour=False))[-1].startswith(
        "For hours give --rows"
    )


def test_a_job_that_fits_nowhere_is_told_what_makes_it_fit():
    huge = LlamaConfig(
        vocab_size=1024, hidden_size=65_536, intermediate_size=262_144, num_hidden_layers=4, num_attention_heads=256,
        num_key_value_heads=256,
    )  # fmt: skip
    validation = Validation()
    add_candidates(outline_job(huge, distribution="ddp", lengths={100: 10}), validation, in_colour=False)
    (problem,) = validation.list_texts("error")
    assert problem.startswith(
        "The job fits no instance type (on 1 x ml.p6-b300.48xlarge, which come closest, it needs "
    )
    assert "what makes it fit: " in problem
    assert "distribution=fsdp" in problem
    assert not validation.instance_lines
    assert len(validation.instances["instances"]) == 16 * 50


@pytest.mark.parametrize("place", [("ml.g5.xlarge", 1), ("ml.m5.xlarge", 1)])
def test_who_asks_about_places_tells_what_does_not_fit(place):
    validation = Validation()
    outline = replace(outline_job(nproc_per_node=2, lengths={100: 10}), places=(place,))
    add_candidates(outline, validation, in_colour=False)
    assert not any(entry["fits"] for entry in validation.instances["instances"])
    assert not validation.list_texts("error")


def test_a_job_that_no_gpu_can_do_says_why():
    (candidate, *_) = candidates = list_candidates(outline_job(global_batch_size=7, per_device_train_batch_size=7))
    assert candidate.fits  # on one GPU
    refused = [each for each in candidates if each.num_gpus == 2]
    assert "global_batch_size=7 cannot be shared by 2 devices" in explain_lack(refused)
