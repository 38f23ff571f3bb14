# SPDX-License-Identifier: Apache-2.0
"""A trainer with the mixin is stopped and resumed to the very same weights, and shares nothing with another one."""

import json

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from llm_trainer.job import checkpoint_dir
from llm_trainer.journal.journal import Journal
from llm_trainer.training.resumable import ResumableMixin
from support.trainers import build_run_context


class CountingTrainer(ResumableMixin, Trainer):
    """Transformers' own trainer, which counts no tokens: no trainer of TRL is needed."""

    _total_train_tokens = 0


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = control.should_save = True


def build(tiny_model, folder, **context):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = [{"input_ids": [5 + n] * 8, "labels": [5 + n] * 8, "attention_mask": [1] * 8, "length": 8} for n in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=2,
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=0.01,
        train_sampling_strategy="group_by_length",
    )
    data = Dataset.from_list(rows)
    run = build_run_context(**context)
    return CountingTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, run=run)


def test_any_trainer_of_transformers_resumes_to_the_very_same_weights(tiny_model, tmp_path):
    whole = build(tiny_model, tmp_path / "whole")
    whole.train_from(None)
    journal = Journal(tmp_path / "metrics.jsonl")
    first = build(tiny_model, tmp_path / "parts", identity={"seed": 42}, journal=journal)
    first.add_callback(StopAfter(3))
    first.train_from(None)
    checkpoint, warnings = checkpoint_dir.find_newest(tmp_path / "parts")
    assert (checkpoint.name, warnings) == ("checkpoint-3", [])
    assert checkpoint_dir.read_marker(checkpoint).run == {"seed": 42}
    (record,) = map(json.loads, journal.file.read_text().splitlines())
    assert (record["kind"], record["step"]) == ("checkpoint", 3)
    state = checkpoint / "trainer_state.json"
    foreign = {"best_model_checkpoint": str(tmp_path), "best_global_step": 1}  # would become the result
    state.write_text(json.dumps(json.loads(state.read_text()) | foreign))
    second = build(tiny_model, tmp_path / "parts")
    second.train_from(checkpoint)
    assert second.state.best_model_checkpoint is None
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_two_trainers_share_no_state(tiny_model, tmp_path):
    one, other = build(tiny_model, tmp_path / "one"), build(tiny_model, tmp_path / "other")
    assert one.row_order is not other.row_order
    one.stop(1.0, evaluation_due=True)
    assert not other.stopped
    assert not other.evaluation_due
