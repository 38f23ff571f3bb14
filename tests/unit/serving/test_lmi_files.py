# SPDX-License-Identifier: Apache-2.0
"""What is written for LMI, family by family, and which adapters vLLM cannot load."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig

from llm_trainer.config.schema import Settings
from llm_trainer.serving import limits, lmi_files
from llm_trainer.serving.lmi_files import ServedModel, write_serving

TURNS = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
TOOLS = "{% if tools %}"
HERMES = TOOLS + "<tool_call>{% endif %}" + TURNS
THINKING = (
    TOOLS + "<tool_call>{% endif %}{% for m in messages %}{{ m.role }}<think>\n</think>{{ m.content }}{% endfor %}"
)
LLAMA = TOOLS + '{"name": "parameters"}{% endif %}<|start_header_id|>' + TURNS
MISTRAL = TOOLS + "[TOOL_CALLS]{% endif %}" + TURNS
CHANNELS = TOOLS + "<|channel|>commentary{% endif %}{% for m in messages %}<|channel|>final{{ m.content }}{% endfor %}"
DEEPSEEK = TOOLS + lmi_files.DEEPSEEK_CALLS + "```json{% endif %}" + TURNS
SHAPE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
FAMILIES = {  # model_type, weights, template -> tools, thoughts
    "llama3": ("llama", 8.0e9, LLAMA, "llama3_json", None),
    "qwen2": ("qwen2", 7.6e9, HERMES, "hermes", None),
    "qwen3": ("qwen3", 8.2e9, THINKING, "hermes", "qwen3"),
    "qwen3 trained without thoughts": ("qwen3", 8.2e9, HERMES, "hermes", None),
    "mistral": ("mistral", 7.2e9, MISTRAL, "mistral", None),
    "gpt-oss": ("gpt_oss", 20.9e9, CHANNELS, "openai", "openai_gptoss"),
    "deepseek": ("deepseek_v3", 16e9, DEEPSEEK, "deepseek_v3", None),
    "gemma3": ("gemma3_text", 4.3e9, TURNS, None, None),
    "smollm2": ("llama", 135e6, TURNS, None, None),
    "unknown": ("gpt2", 124e6, None, None, None),
}


def serve(folder, model_type="llama", weights=8e9, template=TURNS, lora=None, base="org/base", **settings):
    """The options written, without their prefix, and the refusals."""
    shape = {} if model_type in ("gpt2", "deepseek_v3", "gpt_oss") else SHAPE | settings.pop("shape", {})
    config = AutoConfig.for_model(model_type, **shape)
    if lora:
        for name in lmi_files.ADAPTER_FILES:
            (folder / name).write_text(name)
    model = ServedModel(config, int(weights), torch.bfloat16, template, lora, base, settings.pop("revision", None))
    refusals = write_serving(folder, model, Settings(**settings))
    if refusals:
        return {}, refusals
    lines = (folder / "serving.properties").read_text(encoding="ascii").splitlines()
    pairs = [line.split("=", 1) for line in lines if not line.startswith("#")]
    return {key.removeprefix("option."): value for key, value in pairs}, refusals


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_parsers(tmp_path, family):
    model_type, weights, template, tools, thoughts = FAMILIES[family]
    options, _ = serve(tmp_path, model_type, weights, template)
    assert options.get("tool_call_parser") == tools
    assert options.get("enable_auto_tool_choice") == ("true" if tools else None)
    assert options.get("reasoning_parser") == thoughts
    assert options["engine"] == "Python"
    assert options["model_id"] == "/opt/ml/model"
    assert options["dtype"] == "bf16"
    assert "enable_lora" not in options


def test_an_adapter_lies_where_lmi_looks_for_it(tmp_path):
    lora = LoraConfig(r=24, target_modules=["q_proj"])
    options, _ = serve(tmp_path, lora=lora, revision="a\nb=\\ü", trust_remote_code=True)
    assert options["model_id"] == "org/base"
    assert options["revision"] == "a\\nb=\\\\\\u00fc"
    assert options["tokenizer"] == "/opt/ml/model"
    assert options["max_lora_rank"] == "32"
    assert options["trust_remote_code"] == "true"
    for name in lmi_files.ADAPTER_FILES:
        assert (tmp_path / "adapters/trained" / name).read_text() == name


def test_a_base_without_a_name_is_left_to_the_user(tmp_path):
    options, _ = serve(tmp_path, lora=LoraConfig(target_modules=["q_proj"]), base=None)
    assert "model_id" not in options
    assert "set model_id to the S3 prefix" in (tmp_path / "serving.properties").read_text()


def test_the_environment_says_the_same(tmp_path):
    options, _ = serve(tmp_path, template=HERMES)
    lines = [line for line in (tmp_path / "serving.env").read_text().splitlines() if not line.startswith("#")]
    assert dict(line.split("=", 1) for line in lines) == {
        f"OPTION_{key.upper()}": value for key, value in options.items()
    }


@pytest.mark.parametrize(
    ("weights", "shape", "degree", "advice"),
    [
        (8e9, {}, "max", "need 1 x 24 GB GPUs"),
        (70e9, {"num_attention_heads": 64}, "max", "need 8 x 24 GB GPUs"),
        (135e6, {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}, "1", "need 1 x 24 GB GPUs"),
        (14e9, {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 10}, "2", "need 2 x 24 GB GPUs"),
        (120e9, {}, "max", "need 8 x 80 GB GPUs"),
        (900e9, {}, "max", "are more than 8 x 80 GB GPUs hold"),
    ],
)
def test_the_gpus_are_those_that_hold_the_weights_and_divide_the_heads(tmp_path, weights, shape, degree, advice):
    options, _ = serve(tmp_path, weights=weights, shape=shape)
    assert options["tensor_parallel_degree"] == degree
    assert advice in (tmp_path / "serving.properties").read_text()


@pytest.mark.parametrize(
    ("limit", "trained", "length"), [(131072, 2048, "17408"), (4096, 512, "4096"), (131072, 20000, "131072")]
)
def test_the_length_is_what_the_gpus_hold_and_the_model_takes(tmp_path, limit, trained, length):
    options, _ = serve(tmp_path, shape={"max_position_embeddings": limit}, max_length=trained)
    assert options["max_model_len"] == length


@pytest.mark.parametrize(
    ("lora", "model_type", "part"),
    [
        ({"modules_to_save": ["lm_head"]}, "llama", "it holds whole modules (lm_head)"),
        ({"use_dora": True}, "llama", "it is a DoRA adapter"),
        ({"bias": "all"}, "llama", "it trains biases"),
        ({"rank_pattern": {"k_proj": 4}}, "llama", "differ in rank or alpha"),
        ({"r": 513}, "llama", "its rank is 513 and at most 512"),
        ({"target_modules": ["lm_head"]}, "qwen2", "it sits on lm_head, which vLLM adapts in no qwen2"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "qwen3_moe", "fused experts"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "gpt_oss", "adapts all or none"),
    ],
)
def test_what_vllm_cannot_load_is_refused_and_nothing_written(tmp_path, lora, model_type, part):
    config = LoraConfig(**{"target_modules": ["q_proj"], **lora})
    (sentence,) = lmi_files.find_refusals(config, model_type)
    assert part in sentence
    assert "merge_weights=true" in sentence
    options, refusals = serve(tmp_path, model_type, lora=config)
    assert (options, refusals) == ({}, [sentence])
    assert {file.name for file in tmp_path.iterdir()} == set(lmi_files.ADAPTER_FILES)


@pytest.mark.parametrize(
    ("lora", "model_type"),
    [
        ({"use_rslora": True, "r": 512}, "llama"),
        ({"target_modules": ["embed_tokens", "lm_head"]}, "llama"),
        ({"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, "gpt_oss"),
    ],
)
def test_what_vllm_loads_is_not_refused(lora, model_type):
    assert list(lmi_files.find_refusals(LoraConfig(**{"target_modules": ["q_proj"], **lora}), model_type)) == []


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"use_dora": True}, "use_dora=true: vLLM"),
        ({"lora_r": 600}, "lora_r=600: vLLM"),
        ({"lora_r": 300, "init_lora_weights": "pissa"}, "lora_r=300, exported as 600 with init_lora_weights=pissa"),
        ({"use_dora": True, "merge_weights": True}, None),
        ({"lora_r": 600, "use_peft": False}, None),
        ({}, None),
    ],
)
def test_settings_alone_tell_some_of_it_before_the_training(settings, part):
    texts = list(limits.find_limits(Settings(**settings)))
    assert len(texts) == (part is not None)
    assert not part or texts[0].startswith(part)
