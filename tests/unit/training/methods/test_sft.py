# SPDX-License-Identifier: Apache-2.0
"""Supervised fine-tuning as a training method: found by its name, it counts the tokens of packed rows."""

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_trainer.common.metric_definitions import METRICS
from llm_trainer.training.methods import METHODS, choose_method
from llm_trainer.training.methods.sft import SFT
from llm_trainer.training.packing import PackingCollator
from support.trainers import build_full_trainer


def test_methods_are_found_by_name_and_sft_is_the_default():
    assert choose_method() is choose_method("sft") is METHODS["sft"] is SFT
    with pytest.raises(KeyError):
        choose_method("none")


def test_its_metrics_are_defined():
    assert set(SFT.metric_names.values()) <= METRICS.keys()
    assert not set(SFT.hidden_metrics) & METRICS.keys()


def test_the_tokens_of_packed_rows_are_counted_and_not_their_slots(tiny_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [{"input_ids": [5] * length, "labels": [5] * length, "length": length} for length in (9, 4, 3)]
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    collator = PackingCollator(0, 16, flattens=False, pad_to_multiple_of=8)
    trainer = build_full_trainer(model, tokenizer, Dataset.from_list(rows[:1]), collator, tmp_path)
    trainer.model.train()
    trainer.compute_loss(trainer.model, collator(rows))
    assert trainer.count_tokens() == 16
    trainer.model.eval()
    trainer.prediction_step(trainer.model, collator(rows), prediction_loss_only=True)
    assert trainer.count_tokens() == 16


def test_rows_of_another_method_are_refused(tiny_model, tmp_path):
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = Dataset.from_list([{"chosen": [5], "rejected": [6], "length": 1}])
    with pytest.raises(AssertionError, match="sft needs rows with"):
        build_full_trainer(model, tokenizer, rows, None, tmp_path)
