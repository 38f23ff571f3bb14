# SPDX-License-Identifier: Apache-2.0
"""What is not offered where the model writes what it is trained on is refused in a sentence."""

import pytest

from llm_trainer.config.checks import find_contradictions
from llm_trainer.config.schema import Settings

REFUSED = [
    {"use_vllm": True},
    {"beta": 0.1, "use_peft": False},
    {"method": "rloo", "use_peft": False},
    {"steps_per_generation": 2, "generation_batch_size": 8},
    {"steps_per_generation": 2, "global_batch_size": 8},
    {"generation_batch_size": 8, "global_batch_size": 8},
    {"use_transformers_continuous_batching": True},
    {"log_completions": True},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"cast_lm_head_to_fp32": True},
    {"max_tool_calling_iterations": 3},
    {"activation_offloading": True},
    {"assistant_only_loss": True},
]


@pytest.mark.parametrize("settings", REFUSED, ids=str)
def test_what_is_not_offered_is_refused_once(settings):
    (problem,) = find_contradictions(Settings(**{"method": "grpo", **settings}))
    assert any(name in problem for name in settings)


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}, {"method": "rloo"}, {"use_peft": False}], ids=str)
def test_what_is_offered_is_not_refused(settings):
    assert [*find_contradictions(Settings(**{"method": "grpo", **settings}))] == []


@pytest.mark.parametrize("name", ["reward_functions", "reward_options", "reward_timeout_seconds"])
def test_rewards_belong_to_methods_that_generate(name):
    value = {"reward_functions": ["math"], "reward_options": {"math": {}}, "reward_timeout_seconds": 3.0}[name]
    (problem,) = find_contradictions(Settings(method="dpo", **{name: value}))
    assert problem.startswith(f"{name} is a setting of method=grpo or rloo and this job has method=dpo")
