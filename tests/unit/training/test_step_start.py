# SPDX-License-Identifier: Apache-2.0
"""A stop in the middle of a step goes back to the last whole one, and the next run ends with the very same weights."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from llm_trainer.job import checkpoint_dir
from llm_trainer.training.resumable import ResumableMixin
from llm_trainer.training.save_and_stop import SaveAndStop
from support.trainers import build_run_context

BATCHES_A_STEP = 4


class NoisyTrainer(ResumableMixin, Trainer):
    """A trainer whose every batch draws random numbers of all kinds, as dropout does, and counts its tokens."""

    _total_train_tokens = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._total_train_tokens += inputs["input_ids"].numel()
        noise = torch.rand(()) + random.random() + np.random.rand()
        return super().compute_loss(model, inputs, *args, **kwargs) * (1 + noise)


def build(tiny_model, folder, stop_at=None, save_steps=1000):
    """Return a trainer of three epochs of two steps, with a stop in the batch of that number."""
    torch.manual_seed(0)
    rows = [{"input_ids": [5 + n] * 8, "labels": [5 + n] * 8, "attention_mask": [1] * 8} for n in range(16)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=BATCHES_A_STEP,
        save_strategy="steps",
        save_steps=save_steps,
        logging_steps=1,
        disable_tqdm=True,
        learning_rate=0.01,
    )
    trainer = NoisyTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_model),
        run=build_run_context(),
    )
    trainer.run.consensus.count_batches_between_polls = lambda batches_a_step: 1  # as where steps are long
    looks = iter(range(1, 10**6))
    request = SimpleNamespace(is_made=lambda seconds: next(looks) == stop_at, age_seconds=lambda: 0.5)
    trainer.add_callback(SaveAndStop(trainer, request, has_interval=True))
    return trainer


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    trainer = build(tiny_model, tmp_path_factory.mktemp("whole"))
    trainer.train_from(None)
    return trainer


def read_losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


# In the middle of a step, in the first batch of an epoch, and after a step whose checkpoint is there already.
@pytest.mark.parametrize(
    ("batch", "save_steps", "done"), [(6, 1000, 1), (9, 1000, 2), (11, 1000, 2), (15, 3, 3)], ids=str
)
def test_a_stop_within_a_step_resumes_to_the_very_same_weights(whole, tiny_model, tmp_path, batch, save_steps, done):
    first = build(tiny_model, tmp_path, stop_at=batch, save_steps=save_steps)
    first.train_from(None)
    assert (first.stopped, first.state.global_step) == (True, done)
    checkpoint, warnings = checkpoint_dir.find_newest(tmp_path)
    assert (checkpoint.name, warnings) == (f"checkpoint-{done}", [])
    assert checkpoint_dir.read_marker(checkpoint).num_tokens == done * BATCHES_A_STEP * 16
    assert all(weight.grad is None for weight in first.model.parameters())
    second = build(tiny_model, tmp_path)
    second.train_from(checkpoint)
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert read_losses(second) == read_losses(whole)
    assert second.num_tokens == whole.num_tokens


def test_a_stop_within_the_very_first_step_leaves_no_checkpoint(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path, stop_at=2)
    trainer.train_from(None)
    assert (trainer.stopped, trainer.state.global_step) == (True, 0)
    assert checkpoint_dir.find_newest(tmp_path) == (None, [])
    untouched = AutoModelForCausalLM.from_pretrained(tiny_model)
    for ours, theirs in zip(trainer.model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_stop_in_the_first_step_after_a_resume_keeps_the_checkpoint_that_is_there(whole, tiny_model, tmp_path):
    first = build(tiny_model, tmp_path, stop_at=9)
    first.train_from(None)
    checkpoint, _ = checkpoint_dir.find_newest(tmp_path)
    marked = (checkpoint / checkpoint_dir.MARKER).stat().st_mtime_ns
    second = build(tiny_model, tmp_path, stop_at=1)
    second.train_from(checkpoint)
    assert (second.stopped, second.state.global_step) == (True, 2)
    assert (checkpoint / checkpoint_dir.MARKER).stat().st_mtime_ns == marked
    third = build(tiny_model, tmp_path)
    third.train_from(checkpoint)
    for ours, theirs in zip(third.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
