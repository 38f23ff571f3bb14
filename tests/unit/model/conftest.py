# SPDX-License-Identifier: Apache-2.0
"""Bases on disk for the tests of the model's package."""

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def make_base(tmp_path):
    """Saves a model of random weights, and gives a function that loads it."""

    def make(config):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    return make
