# SPDX-License-Identifier: Apache-2.0
"""Files that make AWS's LMI container (DJL Serving) serve the result with vLLM.

Sources: the code of djl-serving (LMI v27) and of vLLM 0.23.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.common.files import write_verbatim
from llm_trainer.serving.limits import find_adapter_refusals, find_largest_rank, find_served_rank

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedConfig

PROPERTIES, ENVIRONMENT = "serving.properties", "serving.env"
MODEL_DIR = "/opt/ml/model"  # where SageMaker puts the artefacts of an endpoint, and LMI looks for a model
ADAPTERS, ADAPTER_NAME = "adapters", "trained"  # LMI registers each folder in `adapters` under its name
LIMIT = "limit_mm_per_prompt"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
SERVING_FILES = (PROPERTIES, ENVIRONMENT, *(f"{ADAPTERS}/{ADAPTER_NAME}/{name}" for name in ADAPTER_FILES))
DTYPES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}  # LMI refuses the long names
STORED_BYTES = {"mxfp4": 0.55, "fp8": 1.0}  # bytes a weight, with its scales, for a base that vLLM loads quantized
DEGREES = (1, 2, 4, 8)  # numbers of GPUs that SageMaker's instances have
GPU_GB = (24, 80)  # memory of an L4 or A10G, and of an A100 or H100
USABLE_SHARE = 0.9  # share of a GPU's memory that vLLM uses by default, its gpu_memory_utilization
OVERHEAD = 1.2  # memory of weights, activations, CUDA graphs and buffers, relative to the weights
IMAGE_ROOM = 2  # images of a request, relative to the most of a row
LENGTH_STEP = 1024  # tokens to which a length is rounded down

DEEPSEEK_CALLS = "<\uff5ctool\u2581calls\u2581begin\uff5c>"
# Markup of tool calls in chat templates -> vLLM's parser for it. The first markup that a template holds counts.
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
# model_type -> a text that the template must hold, and the parser, where no markup alone decides.
TOOLS_OF_FAMILY = {
    "granite": ("<|tool_call|>", "granite"),
    "granitemoehybrid": ("<tool_call>", "granite4"),
    "llama": ("<|start_header_id|>", "llama3_json"),
    "llama4_text": ("<|header_start|>", "llama4_pythonic"),
    "olmo3": ("<function_calls>", "olmo3"),
}
REASONING_OF_FAMILY = {
    "deepseek_v3": "deepseek_v3",
    "gemma4_text": "gemma4",
    "glm4_moe": "glm45",
    "glm4v_moe_text": "glm45",
    "gpt_oss": "openai_gptoss",
    "minimax_m2": "minimax_m2",
    "olmo3": "olmo3",
    "qwen3": "qwen3",
    "qwen3_5_moe_text": "qwen3",
    "qwen3_5_text": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_next": "qwen3",
    "qwen3_vl_moe_text": "qwen3",
    "qwen3_vl_text": "qwen3",
    "seed_oss": "seed_oss",
}
REASONING_ENDS = ("</think>", "[/THINK]", "</seed:think>", "<|channel|>final", "<channel|>")


@dataclass(frozen=True)
class ServedImages:
    """The images that a request may have."""

    most_trained: int  # images of one row
    given: int | None = None  # the limit that the user sets

    @property
    def limit(self) -> int:
        """The most images of a request: with room for a conversation that goes on, unless the user sets it."""
        return self.given or IMAGE_ROOM * self.most_trained


@dataclass(frozen=True)
class ServedModel:
    """The model that a server loads."""

    config: "PreTrainedConfig"
    num_weights: int
    dtype: "torch.dtype"
    chat_template: str | dict[str, str] | None  # templates with names, or the only one
    lora: "LoraConfig | None"  # None for whole or merged weights
    base_id: str | None  # None for a base that came as a channel, which no Hub knows
    base_revision: str | None
    max_length: int | None  # tokens of the longest row that was trained on
    trust_remote_code: bool
    is_reward: bool = False  # LMI serves no reward model
    has_stop_tokens: bool = False  # whether generation_config.json beside an adapter names other ones than the base's
    images: "ServedImages | None" = None  # None where it was trained on texts alone
    sees: bool = False  # whether the adapter sits on what the model sees images with, too

    @property
    def text_config(self) -> "PreTrainedConfig":
        """The configuration of the language model, which a multimodal model nests."""
        return self.config.get_text_config()

    @property
    def layers(self) -> "list[PreTrainedConfig]":
        """The configuration of each layer of the language model: they may differ, as in Gemma 4."""
        text = self.text_config
        return [*text.per_layer_config] if text.is_heterogeneous else [text] * text.num_hidden_layers

    def find_template(self, name: str) -> str:
        """Return the chat template of a name, as Transformers and vLLM choose it; empty without one."""
        if isinstance(self.chat_template, dict):
            return self.chat_template.get(name) or self.chat_template.get("default", "")
        return self.chat_template or ""


def write_serving_files(folder: Path, model: ServedModel, artefacts: Path) -> list[str]:
    """Write serving.properties, serving.env and a copy of the adapter in `artefacts`, for the place beside it.

    Returns a sentence for each reason why vLLM cannot load the adapter. Nothing is written then: the container would
    serve the base alone, or not start. Nothing is written for a reward model, which vLLM serves and LMI does not.
    """
    refusals = (
        [] if model.lora is None else [*find_adapter_refusals(model.lora, model.text_config.model_type, model.sees)]
    )
    if refusals or model.is_reward:
        return refusals
    if model.lora is not None:
        copy_adapter(artefacts, folder)
    options, remarks = choose_options(model), list(describe_choices(model))
    lines = [f"# {remark}" for remark in remarks] + ["engine=Python"]
    lines += [f"option.{name}={escape_property(value)}" for name, value in options.items()]
    write_verbatim(folder / PROPERTIES, "\n".join(lines) + "\n")
    variables = {f"OPTION_{name.upper()}": value for name, value in {"engine": "Python", **options}.items()}
    lines = [f"# {remark}" for remark in remarks] + [f"{name}={value}" for name, value in variables.items()]
    write_verbatim(folder / ENVIRONMENT, "\n".join(lines) + "\n")
    return []


def copy_adapter(artefacts: Path, folder: Path) -> None:
    """Copy the adapter into the subfolder in which alone LMI looks for adapters."""
    target = folder / ADAPTERS / ADAPTER_NAME
    target.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(artefacts / name, target / name)


def choose_options(model: ServedModel) -> dict[str, str]:
    """Return LMI's options without their prefix, in the order in which they are written."""
    length = choose_length(model)
    return {
        # vLLM's asynchronous engine is LMI's default from v17 on. Named in full, it does not depend on whether LMI
        # reaches the base's config.json.
        "async_mode": "true",
        "rolling_batch": "disable",
        "entryPoint": "djl_python.lmi_vllm.vllm_async_service",
        **choose_model_id(model),
        "dtype": choose_dtype(model),
        **({} if length is None else {"max_model_len": str(length)}),
        "tensor_parallel_degree": choose_degree(model),
        **choose_adapter_options(model),
        **choose_parsers(model),
        **choose_image_limit(model),
        **({"trust_remote_code": "true"} if model.trust_remote_code else {}),
    }


