# SPDX-License-Identifier: Apache-2.0
"""DPO: the loss of packed and padded pairs is that of TRL's own trainer, for every loss that it has."""

import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import METHOD_FIELDS
from llm_trainer.data.formats import IGNORED
from llm_trainer.training.methods import choose_method
from llm_trainer.training.packing import PackingCollator
from llm_trainer.training.trainer_config import TrainerParts, build_arguments, build_trainer
from support.trainers import build_run_context, collect_sources

LOSSES = METHOD_FIELDS["loss_type"]["dpo"].choices
OPTIONS = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}
NUM_PAIRS = 6


def build_pairs():
    """Return pairs of ids as TRL takes them."""
    draw = random.Random(0)
    lengths = [(draw.randint(1, 9), draw.randint(1, 12), draw.randint(1, 12)) for _ in range(NUM_PAIRS)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: [draw.randrange(5, 90) for _ in range(n)] for name, n in zip(names, row, strict=True)} for row in lengths
    ]


def join_pair(pair):
    """Return a pair as a row of ours."""
    prompt, chosen, rejected = pair.values()
    labels = [IGNORED] * len(prompt)
    ids = [*prompt, *chosen, *prompt, *rejected]
    lengths = [len(prompt) + len(chosen), len(prompt) + len(rejected)]
    return {
        "input_ids": ids,
        "labels": [*labels, *chosen, *labels, *rejected],
        "length": len(ids),
        "seq_lengths": lengths,
        "row": 0,
    }


def build_lora():
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


class TokenizedDPOTrainer(DPOTrainer):
    def _prepare_dataset(self, dataset, *args):
        return dataset


def build_trls(model, pairs, folder, **options):
    arguments = DPOConfig(str(folder), per_device_train_batch_size=NUM_PAIRS, report_to="none", bf16=False, **options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    torch.manual_seed(0)
    return TokenizedDPOTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        args=arguments,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=build_lora(),
    )


def build_ours(model, pairs, folder, collator, **settings):
    method = choose_method("dpo")
    sources = collect_sources(Settings(method="dpo", **settings), folder)
    arguments = build_arguments(method, sources, torch.device("cpu"), torch.float32)
    rows = Dataset.from_list([join_pair(pair) for pair in pairs])
    tokenizer, base = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    parts = TrainerParts(base, tokenizer, arguments, {"train": rows}, collator, build_lora())
    return build_trainer(method, parts, build_run_context(), patience=None)


def compute_step(trainer, rows):
    """Return the loss of a batch, its gradients, and the metrics."""
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trained = {name: each.grad for name, each in trainer.model.named_parameters() if each.requires_grad}
    return loss.detach(), trained


PACKINGS = {
    "stacked": PackingCollator(0, None, flattens=False),
    "padded": None,
}


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_loss_is_that_of_trls_own_trainer(tiny_model, tmp_path, loss_type, packing):
    pairs, options = build_pairs(), OPTIONS.get(loss_type, {})
    theirs = build_trls(tiny_model, pairs, tmp_path, loss_type=[loss_type], **options)
    ours = build_ours(tiny_model, pairs, tmp_path, PACKINGS[packing], loss_type=[loss_type], **options)
    adapter = {name: value for name, value in theirs.model.state_dict().items() if "lora_" in name}
    ours.model.load_state_dict(adapter, strict=False)
    loss, gradients = compute_step(ours, list(ours.train_dataset))
    expected, expected_gradients = compute_step(theirs, list(theirs.train_dataset))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)
