# SPDX-License-Identifier: Apache-2.0
"""How the result is served: settings of AWS's LMI container (DJL Serving) with vLLM, and what vLLM cannot load.

By the sources of djl-serving (LMI v27) and vLLM 0.23. Never imports torch, so that the launcher may warn early.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.config.schema import Settings
from llm_trainer.serving.limits import find_rank, find_refusals, find_served_rank

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedConfig

PROPERTIES, ENVIRONMENT = "serving.properties", "serving.env"
MODEL_DIR = "/opt/ml/model"  # where SageMaker puts the artefacts of an endpoint, and LMI looks for a model
ADAPTERS, ADAPTER_NAME = "adapters", "trained"  # LMI registers each folder in `adapters` under its name
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}  # LMI refuses the long names
STORED_BYTES = {"mxfp4": 0.55, "fp8": 1.0}  # a weight, scales included, of a base that vLLM loads quantized
DEGREES = (1, 2, 4, 8)  # GPUs of SageMaker's instances
GPU_GB = (24, 80)  # L4 and A10G; A100 and H100
USABLE_SHARE = 0.9  # of a GPU's memory: vLLM's gpu_memory_utilization
OVERHEAD = 1.2  # weights, activations, CUDA graphs and buffers over the weights alone
LENGTH_STEP = 1024

DEEPSEEK_CALLS = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
# Markup of tool calls in chat templates -> vLLM's parser of it. The first that is found counts.
TOOL_MARKUP = {
    "<|channel|>commentary": "openai",  # gpt-oss
    "[TOOL_CALLS]": "mistral",
    DEEPSEEK_CALLS: "deepseek_v31",
    "<|tool_calls_section_begin|>": "kimi_k2",
    "<|tool_call_start|>": "lfm2",
    "<start_function_call>": "functiongemma",
    "<|tool_call>": "gemma4",
    "<seed:tool_call>": "seed_oss",
    "<minimax:tool_call>": "minimax_m2",
    "<arg_key>": "glm45",
    "<function=": "qwen3_coder",
    "<tool_call>": "hermes",  # Qwen2.5, Qwen3, SmolLM3
}
# model_type -> the parser, where the markup alone does not tell, and what the template must hold.
TOOLS_OF_FAMILY = {
    "granite": ("<|tool_call|>", "granite"),
    "granitemoehybrid": ("<tool_call>", "granite4"),
    "llama": ("<|start_header_id|>", "llama3_json"),
    "llama4_text": ("<|header_start|>", "llama4_pythonic"),
    "olmo3": ("<function_calls>", "olmo3"),
}
THINKING_OF_FAMILY = {
    "deepseek_v3": "deepseek_v3",
    "gemma4_text": "gemma4",
    "glm4_moe": "glm45",
    "gpt_oss": "openai_gptoss",
    "minimax_m2": "minimax_m2",
    "olmo3": "olmo3",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_next": "qwen3",
    "seed_oss": "seed_oss",
}
THOUGHT_ENDS = ("</think>", "[/THINK]", "</seed:think>", "<|channel|>final", "<channel|>")


@dataclass(frozen=True)
class ServedModel:
    """What a server loads. `base_id` is None for a base that came as a channel, and of which no Hub knows."""

    config: "PreTrainedConfig"
    num_weights: int
    dtype: "torch.dtype"
    chat_template: str | None
    lora: "LoraConfig | None"  # None for whole or merged weights
    base_id: str | None
    base_revision: str | None


def write_serving(folder: Path, model: ServedModel, settings: Settings) -> list[str]:
    """Write serving.properties and serving.env beside the artefacts; sentences on why vLLM cannot load them, if so.

    Nothing is written then: with an adapter that it cannot load the container would serve the base, or not start.
    LMI looks for adapters in a folder `adapters` alone, so that the adapter lies there a second time.
    """
    refusals = list(find_refusals(model.lora, model.config.get_text_config().model_type)) if model.lora else []
    if refusals:
        return refusals
    if model.lora is not None:
        place = folder / ADAPTERS / ADAPTER_NAME
        place.mkdir(parents=True)
        for name in ADAPTER_FILES:
            shutil.copyfile(folder / name, place / name)
    options, remarks = choose_options(model, settings), list(describe_choices(model, settings))
    lines = [f"# {remark}" for remark in remarks] + ["engine=Python"]
    lines += [f"option.{name}={escape(value)}" for name, value in options.items()]
    (folder / PROPERTIES).write_text("\n".join(lines) + "\n", encoding="ascii")
    variables = {f"OPTION_{name.upper()}": value for name, value in {"engine": "Python", **options}.items()}
    lines = [f"# {remark}" for remark in remarks] + [f"{name}={value}" for name, value in variables.items()]
    (folder / ENVIRONMENT).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return []


def choose_options(model: ServedModel, settings: Settings) -> dict[str, str]:
    """LMI's options, without their prefix, in the order in which they are written."""
    options = {
        # vLLM's asynchronous engine, LMI's default from v17 on; named in full it does not depend on LMI's reaching
        # the base's config.json.
        "async_mode": "true",
        "rolling_batch": "disable",
        "entryPoint": "djl_python.lmi_vllm.vllm_async_service",
    }
    if model.lora is None:
        options["model_id"] = MODEL_DIR
    elif model.base_id is not None:
        options["model_id"] = model.base_id
        if model.base_revision is not None:
            options["revision"] = model.base_revision
    options["dtype"] = choose_dtype(model)
    length = choose_length(model, settings)
    if length is not None:
        options["max_model_len"] = str(length)
    options["tensor_parallel_degree"] = choose_degree(model, settings)
    if model.lora is not None:
        options |= {
            "tokenizer": MODEL_DIR,  # with the chat template of the training, which may not be the base's
            "enable_lora": "true",
            "max_loras": "1",
            "max_lora_rank": str(find_served_rank(find_rank(model.lora))),
        }
    tools = find_tool_parser(model)
    if tools:
        options |= {"enable_auto_tool_choice": "true", "tool_call_parser": tools}
    thinking = find_reasoning_parser(model)
    if thinking:
        options["reasoning_parser"] = thinking
    if settings.model.trust_remote_code:
        options["trust_remote_code"] = "true"
    return options


