# SPDX-License-Identifier: Apache-2.0
"""Distillation: the loss of packed and padded answers is that of TRL's own trainer."""

import random

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer
from trl.kernels import chunked_divergence

from llm_trainer.common.metric_definitions import list_metrics
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.model.memory.step_trace import HeldBytes
from llm_trainer.training.batches.batch_facts import PLACES
from llm_trainer.training.batches.whole_batches import fill_batches
from llm_trainer.training.methods.distill import DISTILL
from llm_trainer.training.packing import PackingCollator
from support.preference_pairs import build_lora, build_pair_trainer

NUM_ROWS = 6
PAD = 0
PACKINGS = {"stacked": PackingCollator(PAD, None, flattens=False), "padded": None}
LOSSES = {"student's": {}, "teacher's": {"beta": 0.0}, "between, warm": {"beta": 0.5, "temperature": 2.0}}


def build_answers(seed=0):
    """Return prompts with answers, in ids."""
    draw = random.Random(seed)
    sizes = [(draw.randint(1, 9), draw.randint(1, 12)) for _ in range(NUM_ROWS)]
    return [tuple([draw.randrange(5, 90) for _ in range(size)] for size in pair) for pair in sizes]


def build_rows():
    """Return the same as rows of ours."""
    rows = [
        {"input_ids": [*prompt, *answer], "labels": [*[IGNORED] * len(prompt), *answer]}
        for prompt, answer in build_answers()
    ]
    return Dataset.from_list([{**row, "length": len(row["input_ids"])} for row in rows])


def build_teacher(model):
    """Return a model like the student, with other weights."""
    teacher = AutoModelForCausalLM.from_pretrained(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return teacher


def build_trls(model, folder, lora, **options):
    arguments = DistillationConfig(str(folder), per_device_train_batch_size=2, report_to="none", bf16=False, **options)
    return DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        build_teacher(model),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 2),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora,
    )


def build_ours(model, folder, packing="stacked", lora=None, **options):
    run = {"teacher": build_teacher(model)}
    return build_pair_trainer(model, build_rows(), folder, PACKINGS[packing], lora, run, method="distill", **options)


def build_trls_batch(trainer):
    """Return the answers as TRL's trainer has them once its student has written them: prompts padded at the left."""
    prompts, answers = zip(*build_answers(), strict=True)
    width, length = max(map(len, prompts)), max(map(len, answers))
    batch = {
        "prompt_ids": [[PAD] * (width - len(ids)) + ids for ids in prompts],
        "prompt_mask": [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts],
        "completion_ids": [ids + [PAD] * (length - len(ids)) for ids in answers],
        "completion_mask": [[1] * len(ids) + [0] * (length - len(ids)) for ids in answers],
    }
    return {name: torch.tensor(values) for name, values in batch.items()} | {
        "num_items_in_batch": torch.tensor(sum(map(len, answers)))
    }


def read_gradients(trainer):
    return {name: each.grad for name, each in trainer.model.named_parameters() if each.requires_grad}


def compute_step(trainer, rows=None, num_items=None):
    """Return the loss of rows, all unless they are given, and its gradients."""
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows or trainer.train_dataset)))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items)
    loss.backward()
    return loss.detach(), read_gradients(trainer)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_trls_own_trainer(tiny_model, tmp_path, loss, packing, lora):
    theirs = build_trls(tiny_model, tmp_path, build_lora() if lora else None, **LOSSES[loss])
    ours = build_ours(tiny_model, tmp_path, packing, build_lora() if lora else None, **LOSSES[loss])
    state = theirs.model.state_dict()
    ours.model.load_state_dict({name: value for name, value in state.items() if "lora_" in name}, strict=False)
    theirs.model.train()
    expected = theirs.compute_loss(theirs.model, build_trls_batch(theirs))
    expected.backward()
    found, gradients = compute_step(ours, num_items=ours.count_items(ours.data_collator(list(ours.train_dataset))))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, read_gradients(theirs), rtol=1e-5, atol=1e-5)
    assert found > 0.01
    means = ours.line_sums.means
    assert means["entropy"] == pytest.approx(theirs._metrics["train"]["entropy"][-1], rel=1e-5)
    assert means["loss"] == pytest.approx(found.item(), rel=1e-5)
    assert ours.line_sums.num_tokens == sum(ours.train_dataset["length"])