def choose_model_id(model: ServedModel) -> dict[str, str]:
    """Return the options that name the weights; none for an adapter whose base has no id."""
    if model.lora is None:
        return {"model_id": MODEL_DIR}
    if model.base_id is None:
        return {}
    if model.base_revision is None:
        return {"model_id": model.base_id}
    return {"model_id": model.base_id, "revision": model.base_revision}


def choose_adapter_options(model: ServedModel) -> dict[str, str]:
    """Return the options that switch adapters on; none where the result is no adapter."""
    if model.lora is None:
        return {}
    return {
        "tokenizer": MODEL_DIR,  # its chat template is the one of the training, which the base may not have
        "enable_lora": "true",
        "max_loras": "1",
        "max_lora_rank": str(find_served_rank(find_largest_rank(model.lora))),
        # vLLM reads the tokens that end an answer from the base's folder, unless it is told another one.
        **({"generation_config": MODEL_DIR} if model.has_stop_tokens else {}),
    }


def choose_parsers(model: ServedModel) -> dict[str, str]:
    """Return the options that name vLLM's parsers of tool calls and of reasoning, where there is one."""
    tools, reasoning = find_tool_parser(model), find_reasoning_parser(model)
    options = {"enable_auto_tool_choice": "true", "tool_call_parser": tools} if tools else {}
    return options | ({"reasoning_parser": reasoning} if reasoning else {})


