# SPDX-License-Identifier: Apache-2.0
"""A trainer that writes completions ends and resumes as exactly as any other, also while it writes."""

import pytest
import torch

from llm_trainer.journal.journal import Journal, read_records
from llm_trainer.training.generation.noted import MAX_NOTED
from llm_trainer.training.save_and_stop import SaveAndStop
from support.preference_pairs import build_lora
from support.trainers import StopAfter
from support.written_completions import build_writing_trainer

SHORT = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
SEVERAL = {"num_iterations": 2, "steps_per_generation": 3}


class RequestAfter:
    """A wish to stop that comes after so many questions."""

    def __init__(self, num_questions: int) -> None:
        self.num_left = num_questions

    def is_made(self, checkpoint_seconds: float = 0.0) -> bool:
        self.num_left -= 1
        return self.num_left < 0

    def age_seconds(self) -> float:
        return 0.0


def read_trained(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def build(model, folder, run=None, **options):
    return build_writing_trainer("grpo", model, folder, build_lora(), run, seed=3, **SHORT, **options)


@pytest.mark.parametrize("options", [{}, SEVERAL, {"gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("step", [1, pytest.param(3, marks=pytest.mark.long)])
def test_a_resumed_run_ends_with_the_same_weights(tiny_model, tmp_path, options, step):
    whole = build(tiny_model, tmp_path / "whole", **options)
    whole.train()
    stopped = build(tiny_model, tmp_path / "stopped", **options)
    stopped.add_callback(StopAfter(step))
    stopped.train_from(None)
    resumed = build(tiny_model, tmp_path / "stopped", **options)
    resumed.train_from(tmp_path / "stopped" / f"checkpoint-{step}")
    assert resumed.num_tokens == whole.num_tokens
    torch.testing.assert_close(read_trained(resumed), read_trained(whole), rtol=0, atol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stop_while_the_model_writes_ends_the_step(tiny_model, tmp_path, accumulation):
    """The request comes with the 13th token of 8 a step: within the second step, which counts for nothing."""
    options = {"gradient_accumulation_steps": accumulation}
    whole = build(tiny_model, tmp_path / "whole", **options)
    whole.train()
    stopped = build(tiny_model, tmp_path / "stopped", run={"stop_request": RequestAfter(12)}, **options)
    stopped.add_callback(SaveAndStop(stopped, RequestAfter(10**9), has_interval=False))
    stopped.train_from(None)
    assert stopped.stopped
    assert stopped.state.global_step == 1
    resumed = build(tiny_model, tmp_path / "stopped", **options)
    resumed.train_from(tmp_path / "stopped" / "checkpoint-1")
    torch.testing.assert_close(read_trained(resumed), read_trained(whole), rtol=0, atol=0)


def test_an_evaluation_is_not_cut_where_nothing_would_catch_the_stop(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path, run={"stop_request": RequestAfter(0)})
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.evaluate()["eval_completions/mean_length"] > 1


def test_completions_of_a_step_are_noted(tiny_model, tmp_path):
    journal = Journal(tmp_path / "metrics.jsonl")
    build(tiny_model, tmp_path / "run", run={"journal": journal}).train()
    records = [record for record, _ in read_records(tmp_path / "metrics.jsonl") if record["kind"] == "completions"]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(len(record["completions"]) == MAX_NOTED for record in records)
    assert records[0]["completions"][0]["rewards"].keys() == {"count_letters"}


def test_the_reference_is_the_first_adapter_of_a_run_that_goes_on(tiny_model, tmp_path):
    trainer = build(tiny_model, tmp_path, run={"goes_on": True}, beta=0.1, logging_steps=1)
    trainer.train_from(None)
    assert next(line["kl"] for line in trainer.state.log_history if "kl" in line) == pytest.approx(0, abs=1e-6)
    assert not (tmp_path / "checkpoint-4" / "ref").exists()
