# SPDX-License-Identifier: Apache-2.0
"""A batch counts the tokens of its sequences, and all of them as scored where labels are not known."""

from llm_trainer.model.memory.batch import Batch


def test_tokens_of_a_batch():
    assert Batch(3, 100).num_tokens == Batch(3, 100).find_num_scored() == 300
    assert Batch(3, 100, 20).find_num_scored() == 20
