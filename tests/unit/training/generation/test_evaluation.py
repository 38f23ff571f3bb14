# SPDX-License-Identifier: Apache-2.0
"""An evaluation by completions is a mean over all of them, each prompt's counted once."""

import math

import pytest
import torch

from llm_trainer.training.generation.evaluation import fill_prompts
from llm_trainer.training.generation.prompts import FILLS, collate_prompts
from support.preference_pairs import build_lora
from support.written_completions import build_prompt_rows, build_writing_trainer

GROUPS = {"num_generations": 2, "per_device_train_batch_size": 4}


def tell_answers(completions, answer, **columns):
    return [float(each) for each in answer]


def build(method, model, folder, **options):
    options = {**GROUPS, "per_device_eval_batch_size": 4, **options}
    return build_writing_trainer(method, model, folder, build_lora(), {"rewards": [tell_answers]}, **options)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
@pytest.mark.parametrize("drops", [False, True])
def test_each_prompt_counts_once(tiny_model, tmp_path, method, drops):
    """The second batch has one prompt of three, or is filled: a mean of both batches would count it twice."""
    rows = build_prompt_rows(tiny_model)
    answers = [len(ids) for ids in rows["input_ids"]]
    assert len(set(answers)) > 1
    trainer = build(method, tiny_model, tmp_path, dataloader_drop_last=drops)
    for _ in range(2):
        found = trainer.evaluate(rows)
        assert found["eval_reward"] == found["eval_rewards/tell_answers/mean"] == pytest.approx(sum(answers) / 3)
        assert found["eval_frac_reward_zero_std"] == 1
        assert found["eval_reward_std"] == pytest.approx(torch.tensor(answers * 2).float().std().item())


def test_what_fills_a_batch_is_told(tiny_model):
    rows = build_prompt_rows(tiny_model)
    filled = fill_prompts(rows, 2)
    assert [each[FILLS] for each in collate_prompts([*filled])] == [False, False, False, True]
    assert filled[3]["content"] == rows[0]["content"]
    assert fill_prompts(rows, 3) is rows


def test_what_does_not_count_is_in_no_metric(tiny_model, tmp_path):
    trainer = build("grpo", tiny_model, tmp_path)
    judged = torch.tensor([[1.0], [0.0], [math.nan], [1.0], [math.nan], [math.nan]])
    written = torch.tensor([[3.0, 0, 1], [5, 1, 1], [4, 0, 1], [4, 0, 1], [9, 1, 0], [9, 1, 0]])
    found = trainer.summarize(judged, written)
    assert found == {
        "rewards/tell_answers/mean": pytest.approx(2 / 3),
        "reward": pytest.approx(2 / 3),
        "reward_std": pytest.approx(math.sqrt(1 / 3)),
        "frac_reward_zero_std": 0.5,  # of the second group, one completion has no reward
        "completions/mean_length": 4.0,
        "completions/clipped_ratio": 0.25,
    }