def describe_choices(model: ServedModel, settings: Settings) -> Iterator[str]:
    """What a reader of the files has to know, a line each."""
    yield "For AWS's LMI container with vLLM. serving.env holds the same as the container's environment variables."
    limit = find_limit(model)
    if limit is not None:
        trained = settings.data.max_length or "any number of"
        yield (
            f"max_model_len: the model takes {limit} tokens (it was trained on rows of at most {trained}); as many as "
            "the GPUs below hold beside the weights; raise it on larger ones."
        )
    gpus = advise_gpus(model, settings)
    size = f"{weight_bytes(model) / 1e9:.1f} GB of weights"
    if gpus:
        yield f"tensor_parallel_degree: {size} need {gpus[0]} x {gpus[1]} GB GPUs; max: all GPUs of the instance."
    else:
        yield f"tensor_parallel_degree: {size} are more than 8 x {GPU_GB[-1]} GB GPUs hold: quantize them."
    if model.lora is not None:
        yield f'The adapter answers requests with "adapters": "{ADAPTER_NAME}" or "model": "{ADAPTER_NAME}"; others go'
        yield "to the base. To put it on an endpoint of the base as an inference component, set HF_MODEL_ID to the base"
        yield "in that endpoint's environment, and leave out model_id and tokenizer."
        if model.base_id is None:
            yield "The base came as a channel: set model_id to the S3 prefix (s3://bucket/prefix/) of its files."


def choose_dtype(model: ServedModel) -> str:
    """The dtype of the training, but vLLM's kernels for adapters take 16 bit alone."""
    dtype = DTYPES[str(model.dtype)]
    return "bf16" if model.lora is not None and dtype == "fp32" else dtype