def choose_image_limit(model: ServedModel) -> dict[str, str]:
    """Return the option that bounds the images of a request, in the JSON that vLLM takes; none for texts alone."""
    return {LIMIT: json.dumps({"image": model.images.limit}, separators=(",", ":"))} if model.images else {}


def read_image_limit(variables: Mapping[str, str]) -> int | None:
    """Return the most images of a request by an endpoint's variables; None where they do not tell."""
    try:
        limit = json.loads(variables.get(f"OPTION_{LIMIT.upper()}", ""))["image"]
    except (ValueError, TypeError, LookupError):
        return None
    return limit if isinstance(limit, int) else None


def describe_choices(model: ServedModel) -> Iterator[str]:
    """Yield the lines that explain the options to a reader of the files."""
    yield "For AWS's LMI container with vLLM, v27 (vLLM 0.23) or newer. serving.env has the same as variables."
    limit = find_position_limit(model)
    if limit is not None:
        trained = model.max_length or "any number of"
        yield (
            f"max_model_len: the model takes {limit} tokens (it was trained on rows of at most {trained}); as many as "
            "the GPUs below hold beside the weights; raise it on larger ones."
        )
    if model.images:
        yield (
            f"{LIMIT}: a request may have {model.images.limit} images (rows had {model.images.most_trained} at most); "
            "max_model_len counts their tokens, too."
        )
    gpus = advise_gpus(model)
    size = f"{compute_weight_bytes(model) / 1e9:.1f} GB of weights"
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
    """Return LMI's name for the dtype of the training; bf16 for a 32-bit adapter, since vLLM's kernels need 16 bit."""
    dtype = DTYPES[str(model.dtype)]
    return "bf16" if model.lora is not None and dtype == "fp32" else dtype


def compute_weight_bytes(model: ServedModel) -> float:
    """Return the bytes of the weights in vLLM.

    They have the dtype of the training, unless an adapter's base is stored in fewer bits.
    """
    stored = getattr(model.config, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, dict) else str(stored.quant_method)
    size = STORED_BYTES.get(str(method)) if model.lora is not None else None
    return model.num_weights * (size or (4 if choose_dtype(model) == "fp32" else 2))


def compute_token_cache_bytes(model: ServedModel) -> int:
    """Return the bytes of one token's keys and values in 16 bit.

    Layers with a sliding window do not count, since their cache does not grow with the length.
    """
    kinds = getattr(model.text_config, "layer_types", None) or ["full_attention"] * len(model.layers)
    growing = [layer for layer, kind in zip(model.layers, kinds, strict=False) if kind == "full_attention"]
    return 2 * sum(map(count_cached_numbers, growing or model.layers[:1]))


def count_cached_numbers(layer: "PreTrainedConfig") -> int:
    """Return the numbers that a layer keeps of one token."""
    if getattr(layer, "kv_lora_rank", None):  # multi-head latent attention (arXiv:2405.04434)
        return layer.kv_lora_rank + layer.qk_rope_head_dim
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return 2 * count_key_heads(layer) * head_dim


def count_key_heads(layer: "PreTrainedConfig") -> int:
    """Return the number of a layer's key-value heads."""
    return getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads


def can_split(model: ServedModel, degree: int) -> bool:
    """Tell whether vLLM can split the heads over that many GPUs: evenly, and without cutting a head."""

    def can_split_layer(layer: "PreTrainedConfig") -> bool:
        keys = layer.num_attention_heads if getattr(layer, "kv_lora_rank", None) else count_key_heads(layer)
        return layer.num_attention_heads % degree == 0 and (keys % degree == 0 or degree % keys == 0)

    return all(map(can_split_layer, model.layers))


