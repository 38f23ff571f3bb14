# SPDX-License-Identifier: Apache-2.0
"""The base model and its tokenizer, as the settings ask for them: weights, type, attention kernel, quantization."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_trainer.distributed import local_rank, once_per_host
from llm_trainer.encoding import Vocabulary
from llm_trainer.errors import UserError, summarize
from llm_trainer.hub import download_model, find_refusal
from llm_trainer.settings import Settings


def fetch_model(model: str, settings: Settings, scratch_dir: Path, with_weights: bool = True) -> str:
    """The folder of the model's files: a Hub model is downloaded once a host. Raises UserError when it cannot be."""
    if Path(model).is_dir() or not settings.use_snapshot_download:
        return model
    place = scratch_dir / "model_folder"

    def download() -> None:
        place.write_text(download_model(model, settings.model_revision, with_weights), encoding="utf-8")

    once_per_host(scratch_dir / "model.done", download)
    return place.read_text(encoding="utf-8")


def load_tokenizer(model: str, settings: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer, with a chat template if the settings name one and a pad token that is not the EOS if it can be.

    Collators that mask by pad id would otherwise mask the EOS too, and the model would never learn to stop.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **source_options(settings))
    except (OSError, ValueError) as error:
        refusal = find_refusal(error, f"model_id={model!r}")
        raise UserError(refusal or f"The tokenizer of {model} could not be loaded ({summarize(error)}).") from error
    if settings.chat_template_path:
        tokenizer.chat_template = read_chat_template(settings.chat_template_path)
    if settings.eos_token:
        tokenizer.eos_token = known_token(tokenizer, "eos_token", settings.eos_token)
    if tokenizer.eos_token is None:
        raise UserError(f"The tokenizer of {model} has no end-of-sequence token: name one with eos_token.")
    if settings.pad_token:
        tokenizer.pad_token = known_token(tokenizer, "pad_token", settings.pad_token)
        if tokenizer.pad_token == tokenizer.eos_token:
            raise UserError(f"pad_token={settings.pad_token!r} is the end-of-sequence token: name another one.")
    elif tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = choose_pad_token(tokenizer)
    return tokenizer


def source_options(settings: Settings) -> dict[str, Any]:
    return {"revision": settings.model_revision or "main", "trust_remote_code": settings.trust_remote_code}


def read_chat_template(path: str) -> str:
    """A Jinja file's text, or the chat template of another tokenizer's folder or Hub id."""
    try:
        if Path(path).is_file():
            return Path(path).read_text(encoding="utf-8")
        template = AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        refusal = find_refusal(error, f"chat_template_path={path!r}")
        raise UserError(refusal or f"chat_template_path={path!r} could not be read ({summarize(error)}).") from error
    if not isinstance(template, str):
        raise UserError(f"chat_template_path={path!r} has no chat template: give a .jinja file.")
    return template


def known_token(tokenizer: PreTrainedTokenizerBase, setting: str, token: str) -> str:
    if token not in tokenizer.get_vocab():
        raise UserError(f"{setting}={token!r} is not in the model's vocabulary: name a token that is.")
    return token


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """A special token that ends nothing; the EOS itself only where there is no other.

    Its meaning does not matter here: TRL's collator masks padding by length, so that it is never trained on.
    """
    special = tokenizer.all_special_tokens
    candidates = [*(token for token in special if "pad" in token.lower()), tokenizer.unk_token, *special]
    return next((token for token in candidates if token and token != tokenizer.eos_token), tokenizer.eos_token)


def find_stop_ids(model: str, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> frozenset[int]:
    """Token ids at which generation stops: the tokenizer's EOS and those of the model's generation config."""
    try:
        stop = GenerationConfig.from_pretrained(model, revision=settings.model_revision or "main").eos_token_id
    except OSError:  # many models have no generation_config.json
        stop = None
    stops = stop if isinstance(stop, list) else [stop] if stop is not None else []
    return frozenset([*stops, tokenizer.eos_token_id])


def read_vocabulary(model: str, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Vocabulary:
    """What data have to agree on with the model. Raises UserError when its config cannot be read."""
    size = read_config(model, settings).get_text_config().vocab_size
    return Vocabulary(tokenizer, find_stop_ids(model, tokenizer, settings), size)


def read_config(model: str, settings: Settings) -> PreTrainedConfig:
    """Raises UserError when it cannot be read."""
    try:
        return AutoConfig.from_pretrained(model, **source_options(settings))
    except (OSError, ValueError) as error:
        refusal = find_refusal(error, f"model_id={model!r}")
        raise UserError(refusal or f"The config of {model} could not be loaded ({summarize(error)}).") from error


def choose_dtype(settings: Settings) -> torch.dtype:
    """The type of the computation, and of what is exported."""
    if settings.torch_dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[settings.torch_dtype]
    on_gpu = torch.cuda.is_available() and not settings.use_cpu and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if on_gpu else torch.float32


def choose_weights_dtype(settings: Settings) -> torch.dtype:
    """The type of the weights in memory: full fine-tuning keeps them in float32, where small updates are not lost."""
    if settings.torch_dtype == "auto" and not settings.use_peft:
        return torch.float32
    return choose_dtype(settings)


def choose_device(settings: Settings) -> torch.device:
    if settings.use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def build_quantization(model: str, settings: Settings) -> BitsAndBytesConfig | Mxfp4Config | None:
    """How the base is quantized while it loads. Raises UserError where that cannot work, before anything is loaded."""
    if settings.use_mxfp4:
        config = AutoConfig.from_pretrained(model, **source_options(settings))
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") != "mxfp4":
            raise UserError(f"use_mxfp4=true but {model} is not an MXFP4 checkpoint: set use_mxfp4=false.")
        return Mxfp4Config(dequantize=True)
    if settings.load_in_4bit:
        try_bitsandbytes(choose_device(settings))
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=choose_dtype(settings),
        )
    return None


def try_bitsandbytes(device: torch.device) -> None:
    """Quantize a few numbers: the package imports even where its native library cannot run."""
    try:
        from bitsandbytes.functional import quantize_4bit

        quantize_4bit(torch.ones(64, device=device), quant_type="nf4")
    except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"load_in_4bit=true: bitsandbytes cannot run here ({summarize(error)}): "
            "set load_in_4bit=false, or use the image on a GPU that bitsandbytes supports."
        ) from error


def load_model(
    model: str,
    settings: Settings,
    quantization: BitsAndBytesConfig | Mxfp4Config | None,
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    """The base model on the device. Raises UserError when its files are broken or of an unknown kind."""
    options: dict[str, Any] = {
        **source_options(settings),
        "dtype": dtype,
        "device_map": {"": device},
        "use_safetensors": True,
        "quantization_config": quantization,
    }
    if settings.attn_implementation != "auto":
        options["attn_implementation"] = settings.attn_implementation
    try:
        return AutoModelForCausalLM.from_pretrained(model, **{**options, **(settings.model_init_kwargs or {})})
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        refusal = find_refusal(error, f"model_id={model!r}")
        raise UserError(refusal or f"The model {model} could not be loaded: {summarize(error)}.") from error
