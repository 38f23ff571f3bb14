# SPDX-License-Identifier: Apache-2.0
"""Losses and accuracies are means over supervised tokens, computed here row by row with nothing but PyTorch."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, MixtralConfig

from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.training.batches.token_sums import begin_sums, sum_batch
from llm_trainer.training.packing import PackingCollator
from support.trainers import build_full_trainer, spawn_ranks
from support.waits import count_waits

NUM_RANKS = 2
VOCABULARY, TOKENS = 200, (3, 8)
TOLERANCE = 1e-6
ACCUMULATION = {"gradient_accumulation_steps": 3, "learning_rate": 1e-12, "logging_steps": 1}  # weights stay


def make_rows(num_rows, first_label=3):
    """Rows of 4 to 40 tokens, whose supervised tokens are few in some and many in others."""
    draw = torch.Generator().manual_seed(num_rows)
    rows = []
    for number in range(num_rows):
        length = int(torch.randint(4, 41, (1,), generator=draw))
        tokens = torch.randint(*TOKENS, (length,), generator=draw).tolist()
        first = first_label if number % 2 else min(length - 1, max(first_label, length - 2))
        rows.append({"input_ids": tokens, "labels": [IGNORED] * first + tokens[first:], "length": length})
    return Dataset.from_list(rows)


ROWS = make_rows(7)  # a multiple of no batch below


def sharpen(model):
    """Have a model of random weights be sure of one of TOKENS, so that losses of rows lie far apart."""
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight.mul_(40)
        weight[TOKENS[1] :] = 0
    return model


def load(tiny_model):
    return sharpen(AutoModelForCausalLM.from_pretrained(tiny_model)), AutoTokenizer.from_pretrained(tiny_model)


@torch.no_grad()
def measure(model, rows):
    """Return the mean loss and accuracy over all supervised tokens: the definition."""
    model.eval()
    losses, hits = [], []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        labels = torch.tensor(row["labels"][1:], dtype=torch.long)
        wanted = labels != IGNORED
        losses.append(cross_entropy(logits[wanted], labels[wanted], reduction="none"))
        hits.append(logits[wanted].argmax(-1) == labels[wanted])
    return torch.cat(losses).mean().item(), torch.cat(hits).double().mean().item()


def evaluate(tiny_model, folder, collator=None, rows=ROWS, **settings):
    trainer = build_full_trainer(*load(tiny_model), rows, collator, folder, rows, **settings)
    if trainer.is_fsdp_enabled:  # Accelerate shards a model together with its optimizer
        trainer.args.learning_rate, trainer.args.max_steps = ACCUMULATION["learning_rate"], 1
        trainer.train()
    return trainer.evaluate()


def assert_is_mean(metrics, expected):
    loss, accuracy = expected
    assert metrics["eval_loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=TOLERANCE)


COLLATORS = {"padded": None, "packed": PackingCollator(0, 64, flattens=False)}
SETTINGS = (
    {"per_device_eval_batch_size": 1},
    {"per_device_eval_batch_size": 4},
    {"per_device_eval_batch_size": 4, "dataloader_drop_last": True},
    {"per_device_eval_batch_size": 8, "dataloader_drop_last": True},  # more than there are rows
    {"per_device_eval_batch_size": 3, "label_smoothing_factor": 0.3},
    {"per_device_eval_batch_size": 3, "loss_type": "dft"},
)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
@pytest.mark.parametrize("collator", ["padded", "packed"])
def test_an_evaluation_is_a_mean_over_tokens_whatever_the_batches(tiny_model, tmp_path, collator, settings):
    metrics = evaluate(tiny_model, tmp_path, COLLATORS[collator], **settings)
    assert_is_mean(metrics, measure(load(tiny_model)[0], ROWS))


def record_batches(trainer):
    """Return the list to which every batch of rows goes that the trainer collates."""
    collate, batches = trainer.data_collator, []
    trainer.data_collator = lambda rows: batches.append(rows) or collate(rows)
    return batches


def train(tiny_model, folder, collator=None, model=None, **settings):
    """Train on steps of six rows, and at the end of the epoch one of a row. Return the trainer and its batches."""
    own, tokenizer = load(tiny_model)
    settings = {**ACCUMULATION, "per_device_train_batch_size": 2, "num_train_epochs": 1, **settings}
    trainer = build_full_trainer(model or own, tokenizer, make_rows(13, first_label=0), collator, folder, **settings)
    batches = record_batches(trainer)
    trainer.train()
    return trainer, batches


def read_lines(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_lines_are_means(lines, batches, batches_a_line, model):
    """Check each line of the training. `batches` are those of all ranks in the order of the steps."""
    assert len(lines) == -(-len(batches) // batches_a_line)
    num_tokens = 0
    for number, line in enumerate(lines):
        rows = [row for batch in batches[number * batches_a_line :][:batches_a_line] for row in batch]
        loss, accuracy = measure(model, rows)
        num_tokens += sum(len(row["input_ids"]) for row in rows if set(row["labels"]) != {IGNORED})
        assert line["loss"] == pytest.approx(loss, rel=TOLERANCE)
        assert line["mean_token_accuracy"] == pytest.approx(accuracy, rel=TOLERANCE)
        assert line["num_tokens"] == num_tokens


@pytest.mark.parametrize("collator", ["padded", "packed"])
def test_a_line_of_the_training_is_a_mean_over_its_tokens(tiny_model, tmp_path, collator):
    trainer, batches = train(tiny_model, tmp_path, COLLATORS[collator])
    assert len(batches) == 7
    assert_lines_are_means(read_lines(trainer), batches, 3, trainer.model)


def test_a_line_of_several_steps_is_a_mean_over_the_tokens_of_all(tiny_model, tmp_path):
    """The mean of the steps' means would count the last step's only row as much as six."""
    trainer, batches = train(tiny_model, tmp_path, logging_steps=3)
    assert_lines_are_means(read_lines(trainer), batches, 9, trainer.model)
    loss, _ = measure(trainer.model, [row for batch in batches for row in batch])
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(loss, rel=TOLERANCE)


def build_gpt2():
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    return GPT2LMHeadModel(config)


def build_unlike(tiny_model):
    """A model whose class, as Gemma 4's, takes no number of tokens for its own loss."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.accepts_loss_kwargs = False
    return model