def compute_free_bytes(model: ServedModel, degree: int, gpu_gb: int) -> float:
    """Return the bytes that remain for the cache on that many GPUs; negative where the weights do not fit."""
    return USABLE_SHARE * gpu_gb * 1e9 * degree - OVERHEAD * compute_weight_bytes(model)


def advise_gpus(model: ServedModel) -> tuple[int, int] | None:
    """Return the smallest set of GPUs that holds the weights and one row of the training's length.

    Returns their number and the memory of each in GB, the smaller kind first; None where no set is large enough.
    """
    row = compute_token_cache_bytes(model) * min(
        model.max_length or LENGTH_STEP, find_position_limit(model) or LENGTH_STEP
    )
    for gpu_gb in GPU_GB:
        for degree in DEGREES:
            if can_split(model, degree) and compute_free_bytes(model, degree, gpu_gb) >= row:
                return degree, gpu_gb
    return None


def choose_degree(model: ServedModel) -> str:
    """Return `max`, right on any instance, where 1, 2, 4 and 8 GPUs can share the heads; else a number of GPUs."""
    if all(can_split(model, degree) for degree in DEGREES):
        return "max"
    gpus = advise_gpus(model)
    return str(gpus[0] if gpus else max(degree for degree in DEGREES if can_split(model, degree)))


def find_position_limit(model: ServedModel) -> int | None:
    """Return the longest sequence that the model's positions reach, in tokens; None where the model states none."""
    return getattr(model.text_config, "max_position_embeddings", None)


def choose_length(model: ServedModel) -> int | None:
    """Return the tokens of a request and its answer that the advised GPUs hold.

    The number lies between the length of the training and the model's limit. It is None where the model states no
    limit, or where no GPUs are advised. A cache that cannot hold one sequence of that length keeps vLLM from starting.
    """
    limit, gpus = find_position_limit(model), advise_gpus(model)
    if limit is None or gpus is None:
        return None
    fitting = int(compute_free_bytes(model, *gpus) / compute_token_cache_bytes(model)) // LENGTH_STEP * LENGTH_STEP
    return min(limit, max(fitting, model.max_length or LENGTH_STEP))


def find_tool_parser(model: ServedModel) -> str | None:
    """Return vLLM's parser of the tool calls that the chat template writes; None where it writes none."""
    template = model.find_template("tool_use")
    if "tools" not in template:
        return None
    if "```json" in template and DEEPSEEK_CALLS in template:
        return "deepseek_v3"
    markup, parser = TOOLS_OF_FAMILY.get(model.text_config.model_type, ("", None))
    if parser and markup in template:
        return parser
    return next((parser for markup, parser in TOOL_MARKUP.items() if markup in template), None)


def find_reasoning_parser(model: ServedModel) -> str | None:
    """Return vLLM's parser of the model's reasoning; None where the template does not end reasoning in every answer.

    Most of vLLM's parsers take an answer without such an end for reasoning alone: its content would be empty.
    """
    family, template = model.text_config.model_type, model.find_template("default")
    if not template or not any(end in render_answer(template) for end in REASONING_ENDS):
        return None
    return "mistral" if "[THINK]" in template else REASONING_OF_FAMILY.get(family)


def render_answer(template: str) -> str:
    """Render a question and an answer as they are trained on; empty where the template needs more messages."""
    from jinja2 import TemplateError  # imported here, because a folder is merged without rendering anything
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    try:
        ((text,), _) = render_jinja_template([messages], chat_template=template, bos_token="", eos_token="")
    except (TemplateError, TypeError):
        return ""
    return str(text)


def escape_property(value: str) -> str:
    """Escape a value for Java's Properties.load, as one line of ASCII."""
    plain = value.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    codes = plain.encode("utf-16-be")
    units = [int.from_bytes(codes[place : place + 2], "big") for place in range(0, len(codes), 2)]
    return "".join(chr(unit) if 32 <= unit < 127 else f"\\u{unit:04x}" for unit in units)