def weight_bytes(model: ServedModel) -> float:
    """Of the weights as vLLM holds them: 16 bit, unless the base is stored in fewer and no one has dequantized it."""
    stored = getattr(model.config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else str(stored.quant_method)
    size = STORED_BYTES.get(str(method)) if model.lora is not None else None
    return model.num_weights * (size or (4 if choose_dtype(model) == "fp32" else 2))


def cache_bytes(model: ServedModel) -> int:
    """Of keys and values of one token, in 16 bit. Layers with a sliding window hold no more than that and count not."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention (arXiv:2405.04434)
        width = text.kv_lora_rank + text.qk_rope_head_dim
    else:
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = 2 * count_key_heads(model) * head_dim
    return max(1, kinds.count("full_attention")) * width * 2


def count_key_heads(model: ServedModel) -> int:
    text = model.config.get_text_config()
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def can_split(model: ServedModel, degree: int) -> bool:
    """Whether vLLM takes so many GPUs: each has as many heads as the others, and whole ones of keys."""
    text = model.config.get_text_config()
    keys = text.num_attention_heads if getattr(text, "kv_lora_rank", None) else count_key_heads(model)
    return text.num_attention_heads % degree == 0 and (keys % degree == 0 or degree % keys == 0)


def free_bytes(model: ServedModel, degree: int, gpu_gb: int) -> float:
    """What so many GPUs leave for the cache."""
    return USABLE_SHARE * gpu_gb * 1e9 * degree - OVERHEAD * weight_bytes(model)


def advise_gpus(model: ServedModel, settings: Settings) -> tuple[int, int] | None:
    """The fewest GPUs, and the smaller kind of them (GB), that hold the weights and one row as long as in training."""
    row = cache_bytes(model) * min(settings.data.max_length or LENGTH_STEP, find_limit(model) or LENGTH_STEP)
    for gpu_gb in GPU_GB:
        for degree in DEGREES:
            if can_split(model, degree) and free_bytes(model, degree, gpu_gb) >= row:
                return degree, gpu_gb
    return None


def choose_degree(model: ServedModel, settings: Settings) -> str:
    """`max`, which is right on any instance, where the heads can be split among 1, 2, 4 and 8 GPUs; else a number."""
    if all(can_split(model, degree) for degree in DEGREES):
        return "max"
    gpus = advise_gpus(model, settings)
    return str(gpus[0] if gpus else max(degree for degree in DEGREES if can_split(model, degree)))


def find_limit(model: ServedModel) -> int | None:
    """The longest sequence that the model's positions reach, in tokens."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def choose_length(model: ServedModel, settings: Settings) -> int | None:
    """Tokens of a request and its answer: what the advised GPUs hold, no less than in training, no more than possible.

    vLLM does not start where the cache cannot hold one sequence of max_model_len tokens.
    """
    limit, gpus = find_limit(model), advise_gpus(model, settings)
    if limit is None or gpus is None:
        return None
    fitting = int(free_bytes(model, *gpus) / cache_bytes(model)) // LENGTH_STEP * LENGTH_STEP
    return min(limit, max(fitting, settings.data.max_length or LENGTH_STEP))


def find_tool_parser(model: ServedModel) -> str | None:
    """vLLM's parser of the tool calls that the chat template writes; None where it writes none."""
    template = model.chat_template or ""
    if "tools" not in template:
        return None
    if "```json" in template and DEEPSEEK_CALLS in template:
        return "deepseek_v3"
    markup, parser = TOOLS_OF_FAMILY.get(model.config.get_text_config().model_type, ("", None))
    if parser and markup in template:
        return parser
    return next((parser for markup, parser in TOOL_MARKUP.items() if markup in template), None)


def find_reasoning_parser(model: ServedModel) -> str | None:
    """vLLM's parser of the model's thoughts, where an answer without any ends them too as the template writes it.

    Most of vLLM's parsers take an answer in which no thought ends for a thought as a whole: its content would be empty.
    """
    family = model.config.get_text_config().model_type
    if model.chat_template is None or not any(end in render_answer(model.chat_template) for end in THOUGHT_ENDS):
        return None
    return "mistral" if "[THINK]" in model.chat_template else THINKING_OF_FAMILY.get(family)


def render_answer(template: str) -> str:
    """A question and an answer as they are trained on; empty where the template wants more than that."""
    from jinja2 import TemplateError  # the launcher imports this module, and renders nothing
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        ((text,), _) = render_jinja_template([messages], chat_template=template, bos_token="", eos_token="")
    except (TemplateError, TypeError):
        return ""
    return str(text)


def escape(value: str) -> str:
    """As Java's Properties.load reads it: one line of ASCII."""
    plain = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    codes = plain.encode("utf-16-be")
    units = [int.from_bytes(codes[place : place + 2], "big") for place in range(0, len(codes), 2)]
    return "".join(chr(unit) if 32 <= unit < 127 else f"\\u{unit:04x}" for unit in units)
