# SPDX-License-Identifier: Apache-2.0
"""An adapter of another base, or with other targets than asked for, is refused before any weights load."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import compute_sampled_digest
from llm_trainer.config.schema import Settings
from llm_trainer.job.earlier_adapter import take_over
from llm_trainer.model.adapter_fit import check_earlier_adapter
from llm_trainer.model.memory.shape import read_shape
from support.adapted_models import SIZES
from support.image_sweep import write_base


@pytest.fixture
def base(make_base):
    return make_base(LlamaConfig(**SIZES))


@pytest.fixture
def adapter(tmp_path, base):
    return save_adapter(tmp_path / "adapter", base)


def save_adapter(folder, base, **options):
    options = {"target_modules": ["q_proj", "v_proj"], "r": 6, **options}
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(folder)
    return folder


def check(adapter, base, **settings):
    given = Settings(**settings)
    taken = take_over(given.adapter, str(adapter))
    return check_earlier_adapter(str(base), AutoConfig.from_pretrained(base), given.model, taken)


def test_one_that_fits_is_told_and_counted_with_its_own_rank(base, adapter):
    assert check(adapter, base).startswith("Adapter: LoRA of rank 6 and alpha 8, as in ")
    given = Settings()
    taken = take_over(given.adapter, str(adapter))
    shape = read_shape(AutoConfig.from_pretrained(base), given.model, taken, torch.float32)
    assert shape.num_trained == 2 * 6 * ((64 + 64) + (64 + 32))  # layers x rank x (rows + columns) of q and v


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.[qv]_proj", "auto"], ids=str)
def test_targets_that_are_asked_for_in_other_words_are_no_others(base, adapter, targets):
    check(adapter, base, target_modules=targets)


def test_other_targets_are_refused(base, adapter):
    with pytest.raises(UserError, match=r"target_modules=\['q_proj'\]: the adapter in .* sits on others \(q_proj, v"):
        check(adapter, base, target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"target_parameters=\['o_proj.weight'\]: the adapter in .* other parameters"):
        check(adapter, base, target_parameters=["o_proj.weight"])


def test_the_output_layer_is_refused_before_weights_load(base, tmp_path):
    folder = save_adapter(tmp_path / "head", base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=r"lm_head is the output layer, .*: merge the adapter with `llm-trainer merge`"):
        check(folder, base)


def test_an_adapter_of_another_size_is_refused_with_its_first_tensor(base, adapter, make_base):
    shutil.rmtree(base)
    other = make_base(LlamaConfig(**{**SIZES, "hidden_size": 32}))
    with pytest.raises(UserError, match=r"has shape \[6, 64\], and the base needs \[6, 32\]: give the base that"):
        check(adapter, other)


def test_weights_of_the_base_in_the_adapters_file_are_refused(base, adapter):
    file = adapter / "adapter_model.safetensors"
    name = "base_model.model.model.norm.weight"
    save_file({**load_file(file), name: torch.ones(64)}, file)
    with pytest.raises(UserError, match=f"also holds {name}, a weight of the base itself: merge"):
        check(adapter, base)


def test_a_manifest_tells_another_base_of_the_same_shape(base, adapter):
    manifest = adapter / "training_manifest.json"
    manifest.write_text(json.dumps({"base_digest": compute_sampled_digest(base)}))
    check(adapter, base)
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"was trained on other weights than those of .*: give the base that it was"):
        check(adapter, base)
    manifest.unlink()
    check(adapter, base)


def test_dropout_that_is_asked_for_on_parameters_is_refused(base, tmp_path):
    folder = save_adapter(tmp_path / "experts", base, target_modules=[], target_parameters=["q_proj.weight"])
    check(folder, base)
    with pytest.raises(UserError, match="PEFT has no dropout there; set 0"):
        check(folder, base, lora_dropout=0.1)


@pytest.mark.parametrize(
    ("targets", "train_vision", "reason"),
    [
        (r".*(q_proj|v_proj)", False, "train_vision=false: the adapter in .* sits on the part that sees images, too"),
        (r".*(q_proj|v_proj)", True, None),
        (r".*text_model.*(q_proj|v_proj)", True, "train_vision=true: the adapter in .* does not sit on the part that"),
        (r".*text_model.*(q_proj|v_proj)", False, None),
    ],
)
def test_an_adapter_is_trained_where_it_sits(tmp_path, targets, train_vision, reason):
    model = write_base("smolvlm", tmp_path / "base")
    get_peft_model(model, LoraConfig(target_modules=targets)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=reason) if reason else nullcontext():
        check(tmp_path / "adapter", tmp_path / "base", train_vision=train_vision)
