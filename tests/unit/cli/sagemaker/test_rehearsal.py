# SPDX-License-Identifier: Apache-2.0
"""`validate` and `plan` tell of a job's tree what they would tell of the job."""

import pytest

from llm_trainer.aws.job_tree import lay_out_tree
from llm_trainer.cli.sagemaker.rehearsal import Budget, find_errors, find_plan_refusals, run_on_tree, take_budget
from llm_trainer.common.errors import UserError


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


def test_a_mistake_is_told_as_the_job_would(tmp_path):
    with lay_out_tree(
        {"lora_r": "0", "model_id": "/opt/ml/input/data/model"}, {"model": None}, "ml.g6.2xlarge", 1
    ) as tree:
        problems = find_errors(tree)
    assert any("lora_r='0' is not valid" in text for text in problems)
    assert not any(str(tree) in text for text in problems)


def test_each_preference_has_to_hold_the_job(monkeypatch):
    planned = {"instances": [{"instance_type": "ml.p5.48xlarge", "count": 1, "fits": False, "how": "FSDP2"}]}
    monkeypatch.setattr("llm_trainer.cli.sagemaker.rehearsal.run_on_tree", lambda tree, *words: planned)
    kinds = {"ml.c7i.4xlarge": 1, "ml.p5.48xlarge": 1}
    (problem,) = find_plan_refusals(None, kinds, Budget(None))
    assert "does not fit on 1 x ml.p5.48xlarge (FSDP2)" in problem
    assert len(list(find_plan_refusals(None, kinds, Budget(5)))) == 2


def test_a_command_that_tells_nothing_is_told(tmp_path):
    with pytest.raises(UserError, match="`llm-trainer nothing` could not check the job"):
        run_on_tree(tmp_path, "nothing")
