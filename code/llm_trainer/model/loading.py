# SPDX-License-Identifier: Apache-2.0
"""The base model, its config and its tokenizer, loaded as the settings ask for."""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.hub import download_model, find_refusal
from llm_trainer.common.ranks import run_on_local_rank_zero
from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.model.quantization import Quantization, keep_trainable

UNKNOWN_TYPE = re.compile(r"model type `(.+?)` but Transformers does not recognize")


def fetch_model(model: str, settings: Settings, scratch_dir: Path, with_weights: bool = True) -> str:
    """The folder of the model's files: a Hub model is downloaded once a host. Raises UserError when it cannot be."""
    if Path(model).is_dir() or not settings.model.use_snapshot_download:
        return model
    place = scratch_dir / "model_folder"

    def download() -> None:
        place.write_text(download_model(model, settings.model.model_revision, with_weights), encoding="utf-8")

    run_on_local_rank_zero(scratch_dir / "model.done", download)
    return place.read_text(encoding="utf-8")


def read_config(model: str, settings: Settings) -> PreTrainedConfig:
    """The config of a causal language model. Raises UserError when it cannot be read, or is of another kind."""
    try:
        options = {**build_source_options(settings), **(settings.model.model_init_kwargs or {})}
        config = AutoConfig.from_pretrained(model, **options)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(explain_failure(error, model, "config")) from error
    is_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})  # code that comes with the model
    if not is_own and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            f"model_id={model!r} is of type {config.model_type}, which is no causal language model: give one that is."
        )
    return config


def explain_failure(error: Exception, model: str, part: str) -> str:
    """The sentence for a part of the model that could not be loaded."""
    what = f"model_id={model!r}"
    if "trust_remote_code=True" in str(error):
        return f"{what} needs code of its own and trust_remote_code is false: set it to true if you trust that code."
    if unknown := UNKNOWN_TYPE.search(str(error)):
        return (
            f"{what} is of type {unknown[1]}, which Transformers {transformers.__version__} does not know: "
            "give a model of a type that it knows."
        )
    return find_refusal(error, what) or f"The {part} of {model} could not be loaded ({quote_error(error)})."


def build_skeleton(model: str, config: PreTrainedConfig, settings: Settings) -> PreTrainedModel:
    """The model without its weights, for what its code alone tells. Raises UserError where that cannot be had."""
    try:
        return build_on_meta(config, settings, config.dtype)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(explain_failure(error, model, "code")) from error


def build_on_meta(config: PreTrainedConfig, settings: Settings, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a config on the meta device, which changes the config's type to this one."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=settings.model.trust_remote_code, attn_implementation="eager"
        )


def load_tokenizer(model: str, settings: Settings) -> PreTrainedTokenizerBase:
    """The tokenizer, with a chat template if the settings name one and a pad token that is not the EOS if it can be.

    Collators that mask by pad id would otherwise mask the EOS too, and the model would never learn to stop.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **build_source_options(settings))
    except (OSError, ValueError) as error:
        raise UserError(explain_failure(error, model, "tokenizer")) from error
    if settings.model.chat_template_path:
        tokenizer.chat_template = read_chat_template(settings.model.chat_template_path)
    if settings.model.eos_token:
        tokenizer.eos_token = check_token(tokenizer, "eos_token", settings.model.eos_token)
    if tokenizer.eos_token is None:
        raise UserError(f"The tokenizer of {model} has no end-of-sequence token: name one with eos_token.")
    if settings.model.pad_token:
        tokenizer.pad_token = check_token(tokenizer, "pad_token", settings.model.pad_token)
        if tokenizer.pad_token == tokenizer.eos_token:
            raise UserError(f"pad_token={settings.model.pad_token!r} is the end-of-sequence token: name another one.")
    elif tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = choose_pad_token(tokenizer)
    return tokenizer


def build_source_options(settings: Settings) -> dict[str, Any]:
    return {"revision": settings.model.model_revision or "main", "trust_remote_code": settings.model.trust_remote_code}


def read_chat_template(path: str) -> str:
    """A Jinja file's text, or the chat template of another tokenizer's folder or Hub id."""
    try:
        if Path(path).is_file():
            return Path(path).read_text(encoding="utf-8")
        template = AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        refusal = find_refusal(error, f"chat_template_path={path!r}")
        raise UserError(refusal or f"chat_template_path={path!r} could not be read ({quote_error(error)}).") from error
    if not isinstance(template, str):
        raise UserError(f"chat_template_path={path!r} has no chat template: give a .jinja file.")
    return template


def check_token(tokenizer: PreTrainedTokenizerBase, setting: str, token: str) -> str:
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
        stop = GenerationConfig.from_pretrained(model, revision=settings.model.model_revision or "main").eos_token_id
    except OSError:  # many models have no generation_config.json
        stop = None
    stops = stop if isinstance(stop, list) else [stop] if stop is not None else []
    return frozenset([*stops, tokenizer.eos_token_id])


def build_vocabulary(
    model: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Vocabulary:
    """What data have to agree on with the model."""
    return Vocabulary(tokenizer, find_stop_ids(model, tokenizer, settings), config.get_text_config().vocab_size)


def load_model(
    model: str,
    settings: Settings,
    quantization: Quantization | None,
    dtype: torch.dtype,
    device: torch.device | None,
    attention: str,
    **placement: Any,
) -> PreTrainedModel:
    """The base model on the device; without one it has no weights, for a rank that is sent its share of them.

    `placement` is Transformers' device_map, and what goes with it, where not all shall be on one device.
    Raises UserError when its files are broken.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": settings.model.trust_remote_code,
        "attn_implementation": attention,
    }
    try:
        if device is None:
            config = read_config(model, settings)
            if hasattr(config, "quantization_config"):  # what is sent has been dequantized
                del config.quantization_config
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, **options)
        options |= {**build_source_options(settings), "device_map": {"": device}, "use_safetensors": True}
        options |= placement
        options |= settings.model.model_init_kwargs or {}
        if quantization is not None:  # None would hide how the checkpoint is stored
            options["quantization_config"] = quantization
        return keep_trainable(AutoModelForCausalLM.from_pretrained(model, **options))
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(explain_failure(error, model, "weights")) from error
