# SPDX-License-Identifier: Apache-2.0
"""`validate` and `plan` tell of a job's tree what they would tell of the job."""

from dataclasses import replace

import pytest

from llm_trainer.aws.job_tree import lay_out_tree
from llm_trainer.cli.sagemaker.rehearsal import (
    Budget,
    Place,
    check_tree,
    find_affordable_seconds,
    find_plan_refusals,
    take_budget,
)
from llm_trainer.common.errors import UserError

PLACE = Place("ml.g6.2xlarge", 1)


def test_a_budget_and_its_words(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["--lora_r", "8", "--max-dollars=2.5", "--prices-file", "prices.json", "--rows", "9", "--prices", "--spot"]
    budget, rest = take_budget(words)
    assert budget == Budget(2.5, ("--prices", "--prices-file", str(tmp_path / "prices.json"), "--rows", "9"))
    assert rest == ["--lora_r", "8", "--spot"]
    assert take_budget(["--spot"]) == (Budget(None), ["--spot"])
    for amount in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(UserError, match="is no amount: write a number above 0"):
            take_budget([f"--max-dollars={amount}"])
    with pytest.raises(UserError, match="--tokens-per-row='many' is no whole number"):
        take_budget(["--rows", "9", "--tokens-per-row", "many"])


def test_a_mistake_is_told_as_the_job_would(tmp_path):
    with lay_out_tree(
        {"lora_r": "0", "model_id": "/opt/ml/input/data/model"}, {"model": None}, {}, "ml.g6.2xlarge", 1
    ) as tree:
        found = check_tree(tree, ("validate", "plan"), [PLACE], ("--rows", "9"))
    assert [*found] == ["validate", "plan"]
    for each in found.values():
        assert any("lora_r='0' is not valid" in text for text in each["problems"])
        assert not any(str(tree) in text for text in each["problems"])
    assert any("--rows and --tokens-per-row" in text for text in found["plan"]["problems"])


def test_plan_is_asked_about_the_places_of_the_job_alone(tmp_path, tiny_model):
    places = [Place("ml.g5.xlarge", 20), PLACE, Place("ml.m5.xlarge", 1)]
    with lay_out_tree({}, {"model": tiny_model, "train": None}, {}, "ml.g5.xlarge", 20) as tree:
        planned = check_tree(tree, ("plan",), places, ("--rows", "9", "--tokens-per-row", "5"))["plan"]
    found = sorted((entry["instance_type"], entry["count"], entry["fits"]) for entry in planned["instances"])
    assert found == [("ml.g5.xlarge", 20, True), ("ml.g6.2xlarge", 1, True)]


def test_each_preference_has_to_hold_the_job():
    planned = {"instances": [{"instance_type": "ml.p5.48xlarge", "count": 1, "fits": False, "how": "FSDP2"}]}
    places = [Place("ml.c7i.4xlarge", 1), Place("ml.p5.48xlarge", 1)]
    (problem,) = find_plan_refusals(planned, places, Budget(None))
    assert "does not fit on 1 x ml.p5.48xlarge (FSDP2)" in problem
    unknown, _ = find_plan_refusals(planned, places, Budget(5))
    assert unknown.startswith("--max-dollars cannot be kept on 1 x ml.c7i.4xlarge, which `llm-trainer plan` does not")


def test_a_budget_bounds_the_time_on_the_dearest_place():
    entry = {"fits": True, "dollars": 8.0, "dollars_an_hour": 2.0}
    dear = {"fits": True, "dollars": 6.0, "dollars_an_hour": 12.0}
    planned = {
        "instances": [
            {"instance_type": "ml.g6.2xlarge", "count": 2, **entry},
            {"instance_type": "ml.p5.4xlarge", "count": 1, **dear},
        ]
    }
    two, one = Place("ml.g6.2xlarge", 2), Place("ml.p5.4xlarge", 1)
    assert find_affordable_seconds(planned, [two, one], Budget(12.0)) == 3600
    assert find_affordable_seconds(planned, [two], Budget(12.0)) == 3 * 3600
    assert find_affordable_seconds(planned, [two], Budget(None)) is None
    assert list(find_plan_refusals(planned, [two, one], Budget(8.0))) == []
    warm = replace(two, keep_alive_seconds=1800)  # two dollars more, after the job
    assert find_affordable_seconds(planned, [warm], Budget(12.0)) == 2.5 * 3600
    (refusal,) = find_plan_refusals(planned, [warm], Budget(9.0))
    assert "It costs about 10.00 dollars on 2 x ml.g6.2xlarge" in refusal


def test_prices_in_another_currency_keep_no_budget():
    entry = {"instance_type": "ml.g6.2xlarge", "count": 1, "fits": True, "dollars": 4.0, "dollars_an_hour": 8.0}
    planned = {"instances": [entry], "currency": "CNY"}
    (problem,) = find_plan_refusals(planned, [Place("ml.g6.2xlarge", 1)], Budget(9.0))
    assert "since the prices are in CNY" in problem
    assert list(find_plan_refusals({**planned, "currency": "USD"}, [Place("ml.g6.2xlarge", 1)], Budget(9.0))) == []


def test_why_plan_knows_no_prices_is_told():
    planned = {"problems": ["prices.json was not found."], "warnings": []}
    (problem,) = find_plan_refusals(planned, [Place("ml.g6.2xlarge", 1)], Budget(5.0, ("--prices-file", "prices.json")))
    assert problem == "The cost of the job is not known: prices.json was not found."
    assert list(find_plan_refusals(planned, [Place("ml.g6.2xlarge", 1)], Budget(None))) == []
    silent = {"problems": [], "warnings": ["use_cpu=true: what types without a GPU take is not known."]}
    (problem,) = find_plan_refusals(silent, [Place("ml.m5.xlarge", 1)], Budget(5.0))
    assert "--max-dollars cannot be kept on 1 x ml.m5.xlarge" in problem


def test_checks_that_tell_nothing_are_told(tmp_path):
    with pytest.raises(UserError, match=r"^The job could not be checked by nothing \(.*\)\.$"):
        check_tree(tmp_path, ("nothing",), [PLACE])
