# SPDX-License-Identifier: Apache-2.0
"""A trainer with the mixin is stopped and resumed to the very same weights, and shares nothing with another one."""

import json

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from llm_trainer.common.errors import UserError
from llm_trainer.job import checkpoint_dir
from llm_trainer.journal.journal import Journal
from llm_trainer.training.resumable import ResumableMixin
from support.tiny_architectures import build_tiny_config
from support.tiny_model import build_tokenizer
from support.trainers import StopAfter, build_run_context


class CountingTrainer(ResumableMixin, Trainer):
    """Transformers' own trainer, which counts no tokens: no trainer of TRL is needed."""

    _total_train_tokens = 0


def build(base, folder, **context):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
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


@pytest.fixture(scope="module", params=["llama", "mixtral", "tied"])
def base(request, tiny_model, tmp_path_factory):
    """Return a folder with a model. The experts of one have other names in files, the head of one is its embedding."""
    if request.param == "llama":
        return tiny_model
    folder = tmp_path_factory.mktemp(request.param)
    config = build_tiny_config("mixtral" if request.param == "mixtral" else "llama")
    config.tie_word_embeddings = request.param == "tied"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_any_trainer_of_transformers_resumes_to_the_very_same_weights(base, tmp_path):
    whole = build(base, tmp_path / "whole")
    whole.train_from(None)
    journal = Journal(tmp_path / "metrics.jsonl")
    first = build(base, tmp_path / "parts", identity={"seed": 42}, journal=journal)
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
    second = build(base, tmp_path / "parts")
    second.train_from(checkpoint)
    assert second.state.best_model_checkpoint is None
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_checkpoint_that_lacks_weights_is_refused(tiny_model, tmp_path, goes_on):
    first = build(tiny_model, tmp_path / "parts")
    first.add_callback(StopAfter(3))
    first.train_from(None)
    checkpoint = checkpoint_dir.find_newest(tmp_path / "parts")[0]
    weights = load_file(checkpoint / "model.safetensors")
    lost = weights.pop("model.layers.0.mlp.up_proj.weight")
    assert lost.numel()
    save_file(weights, checkpoint / "model.safetensors")
    second = build(tiny_model, tmp_path / "parts")
    second.state.best_model_checkpoint = str(checkpoint)
    with pytest.raises(UserError, match=r"lacks 1 weights of this model, such as model\.layers\.0\.mlp\.up_proj"):
        second.train_from(checkpoint) if goes_on else second._load_best_model()


def test_a_best_checkpoint_that_is_gone_does_not_pass_for_the_last_one(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    with pytest.raises(UserError, match=r"The best checkpoint, .*checkpoint-1, is gone"):
        trainer._load_best_model()


def test_a_rank_without_a_random_state_draws_by_seed_step_and_rank(tiny_model, tmp_path, monkeypatch):
    drawn = []
    for step, rank in ((3, 0), (3, 0), (3, 1), (4, 0)):
        trainer = build(tiny_model, tmp_path)
        trainer.state.global_step = step
        monkeypatch.setattr(TrainingArguments, "process_index", rank)
        torch.rand(len(drawn))  # as much as a start may draw, which differs from machine to machine
        trainer._load_rng_state(str(tmp_path))
        drawn.append(float(torch.rand(1)))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_two_trainers_share_no_state(tiny_model, tmp_path):
    one, other = build(tiny_model, tmp_path / "one"), build(tiny_model, tmp_path / "other")
    assert one.row_order is not other.row_order
    one.stop(1.0, evaluation_due=True)
    assert not other.stopped
    assert not other.evaluation_due
