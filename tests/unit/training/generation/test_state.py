# SPDX-License-Identifier: Apache-2.0
"""The state of a rank comes back from a checkpoint, with its tensors."""

import torch

from llm_trainer.training.generation.state import FILE, load_state, save_states


def test_a_state_comes_back(tmp_path):
    state = {"step": 3, "buffer": [{"completion_ids": torch.arange(4)}], "ranks": 1}
    save_states(state, tmp_path, None)
    assert [file.name for file in tmp_path.iterdir()] == [FILE.format(rank=0)]
    found = load_state(tmp_path, 0, torch.device("cpu"))
    assert found["step"] == 3
    torch.testing.assert_close(found["buffer"], state["buffer"])
    assert load_state(tmp_path, 1, torch.device("cpu")) is None
