# SPDX-License-Identifier: Apache-2.0
"""A model's shape, told from its config, agrees with the real model, and with what is published of large ones."""

import bitsandbytes.functional
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GptOssConfig, LlamaConfig, Qwen3Config
from trl import SFTConfig, SFTTrainer

from llm_trainer.config.schema import Settings
from llm_trainer.model import lora
from llm_trainer.model.layers.float8 import Float8Linear
from llm_trainer.model.memory.shape import UnknownShapeError, find_layer_list, read_shape
from support.packed_models import LEAK
from support.tiny_model import build_tokenizer

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
QWEN3_600M = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
GPT_OSS_20B = {"num_hidden_layers": 24, "num_local_experts": 32}  # the rest are the defaults of its config


def shape_of(config, settings, dtype):
    return read_shape(config, settings.model, settings.adapter, dtype)


@pytest.mark.parametrize(
    ("config", "num_weights"),
    [
        (LlamaConfig(**LLAMA, **LLAMA_8B), 8_030_261_248),
        (LlamaConfig(**LLAMA, **LLAMA_70B), 70_553_706_496),
        (Qwen3Config(**QWEN3_600M), 596_049_920),
        (GptOssConfig(**GPT_OSS_20B), 20_914_757_184),
    ],
    ids=["Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-0.6B", "gpt-oss-20b"],
)
def test_published_sizes(config, num_weights):
    shape = shape_of(config, Settings(lora_dropout=0.0), torch.bfloat16)
    assert shape.count_weights() - shape.count_weights("adapter") == num_weights
    assert shape.num_layers == config.num_hidden_layers
    assert shape.num_trained == shape.count_weights("adapter") > 0


def test_llama_8b_in_4_bit():
    shape = shape_of(LlamaConfig(**LLAMA, **LLAMA_8B), Settings(load_in_4bit=True), torch.bfloat16)
    assert shape.count_weights("linear") == 6_979_321_856
    assert shape.count_weights("embeddings") == shape.count_weights("output") == 128256 * 4096
    assert shape.num_trained == 20_971_520  # rank 8 on all seven matrices, as PEFT's papers and posts have it
    base_bytes = shape.count_bytes() - shape.count_bytes("adapter")
    assert base_bytes / 2**30 == pytest.approx(5.31, abs=0.05)


def test_gpt_oss_is_mostly_experts_which_are_not_quantized():
    config = GptOssConfig(**GPT_OSS_20B, quantization_config={"quant_method": "mxfp4"})
    shape = shape_of(config, Settings(lora_dropout=0.0), torch.bfloat16)
    assert shape.is_mxfp4
    assert shape.count_weights("experts") == 24 * 32 * 3 * 2880 * 2880
    assert shape.count_bytes() / 1e9 == pytest.approx(42, abs=1)


@pytest.mark.parametrize("is_nested", [True, False])
def test_4_bit_takes_what_bitsandbytes_makes_of_a_matrix(is_nested):
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    settings = Settings(load_in_4bit=True, bnb_4bit_use_double_quant=is_nested)
    part = max(shape_of(config, settings, torch.float32).parts, key=lambda part: part.num_weights)
    packed, state = bitsandbytes.functional.quantize_4bit(
        torch.ones(512, 256), quant_type="nf4", compress_statistics=is_nested
    )
    scales_bytes = state.absmax.nbytes + (state.state2.absmax.nbytes if is_nested else 0)
    assert (part.data_bytes, part.scales_bytes) == (packed.nbytes, scales_bytes)


def test_float8_takes_what_a_layer_keeps():
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    part = max(shape_of(config, Settings(base_compute="fp8"), torch.bfloat16).parts, key=lambda part: part.num_weights)
    layer = Float8Linear(nn.Linear(256, 512, bias=False))
    scales_bytes = layer.scales.nbytes + layer.turned_scales.nbytes
    assert (part.data_bytes, part.scales_bytes) == (layer.weight.nbytes + layer.turned.nbytes, scales_bytes)


@pytest.mark.parametrize("options", [{}, {"use_peft": False}, {"target_modules": ["q_proj"], "lora_r": 4}])
def test_it_agrees_with_the_trainers_model(tiny_model, tmp_path, options):
    settings = Settings(**options)
    shape = shape_of(AutoConfig.from_pretrained(tiny_model), settings, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(str(tmp_path), use_cpu=True, report_to="none", bf16=False),
        train_dataset=Dataset.from_list([{"text": "a"}]),
        processing_class=build_tokenizer(),
        peft_config=lora.build_lora_config(settings.model, settings.adapter, model)
        if settings.adapter.use_peft
        else None,
    )
    parameters = list(trainer.model.parameters())
    assert shape.count_bytes() == sum(parameter.nbytes for parameter in parameters)
    assert shape.trained_bytes == sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)


def test_layers_of_each_kind_stay_in_the_skeleton():
    config = GptOssConfig(num_hidden_layers=6, hidden_size=64, intermediate_size=64, num_local_experts=2)
    shape = shape_of(config, Settings(lora_dropout=0.0), torch.float32)
    assert shape.kinds == (0, 1, 2, 1, 2, 3)
    assert len(shape.skeleton.get_submodule(shape.layers_name)) == 4
    assert config.num_hidden_layers == 6  # the caller's is left as it is


def test_a_model_without_a_list_of_its_layers_is_not_known():
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnknownShapeError, match="no list of the 3 layers"):
        find_layer_list(model, 3)


def test_a_hybrid_whose_kinds_of_layers_follow_from_other_numbers_keeps_all_its_layers():
    shape = shape_of(LEAK["jamba"], Settings(), torch.float32)
    assert shape.kinds == (0, 1)
    assert shape.count_weights("adapter") == shape.num_trained > 0
