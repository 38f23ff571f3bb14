# SPDX-License-Identifier: Apache-2.0
"""GRPO and RLOO: a step's loss and gradients are those of TRL's own trainer with the same seed and rewards."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from llm_trainer.common.metric_definitions import define_metrics, list_metrics
from llm_trainer.training.methods import choose_method
from support.preference_pairs import build_lora
from support.written_completions import PROMPTS, build_writing_trainer, count_letters

TRLS = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}
OPTIONS = [
    ("grpo", {}),
    ("grpo", {"beta": 0.1, "loss_type": "grpo", "scale_rewards": "batch"}),
    ("grpo", {"loss_type": "cispo", "num_iterations": 2, "temperature": 0.7}),
    ("rloo", {}),
    ("rloo", {"normalize_advantages": True, "beta": 0.0}),
]


def build_trls(method, model, folder, lora, **options):
    config, trainer = TRLS[method]
    arguments = config(
        str(folder),
        per_device_train_batch_size=12,
        num_generations=4,
        max_completion_length=8,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    return trainer(
        AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=count_letters,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=lora,
    )


def compute_step(trainer):
    """Return the loss of the first batch, its gradients, and TRL's metrics."""
    set_seed(7)
    if hasattr(trainer, "seed_order"):
        trainer.seed_order(0)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    set_seed(7)
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    gradients = {name: each.grad for name, each in trainer.model.named_parameters() if each.requires_grad}
    return loss.detach(), gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(("method", "options"), OPTIONS, ids=str)
def test_a_step_is_that_of_trls_own_trainer(tiny_model, tmp_path, method, options):
    lora = build_lora()
    theirs = build_trls(method, tiny_model, tmp_path, copy.deepcopy(lora), **options)
    ours = build_writing_trainer(method, tiny_model, tmp_path, lora, **options)
    adapter = {name: value for name, value in theirs.model.state_dict().items() if "lora_" in name}
    ours.model.load_state_dict(adapter, strict=False)
    (found, gradients, metrics), (expected, their_gradients, trls) = compute_step(ours), compute_step(theirs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, their_gradients, rtol=1e-5, atol=1e-5)
    assert metrics == pytest.approx(trls, rel=1e-4, abs=1e-4, nan_ok=True)
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("method", TRLS)
def test_its_metrics_can_be_defined(method):
    assert {"reward", "eval_reward", "kl"} <= list_metrics(method).keys()
    assert len(define_metrics(method)) <= 40
    assert choose_method(method).best_metric in list_metrics(method)
