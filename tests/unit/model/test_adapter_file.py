# SPDX-License-Identifier: Apache-2.0
"""An adapter goes on as it was saved, of whatever kind it is, and one that cannot be trained is refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm_trainer.common.errors import UserError
from llm_trainer.config.schema import Settings
from llm_trainer.job.earlier_adapter import take_over
from llm_trainer.model.adapter_file import build_trained_config, check_names, load_trained_values
from llm_trainer.model.loading import build_on_meta
from llm_trainer.model.lora import build_lora_config
from support import tiny_architectures, tiny_image_models
from support.adapted_models import LLAMA, TOKENS

TARGETS = ["q_proj", "v_proj"]


def build_base():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(LLAMA)).eval()  # PEFT changes a config


def save_adapter(folder, **options):
    """Save an adapter of random values, and return the adapted model."""
    options = {"target_modules": TARGETS, "r": 3, "lora_alpha": 5, **options}
    model = get_peft_model(build_base(), LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model


def go_on(folder, **settings):
    """Return the base with an adapter that goes on from the one of a folder."""
    adapter = take_over(Settings(**settings).adapter, str(folder))
    model = get_peft_model(build_base(), build_trained_config(adapter)).eval()
    load_trained_values(model, adapter)
    return model


KINDS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    {"bias": "all"},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    {"target_modules": r".*\.(q|k)_proj", "layers_to_transform": None},
    {"layers_to_transform": [1]},
    {"init_lora_weights": "gaussian"},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_same_weights_are_trained_on_from_the_same_values(tmp_path, options):
    saved = save_adapter(tmp_path, **options)
    model = go_on(tmp_path)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    expected = {name: weight for name, weight in saved.named_parameters() if weight.requires_grad}
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, saved(input_ids=TOKENS).logits)


def test_dropout_is_the_settings_and_none_on_parameters(tmp_path):
    save_adapter(tmp_path / "modules", lora_dropout=0.3)
    save_adapter(tmp_path / "parameters", target_modules=[], target_parameters=["q_proj.weight"])
    for name, given, expected in (("modules", {}, 0.3), ("modules", {"lora_dropout": 0.5}, 0.5), ("parameters", {}, 0)):
        adapter = take_over(Settings(**given).adapter, str(tmp_path / name))
        assert build_trained_config(adapter).lora_dropout == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa and belongs to a base that this changed"),
        ({"trainable_token_indices": [1]}, r"has trainable_token_indices=\[1\], which is not trained here: merge it"),
        ({"layer_replication": [[0, 2], [0, 2]]}, r"has layer_replication=.*, which is not trained here: merge it"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_an_adapter_of_another_kind_is_refused(tmp_path, options, words):
    save_adapter(tmp_path, **options)
    with pytest.raises(UserError, match=words):
        go_on(tmp_path)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_tensors_that_differ_are_never_passed_over(tmp_path, change):
    save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors[name.replace("q_proj", "k_proj")] = tensors[name].clone()
    else:
        tensors[name] = tensors[name][:, 1:].contiguous()
    save_file(tensors, file)
    with pytest.raises(UserError, match="does not fit the model: "):
        go_on(tmp_path)


def check_written_names(config, **options):
    settings, skeleton = Settings(**options), build_on_meta(config, None, trust_remote_code=False)
    lora = build_lora_config(settings.model, settings.adapter, skeleton)
    names = [name for name, _ in skeleton.named_parameters()]
    check_names(lora, settings.adapter, skeleton)
    assert [name for name, _ in skeleton.named_parameters()] == names


def test_an_adapter_whose_weights_would_get_other_names_is_refused():
    laguna = tiny_architectures.build_tiny_config("laguna")
    with pytest.raises(UserError, match=r"'auto': PEFT would read 6 of the 36 weights .* set use_peft=false"):
        check_written_names(laguna)
    check_written_names(laguna, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    "options",
    [
        {"train_vision": True},
        {"train_vision": True, "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_an_adapter_that_is_read_as_it_was_written_is_taken(options):
    check_written_names(tiny_image_models.build_tiny_config("qwen2_5_vl"), **options)
