# SPDX-License-Identifier: Apache-2.0
"""Facts that the host finds in a batch change no bit of a training, and spare all questions to the GPU."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, masking_utils

from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.training.batches.batch_facts import BatchFacts, FindFacts, find_shared_sequences, known
from llm_trainer.training.methods import sft
from llm_trainer.training.packing import PackingCollator
from support.trainers import build_full_trainer
from support.waits import count_waits

PACKED = PackingCollator(0, 32, flattens=False)
STEPS = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}
STEPS |= {"learning_rate": 0.01, "num_train_epochs": 1, "logging_steps": 2, "max_grad_norm": 0.1}


def make_rows():
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in (9, 4, 17, 12, 5, 5, 5, 8, 20, 3, 6, 11):
        tokens = torch.randint(3, 200, (length,), generator=draw).tolist()
        first = length if length == 8 else length // 2  # one row has no label
        rows.append({"input_ids": tokens, "labels": [IGNORED] * first + tokens[first:], "length": length})
    return Dataset.from_list(rows)


def train(tiny_model, folder, collator, **settings):
    """Return the trained weights, the metrics of an evaluation, and what a GPU would have been asked."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    rows = make_rows()
    trainer = build_full_trainer(model, tokenizer, rows, collator, folder, rows, **{**STEPS, **settings})
    with count_waits() as waits:
        trainer.train()
    return trainer.model.state_dict(), trainer.evaluate(), waits.found


CASES = {
    "packed": (PACKED, {}),
    "padded": (None, {}),
    "a row a batch": (PACKED, {"per_device_train_batch_size": 1}),
    "smoothed": (PACKED, {"label_smoothing_factor": 0.2}),
    "dft": (None, {"loss_type": "dft"}),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_same_to_the_last_bit_and_no_number_is_asked_for(tiny_model, tmp_path, monkeypatch, case):
    collator, settings = CASES[case]
    found, metrics, waits = train(tiny_model, tmp_path, collator, **settings)
    monkeypatch.setattr(sft, "FindFacts", lambda collate: collate)
    expected, expected_metrics, asked = train(tiny_model, tmp_path, collator, **settings)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    for name in ("eval_loss", "eval_mean_token_accuracy"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-12)
    assert waits == {}
    assert asked["index"] > 0


def test_the_facts_are_those_that_the_libraries_would_find():
    rows = make_rows()
    batch = FindFacts(PACKED)(list(rows))
    facts = BatchFacts.take(batch)
    labels = batch["labels"]
    assert facts.shares_sequences
    assert facts.is_padded is None
    assert torch.equal(labels.flatten()[facts.places + 1], labels[:, 1:][labels[:, 1:] != IGNORED])
    with known(facts):
        found = find_shared_sequences(batch["position_ids"])
    assert torch.equal(found, find_shared_sequences(batch["position_ids"]))
    alone = FindFacts(PACKED)([rows[0]])
    assert not alone["shares_sequences"]
    with known(BatchFacts.take(alone)):
        assert masking_utils.find_packed_sequence_indices(alone["position_ids"]) is None
