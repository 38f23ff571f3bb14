# SPDX-License-Identifier: Apache-2.0
"""A result's config.json is the base's with what changed, and each version of Transformers finds its own words in it.

tests/compatibility has Transformers 4 itself read them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from llm_trainer.model.config_file import add_stop_tokens, drop_contradictions, write_config, write_generation_config

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OLD_LLAMA: dict[str, Any] = {
    **SIZES,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "a_field_of_the_makers": {"kept": True},
}
LAYER_TYPES = ["sliding_attention", "full_attention"]


def write_base(folder: Path, config: dict[str, Any]) -> PreTrainedConfig:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return AutoConfig.from_pretrained(folder)


def write_result(folder: Path, base: Path, config: PreTrainedConfig) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    write_config(folder, base, config)
    written: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return written


def test_what_the_training_left_stays_as_the_base_has_it(tmp_path):
    config = write_base(tmp_path, OLD_LLAMA)
    config.dtype, config.pad_token_id = torch.float32, 7
    written = write_result(tmp_path / "result", tmp_path, config)
    assert written == {**OLD_LLAMA, "dtype": "float32", "torch_dtype": "float32", "pad_token_id": 7}


def test_a_base_that_transformers_5_wrote_gets_the_older_words(tmp_path):
    config = write_base(tmp_path, OLD_LLAMA)
    config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert "rope_theta" not in stored
    written = write_result(tmp_path / "result", tmp_path, config)
    assert (written["rope_theta"], written["rope_scaling"]) == (500000.0, LLAMA3)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["rope_parameters"] == {**LLAMA3, "rope_theta": 500000.0}
    assert AutoConfig.from_pretrained(tmp_path / "result").rope_parameters == config.rope_parameters


def test_a_rope_that_the_job_set_replaces_the_bases_in_all_words(tmp_path):
    """As `model_init_kwargs` does: the base's own words would undo it for Transformers 4."""
    write_base(tmp_path, OLD_LLAMA)
    changed = AutoConfig.from_pretrained(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    written = write_result(tmp_path / "result", tmp_path, changed)
    assert (written["rope_theta"], written["rope_scaling"]) == (20000.0, None)
    assert AutoConfig.from_pretrained(tmp_path / "result").rope_parameters == changed.rope_parameters


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (
            {
                "model_type": "gemma3_text",
                "layer_types": LAYER_TYPES,
                "rope_theta": 1e6,
                "rope_local_base_freq": 2e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            ("rope_theta", "rope_local_base_freq", "rope_scaling"),
        ),
        ({"model_type": "olmo3", "layer_types": LAYER_TYPES, "rope_theta": 5e5}, ("rope_theta",)),
        ({"model_type": "gpt_neox", "rotary_emb_base": 5e4, "rotary_pct": 0.5}, ("rotary_emb_base", "rotary_pct")),
        (
            {"model_type": "phi3", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
            ("rope_theta", "partial_rotary_factor"),
        ),
        ({"model_type": "qwen3", "rope_theta": 1e6}, ("rope_theta",)),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_each_family_has_its_older_words(tmp_path, given, names):
    config = write_base(tmp_path, {**SIZES, **given})
    config.save_pretrained(tmp_path)
    written = write_result(tmp_path / "result", tmp_path, config)
    assert {name: written[name] for name in names} == {name: given[name] for name in names}
    assert AutoConfig.from_pretrained(tmp_path / "result").rope_parameters == config.rope_parameters


def test_the_language_model_inside_another_gets_them_too(tmp_path):
    text = {**SIZES, "model_type": "gemma3_text", "layer_types": LAYER_TYPES, "torch_dtype": "bfloat16"}
    config = write_base(tmp_path, {"model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16"})
    config.save_pretrained(tmp_path)
    written = write_result(tmp_path / "result", tmp_path, config)["text_config"]
    assert (written["rope_theta"], written["rope_local_base_freq"]) == (1e6, 1e4)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


def test_the_form_of_a_quantized_base_is_not_the_results(tmp_path):
    config = write_base(tmp_path, {**OLD_LLAMA, "quantization_config": {"quant_method": "fp8"}})
    del config.quantization_config
    assert "quantization_config" not in write_result(tmp_path / "result", tmp_path, config)


def test_the_generation_config_is_the_bases_with_what_changed(tmp_path):
    stored = {"eos_token_id": [2, 1], "temperature": 0.6, "do_sample": True, "transformers_version": "4.43.0"}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored), encoding="utf-8")
    result = GenerationConfig.from_pretrained(tmp_path)
    result.pad_token_id = 5
    folder = tmp_path / "result"
    folder.mkdir()
    write_generation_config(folder, tmp_path, result)
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8")) == {**stored, "pad_token_id": 5}


@pytest.mark.parametrize("eos", [0, [0], [0, 7], None])
def test_stop_tokens_are_added_to_what_the_base_names(tmp_path, eos):
    base, folder = tmp_path, tmp_path / "result"
    folder.mkdir()
    values = {"eos_token_id": eos, "temperature": 0.6, "do_sample": False}  # Transformers would not write it
    (base / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    known = eos if isinstance(eos, list) else [] if eos is None else [eos]
    missing = [token for token in (0, 2) if token not in known]
    assert add_stop_tokens(folder, base, [0, 2, 2]) == missing
    written = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert written == {**values, "eos_token_id": [*known, *missing]}
    assert add_stop_tokens(folder, base, [2, 0]) == []


def test_a_base_without_a_generation_config_stops_at_its_configs_token_too(tmp_path):
    folder = tmp_path / "result"
    folder.mkdir()
    for config in ({"eos_token_id": 1}, {"text_config": {"eos_token_id": 1}}):
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert add_stop_tokens(folder, tmp_path, [1]) == []
        assert not (folder / "generation_config.json").exists()
    assert add_stop_tokens(folder, tmp_path, [2]) == [2]
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}


@pytest.mark.parametrize(
    ("values", "dropped"),
    [
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "do_sample": False}, ["temperature", "top_k", "top_p"]),
        ({"temperature": 0.7, "top_p": 0.9, "do_sample": True}, []),
        *(({name: 0.1}, [name]) for name in ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")),
        ({"early_stopping": True, "length_penalty": 2.0}, ["early_stopping", "length_penalty"]),
        ({"early_stopping": True, "length_penalty": 2.0, "num_beams": 4, "num_return_sequences": 4}, []),
        ({"use_cache": False, "cache_implementation": "static"}, ["cache_implementation"]),
        ({"output_scores": True, "output_logits": True}, ["output_logits", "output_scores"]),
        ({"pad_token_id": -1}, ["pad_token_id"]),
        ({}, []),
    ],
)
def test_a_generation_config_that_contradicts_itself_can_be_written_again(tmp_path, values, dropped):
    stored = {"eos_token_id": [0, 2], "repetition_penalty": 1.1, **values}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored), encoding="utf-8")
    config = GenerationConfig.from_pretrained(tmp_path)
    assert drop_contradictions(config) == dropped
    config.bos_token_id = 5  # a change, such as a training's: Transformers writes only what it calls valid now
    config.save_pretrained(tmp_path / "checkpoint")
    written = json.loads((tmp_path / "checkpoint/generation_config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in stored.items() if name not in dropped and value is not False}
    assert {name: written.get(name) for name in kept} == kept
    assert not {*dropped} & {*written}