@pytest.mark.parametrize("build", [build_gpt2, build_unlike])
def test_a_step_follows_the_mean_over_its_tokens_whatever_loss_the_models_class_has(tiny_model, tmp_path, build):
    model = sharpen(build(tiny_model) if build is build_unlike else build())
    trainer, batches = train(tiny_model, tmp_path, model=model, max_grad_norm=1e9)
    first, _, last = (line["grad_norm"] for line in read_lines(trainer))
    for norm, own_batches in ((first, batches[:3]), (last, batches[6:])):
        assert norm == pytest.approx(measure_gradient(model, [row for batch in own_batches for row in batch]), rel=1e-4)


def measure_gradient(model, rows):
    """Return the norm of the gradient of the mean loss over all supervised tokens."""
    model.zero_grad()
    losses, num_tokens = [], 0
    for row in rows:
        logits, labels = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1], torch.tensor(row["labels"])
        losses.append(cross_entropy(logits, labels[1:], reduction="sum", ignore_index=IGNORED))
        num_tokens += int((labels[1:] != IGNORED).sum())
    (sum(losses) / num_tokens).backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return torch.cat(gradients).norm().item()


def test_the_loss_that_balances_experts_is_told_apart(tiny_model, tmp_path):
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        router_aux_loss_coef=0.5,
        output_router_logits=True,
    )
    model, tokenizer = sharpen(AutoModelForCausalLM.from_config(config)), load(tiny_model)[1]
    settings = {**ACCUMULATION, "max_steps": 1, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    trainer = build_full_trainer(model, tokenizer, ROWS, None, tmp_path, ROWS, **settings)
    batches = record_batches(trainer)
    trainer.train()
    (line,) = read_lines(trainer)
    assert line["aux_loss"] > 0.1
    assert line["loss"] == pytest.approx(measure(model, [row for batch in batches[:3] for row in batch])[0], rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_aux_loss"] > 0.1
    assert metrics["eval_loss"] == pytest.approx(measure(model, ROWS)[0], rel=1e-5)


def make_outputs(log_probs):
    mask = torch.ones(1, len(log_probs), dtype=torch.bool)
    return SimpleNamespace(log_probs=torch.tensor([log_probs]), label_mask=mask, is_top1=mask, aux_loss=None)


def test_a_batch_that_is_no_number_counts_unless_the_filter_is_on():
    good, bad = make_outputs([-1.0, -2.0]), make_outputs([float("nan"), -2.0])
    tokens = torch.tensor(5)
    assert begin_sums(torch.device("cpu")).tolist() == [0, 0, 0, 0, 0, 0]
    assert sum_batch(good, tokens, skips_nan=True).tolist() == [2, 3, 2, 0, 5, 0]
    assert sum_batch(bad, tokens, skips_nan=True).tolist() == [0, 0, 0, 0, 5, 1]
    assert sum_batch(bad, tokens, skips_nan=False)[:4].isnan().any()


def test_a_line_of_an_epoch_has_all_its_metrics_after_an_evaluation_which_chooses_the_best(tiny_model, tmp_path):
    model, tokenizer = load(tiny_model)
    settings = {"logging_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    settings |= {"metric_for_best_model": "eval_loss", "per_device_eval_batch_size": 2}
    trainer = build_full_trainer(model, tokenizer, ROWS, None, tmp_path, ROWS, **settings)
    trainer.train()
    (line,) = read_lines(trainer)
    assert {"loss", "mean_token_accuracy", "num_tokens"} <= line.keys()
    assert trainer.state.best_metric == pytest.approx(measure(model, ROWS)[0], rel=TOLERANCE)


def test_a_stop_within_a_step_takes_its_tokens_back(tiny_model, tmp_path):
    trainer, batches = train(tiny_model, tmp_path)
    trainer.model.train()
    trainer.compute_loss(trainer.model, trainer.data_collator(batches[0]))
    trainer.note_step_begin()
    before = trainer.line_sums.tolist()
    trainer.compute_loss(trainer.model, trainer.data_collator(batches[1]))
    assert trainer.line_sums[0] > before[0] > 0
    trainer.return_to_last_step()
    assert trainer.line_sums.tolist() == before


SHARDED = SimpleNamespace(sharded=True, gradient_checkpointing=False, activation_offloading=False)


def work_as_rank(number, tiny_model, folder, memory_plan):
    """What a rank measures in evaluations, and which rows it trained on."""
    with pytest.MonkeyPatch.context() as variables:
        for name in ("RANK", "LOCAL_RANK"):
            variables.setenv(name, str(number))
        dist.init_process_group("gloo")
        evaluations = [
            evaluate(tiny_model, folder, COLLATORS[name], rows, memory_plan=memory_plan, **settings)
            for name, rows, settings in list_evaluations(memory_plan)
        ]
        trainer, batches = train(tiny_model, folder, memory_plan=memory_plan)
        results = {"evaluations": evaluations, "batches": batches, "lines": read_lines(trainer)}
        if memory_plan is None:
            results["waits"] = {name: count_steps_waits(tiny_model, folder, COLLATORS[name]) for name in COLLATORS}
        (folder / f"{number}.json").write_text(json.dumps(results))
        dist.destroy_process_group()


def count_steps_waits(tiny_model, folder, collator):
    """What a rank waits for within two steps of four batches in all."""
    with count_waits() as waits:
        train(tiny_model, folder, collator)
    return waits.found


def list_evaluations(memory_plan):
    """Yield collator, rows and settings of each evaluation by ranks. The second set has fewer rows than ranks."""
    yield "packed", ROWS, SETTINGS[1]
    yield "padded", ROWS.select([0]), SETTINGS[0]
    if memory_plan is None:
        yield from ((name, ROWS, settings) for name in COLLATORS for settings in SETTINGS[:3])


@pytest.mark.long
@pytest.mark.parametrize("memory_plan", [None, SHARDED], ids=["ddp", "fsdp"])
def test_ranks_measure_what_one_process_would(tiny_model, tmp_path, monkeypatch, memory_plan):
    spawn_ranks(work_as_rank, (tiny_model, tmp_path, memory_plan), NUM_RANKS, monkeypatch)
    ranks = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(NUM_RANKS)]
    model = load(tiny_model)[0]
    for number, (_, rows, _) in enumerate(list_evaluations(memory_plan)):
        expected = measure(model, rows)
        for rank in ranks:
            assert_is_mean(rank["evaluations"][number], expected)
    # Of 13 rows in batches of two each rank has four batches, and three a step.
    batches = [batch for step in (slice(0, 3), slice(3, 4)) for rank in ranks for batch in rank["batches"][step]]
    assert len(batches) == 8
    trained = sorted(row["input_ids"] for batch in batches for row in batch if set(row["labels"]) != {IGNORED})
    assert trained == sorted(make_rows(13, first_label=0)["input_ids"][:])  # each once
    assert_lines_are_means(ranks[0]["lines"], batches, 6, model)
    if memory_plan is None:  # no number is read, and a step asks all ranks for its tokens and for its gradients
        own = {"all_gather": 2, "all_reduce": 2}
        assert [rank["waits"] for rank in ranks] == [{"padded": own, "packed": own}] * NUM_RANKS