def measure_peak(trainer, batch):
    """Return the bytes that a step of this batch holds at its peak, beside the models."""
    weights = [*trainer.model.parameters(), *trainer.model.buffers(), *trainer.teacher_model.parameters()]
    trainer.model.train()
    with HeldBytes([*weights, *trainer.teacher_model.buffers()], "step") as held:
        trainer.compute_loss(trainer.model, batch).backward()
        held.begin("over")
    return held.spans["step"].peak


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_step_holds_no_more_than_trls(tiny_model, tmp_path, packing, monkeypatch):
    monkeypatch.setattr(chunked_divergence, "VOCAB_CHUNK_SIZE", 256)  # else a piece of logits hides all else
    theirs, ours = build_trls(tiny_model, tmp_path, None), build_ours(tiny_model, tmp_path, packing)
    own = ours._prepare_inputs(ours.data_collator(list(ours.train_dataset)))
    assert measure_peak(ours, own) < measure_peak(theirs, build_trls_batch(theirs))


def test_the_teacher_learns_nothing(tiny_model, tmp_path):
    ours = build_ours(tiny_model, tmp_path)
    before = {name: value.clone() for name, value in ours.teacher_model.state_dict().items()}
    ours.train()
    assert not ours.teacher_model.training
    torch.testing.assert_close(ours.teacher_model.state_dict(), before, rtol=0, atol=0)
    assert all(weight.grad is None for weight in ours.teacher_model.parameters())


def test_a_teacher_that_is_the_student_has_nothing_to_say(tiny_model, tmp_path):
    run = {"teacher": AutoModelForCausalLM.from_pretrained(tiny_model)}
    ours = build_pair_trainer(tiny_model, build_rows(), tmp_path, run=run, method="distill")
    assert compute_step(ours)[0].item() == pytest.approx(0, abs=1e-6)


def test_means_are_over_tokens_however_rows_are_cut(tiny_model, tmp_path):
    """Batches of two, one of them of rows that only fill a rank's."""
    ours = build_ours(tiny_model, tmp_path, lora=build_lora())
    rows = list(fill_batches(ours.train_dataset, 8))
    num_items = ours._get_num_items_in_batch([ours.data_collator(rows)], torch.device("cpu"))
    whole, gradients = compute_step(ours, rows, num_items)
    gradients = {name: value.clone() for name, value in gradients.items()}
    sums, ours.line_sums = ours.line_sums, type(ours.line_sums)()
    ours.model.zero_grad()
    parts = [compute_step(ours, rows[place : place + 2], num_items)[0] for place in range(0, 8, 2)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(read_gradients(ours), gradients, rtol=1e-5, atol=1e-6)
    assert parts[-1] == 0
    assert ours.line_sums.means == pytest.approx(sums.means, rel=1e-5)
    assert ours.line_sums.num_tokens == sums.num_tokens


def test_an_evaluation_has_the_loss_of_all_tokens(tiny_model, tmp_path):
    ours = build_ours(tiny_model, tmp_path, per_device_eval_batch_size=2)
    ours.eval_dataset = ours.train_dataset
    found = ours.evaluate()
    batch = ours.data_collator(list(ours.train_dataset))
    assert found["eval_loss"] == pytest.approx(compute_step(ours)[0].item(), rel=1e-5)
    assert len(batch[PLACES]) == sum(len(answer) for _, answer in build_answers())
    told = {*list_metrics("distill"), "eval_model_preparation_time"}
    assert {name for name in found if name.startswith("eval_")} <= told


def test_lines_have_the_metrics_that_are_told_of(tiny_model, tmp_path):
    ours = build_ours(tiny_model, tmp_path, logging_steps=1)
    ours.train()
    renamed = {DISTILL.metric_names.get(name, name) for name in ours.state.log_history[0]}
    assert renamed - {*DISTILL.hidden_metrics} <= {*list_metrics("distill")}
