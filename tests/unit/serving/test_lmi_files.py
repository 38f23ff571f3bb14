# SPDX-License-Identifier: Apache-2.0
"""What is written for LMI, family by family."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig

from llm_trainer.serving import lmi_files
from llm_trainer.serving.lmi_files import ServedImages, ServedModel, read_image_limit, write_serving_files

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
PLAIN = {
    "dtype": torch.bfloat16,
    "chat_template": TURNS,
    "lora": None,
    "base_id": "org/base",
    "base_revision": None,
    "max_length": 2048,
    "trust_remote_code": False,
}
SHAPE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 32}
FAMILIES = {  # model_type, weights, template -> tools, thoughts
    "llama3": ("llama", 8.0e9, LLAMA, "llama3_json", None),
    "qwen2": ("qwen2", 7.6e9, HERMES, "hermes", None),
    "qwen3": ("qwen3", 8.2e9, THINKING, "hermes", "qwen3"),
    "qwen3 trained without thoughts": ("qwen3", 8.2e9, HERMES, "hermes", None),
    "qwen3-vl": ("qwen3_vl", 8.8e9, THINKING, "hermes", "qwen3"),
    "mistral": ("mistral", 7.2e9, MISTRAL, "mistral", None),
    "gpt-oss": ("gpt_oss", 20.9e9, CHANNELS, "openai", "openai_gptoss"),
    "deepseek": ("deepseek_v3", 16e9, DEEPSEEK, "deepseek_v3", None),
    "gemma3": ("gemma3_text", 4.3e9, TURNS, None, None),
    "smollm2": ("llama", 135e6, TURNS, None, None),
    "gemma4": ("gemma4_text", 4.3e9, TURNS, None, None),
    "unknown": ("gpt2", 124e6, None, None, None),
}


def serve(folder, model_type="llama", weights=8e9, shape=None, **fields):
    """Write the files for a model; the options written, without their prefix, and the refusals."""
    shape = {} if model_type in ("gpt2", "deepseek_v3", "gpt_oss") else SHAPE | (shape or {})
    config = AutoConfig.for_model(model_type, **shape)
    model = ServedModel(**{**PLAIN, "config": config, "num_weights": int(weights), **fields})
    if model.lora:
        for name in lmi_files.ADAPTER_FILES:
            (folder / name).write_text(name)
    refusals = write_serving_files(folder, model, folder)
    if refusals:
        return {}, refusals
    lines = (folder / "serving.properties").read_text(encoding="ascii").splitlines()
    pairs = [line.split("=", 1) for line in lines if not line.startswith("#")]
    return {key.removeprefix("option."): value for key, value in pairs}, refusals


def test_the_cache_of_layers_that_differ_is_that_of_those_which_grow():
    config = AutoConfig.for_model("gemma4_text", num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2)
    model = ServedModel(**{**PLAIN, "config": config, "num_weights": 10**9})
    assert [layer.head_dim for layer in model.layers] == [256] * 5 + [512]
    assert lmi_files.compute_token_cache_bytes(model) == 2 * 2 * 2 * 512
    assert [degree for degree in (1, 2, 4, 8) if lmi_files.can_split(model, degree)] == [1, 2, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_parsers(tmp_path, family):
    model_type, weights, template, tools, thoughts = FAMILIES[family]
    options, _ = serve(tmp_path, model_type, weights, chat_template=template)
    assert options.get("tool_call_parser") == tools
    assert options.get("enable_auto_tool_choice") == ("true" if tools else None)
    assert options.get("reasoning_parser") == thoughts
    assert options["engine"] == "Python"
    assert options["model_id"] == "/opt/ml/model"
    assert options["dtype"] == "bf16"
    assert "enable_lora" not in options


def test_an_adapter_lies_where_lmi_looks_for_it(tmp_path):
    lora = LoraConfig(r=24, target_modules=["q_proj"])
    options, _ = serve(tmp_path, lora=lora, base_revision="a\nb=\\ü", trust_remote_code=True)
    assert options["model_id"] == "org/base"
    assert options["revision"] == "a\\nb=\\\\\\u00fc"
    assert options["tokenizer"] == "/opt/ml/model"
    assert options["max_lora_rank"] == "32"
    assert options["trust_remote_code"] == "true"
    for name in lmi_files.ADAPTER_FILES:
        assert (tmp_path / "adapters/trained" / name).read_text() == name


@pytest.mark.parametrize("has_stop_tokens", [True, False])
def test_vllm_reads_the_tokens_that_end_an_answer_beside_the_adapter(tmp_path, has_stop_tokens):
    options, _ = serve(tmp_path, lora=LoraConfig(target_modules=["q_proj"]), has_stop_tokens=has_stop_tokens)
    assert options.get("generation_config") == ("/opt/ml/model" if has_stop_tokens else None)


def test_a_base_without_a_name_is_left_to_the_user(tmp_path):
    options, _ = serve(tmp_path, lora=LoraConfig(target_modules=["q_proj"]), base_id=None)
    assert "model_id" not in options
    assert "set model_id to the S3 prefix" in (tmp_path / "serving.properties").read_text()


def test_calls_are_parsed_as_the_template_named_for_tools_writes_them(tmp_path):
    named, _ = serve(tmp_path, chat_template={"default": TURNS, "tool_use": HERMES})
    single, _ = serve(tmp_path, chat_template=HERMES)
    assert named == single
    assert serve(tmp_path, chat_template={"default": TURNS})[0] == serve(tmp_path, chat_template=TURNS)[0]


def test_the_environment_says_the_same(tmp_path):
    options, _ = serve(tmp_path, chat_template=HERMES)
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


def test_an_adapter_that_vllm_cannot_load_is_told_and_nothing_written(tmp_path):
    lora = LoraConfig(target_modules=["q_proj"], bias="all")
    options, (refusal,) = serve(tmp_path, lora=lora)
    assert not options
    assert "it trains biases" in refusal
    assert {file.name for file in tmp_path.iterdir()} == set(lmi_files.ADAPTER_FILES)


def test_a_32_bit_adapter_is_served_in_16_bit_and_whole_weights_are_not(tmp_path):
    (tmp_path / "whole").mkdir()
    adapter, _ = serve(tmp_path, dtype=torch.float32, lora=LoraConfig(target_modules=["q_proj"]))
    whole, _ = serve(tmp_path / "whole", dtype=torch.float32)
    assert (adapter["dtype"], whole["dtype"]) == ("bf16", "fp32")


def test_a_request_may_have_twice_the_images_of_a_row_unless_the_user_sets_a_limit(tmp_path):
    options, _ = serve(tmp_path, images=ServedImages(3))
    assert options["limit_mm_per_prompt"] == '{"image":6}'
    lines = (tmp_path / "serving.env").read_text().splitlines()
    assert 'OPTION_LIMIT_MM_PER_PROMPT={"image":6}' in lines
    assert any("a request may have 6 images (rows had 3 at most); max_model_len counts" in line for line in lines)
    assert read_image_limit(dict(line.split("=", 1) for line in lines if "=" in line)) == 6
    options, _ = serve(tmp_path, images=ServedImages(3, given=4))
    assert options["limit_mm_per_prompt"] == '{"image":4}'
    assert "limit_mm_per_prompt" not in serve(tmp_path)[0]


@pytest.mark.parametrize("value", [None, "image=2", '{"video":1}', '{"image":{"count":2}}', "2"], ids=str)
def test_a_limit_that_is_told_otherwise_is_not_known(value):
    assert read_image_limit({"OPTION_LIMIT_MM_PER_PROMPT": value} if value else {}) is None
