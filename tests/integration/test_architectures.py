# SPDX-License-Identifier: Apache-2.0
"""Every causal language model of the pinned Transformers is refused before its first step, or trains."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, MambaConfig

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.export.logits_check import compute_logits
from llm_trainer.merge.merge import write_merged_model
from llm_trainer.merge.plan import MergeRequest
from llm_trainer.model.device import find_device
from llm_trainer.model.loading import load_model
from llm_trainer.model.lora_init import BaseReference, save_adapter
from llm_trainer.model.memory.fit import choose_memory_plan
from llm_trainer.model.memory.scenario import MemoryScenario, MemorySettings, Target
from llm_trainer.model.plan import PlanSettings, plan_model
from llm_trainer.model.precision import choose_precision
from llm_trainer.training.loss_check import check_loss
from llm_trainer.training.methods import choose_method
from llm_trainer.training.trainer_config import TrainerParts, build_arguments, build_trainer
from support.tiny_architectures import VOCABULARY, build_tiny_config, list_model_types
from support.tiny_model import build_tokenizer
from support.trainers import build_run_context, collect_sources

pytestmark = pytest.mark.long

LARGEST_MODEL = 20_000_000  # numbers; what a class does not let itself be shrunk below is left out
CPU = find_device(use_cpu=True)


def write_base(model_type, folder):
    """Write a model of random weights with the tests' tokenizer, or skip the test where its class cannot be shrunk."""
    try:
        config = build_tiny_config(model_type)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
        if size > LARGEST_MODEL:
            pytest.skip(f"{size:,} weights")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        fill_zeros(model)
        model(input_ids=torch.arange(3, 11)[None], use_cache=False)
    except Exception as error:
        pytest.skip(f"no tiny config: {error!r}")
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def fill_zeros(model):
    """Fill weights that begin at zero, such as xLSTM's gates: what they multiply would learn from step 3 on."""
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)


def train_two_steps(plan, settings, memory, folder):
    rows = [{"input_ids": list(range(5 + n, 17 + n)), "labels": list(range(5 + n, 17 + n))} for n in range(8)]
    base = load_model(plan.folder, settings.model, plan.load_options, CPU.torch)
    arguments = build_arguments(
        choose_method(), collect_sources(settings, folder), CPU.torch, plan.precision.compute, memory
    )
    parts = TrainerParts(base, build_tokenizer(), arguments, {"train": Dataset.from_list(rows)}, None, plan.lora)
    trainer = build_trainer(choose_method(), parts, build_run_context(), patience=None)
    check_loss(trainer.model, VOCABULARY, CPU.torch, plan.precision.compute)
    trained = {
        name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad
    }
    trainer.train_from(None)
    unmoved = [name for name in trained if torch.equal(trained[name], trainer.model.get_parameter(name))]
    return trainer.model, unmoved


@pytest.mark.parametrize("model_type", list_model_types())
def test_an_architecture_is_refused_before_it_starts_or_trains(model_type, tmp_path):
    write_base(model_type, tmp_path / "base")
    settings = Settings(max_steps=2, per_device_train_batch_size=2, max_length=32, use_cpu=True)
    precision = choose_precision(settings.model, settings.adapter, CPU)
    sections = PlanSettings(settings.model, settings.adapter, settings.parallelism, settings.output)
    parts = (settings.model, settings.adapter, settings.data, settings.training, settings.parallelism)
    try:
        plan = plan_model(str(tmp_path / "base"), sections, CPU, precision)
        scenario = MemoryScenario(plan.config, MemorySettings(*parts), 16, Target(CPU, 1, 2**40), plan.attention.name)
        model, unmoved = train_two_steps(plan, settings, choose_memory_plan(scenario), tmp_path / "checkpoints")
    except UserError as error:
        assert str(error).endswith((".", ")"))
        return
    assert not [name for name in unmoved if ".experts." not in name]  # an expert that no token goes to stays
    rows = [list(range(3, 15))]
    expected = compute_logits(model, rows, CPU.torch)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", BaseReference(str(tmp_path / "base"), None), None)
    base = load_model(plan.folder, settings.model, plan.load_options, CPU.torch)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(compute_logits(adapted, rows, CPU.torch), expected, rtol=1e-3, atol=1e-4)
    request = MergeRequest(tmp_path / "base", tmp_path / "adapter", plan.config, precision.compute)
    write_merged_model(request, tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"), settings.model, plan.load_options, CPU.torch)
    torch.testing.assert_close(compute_logits(merged, rows, CPU.torch), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use_peft", ["true", "false"])
def test_a_job_trains_mamba_and_proves_what_it_exports(tree, use_peft):
    folder = tree.base_dir / "input/data/model"
    shutil.rmtree(folder)
    tokenizer = build_tokenizer()
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tree.change(use_peft=use_peft, merge_weights=use_peft, max_steps="2")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    checks = tree.manifest["export"]["checks"]
    assert [check["what"] for check in checks][-1] == (
        "The merged model" if use_peft == "true" else "The exported model"
    )
    assert json.loads((tree.base_dir / "model/config.json").read_text())["model_type"] == "mamba"
