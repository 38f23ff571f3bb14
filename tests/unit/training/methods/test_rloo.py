# SPDX-License-Identifier: Apache-2.0
"""RLOO is described with its own default of completions a prompt. Its step is compared in test_grpo.py."""

from llm_trainer.training.methods.rloo import RLOO


def test_an_evaluation_holds_whole_groups():
    assert RLOO.choose_defaults({}, 1) == {"per_device_eval_batch_size": 8}
    assert RLOO.choose_defaults({"num_generations": 3}, 1) == {"per_device_eval_batch_size": 9}
