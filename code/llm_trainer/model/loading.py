# SPDX-License-Identifier: Apache-2.0
"""The base model, its config and its tokenizer, loaded as the settings ask for."""

import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_trainer.common import log
from llm_trainer.common.errors import UserError, cut_quote, quote_error
from llm_trainer.common.files import write_verbatim
from llm_trainer.common.hub import check_room, download_model, download_weights, find_refusal
from llm_trainer.common.ranks import run_on_local_rank_zero
from llm_trainer.common.safetensors_files import list_weights, read_header
from llm_trainer.config.sections import ModelSettings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.images.processing import ImageProcessing
from llm_trainer.job.model_objects import find_broken_objects
from llm_trainer.model.kinds.auto_class import choose_auto_class, is_trainable, sees_images
from llm_trainer.model.kinds.text_pass import check_texts, expose_backbone, has_exposed_backbone
from llm_trainer.model.layers import reward_head
from llm_trainer.model.quantization import Quantization, find_stored_method, keep_trainable, prepare_layers

UNKNOWN_TYPE = re.compile(r"model type `(.+?)` but Transformers does not recognize")

# What Transformers and PEFT raise for files of a model that hold other values than they expect.
LOADING_ERRORS = (
    *(OSError, ValueError, ImportError, SafetensorError, StrictDataclassError),
    *(TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, AssertionError),
)
# On the meta device, where no memory can run out, torch's own refusals of shapes and sizes are among them.
META_ERRORS = (*LOADING_ERRORS, RuntimeError, AssertionError)
# Options of from_pretrained that a user may give, beside values of the model's config. Rules name the unsafe ones.
LOADING_OPTIONS = frozenset(
    {"cache_dir", "disable_mmap", "experts_implementation", "force_download", "local_files_only", "proxies", "token"}
)
# Options that say where files are, and whether to run code among them.
SOURCE_OPTIONS = frozenset({"cache_dir", "local_files_only", "proxies", "revision", "token", "trust_remote_code"})
# A token such as <|image_pad|>, for which a model looks up a piece of an image.
STANDS_FOR_MEDIA = re.compile("image|img|video|vision|audio", re.IGNORECASE)
LOADING_BAR = "Loading weights"  # Transformers' name of its bar
SECONDS_A_LINE = 30.0  # a model that loads in less has no line


class WrongWeightsError(UserError):
    """Weights that are missing in a model's files, or have other shapes than its config says."""


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading the base: its number type, its quantization, and the attention kernel."""

    weights_dtype: torch.dtype
    attention: str  # the kernel, by Transformers' name
    quantization: Quantization | None = None  # None: as the checkpoint is stored
    is_reward: bool = False  # whether it gets the head of a reward model, which is new where the base has none


def fetch_model(
    model: str, settings: ModelSettings, scratch_dir: Path, with_weights: bool = True, name: str = "model"
) -> str:
    """Return the folder of a model's files. Download a Hub model once a host. `name` tells a job's models apart.

    With `use_snapshot_download=false` the model's Hub id comes back, and each rank loads it from the Hub by itself.
    Raise UserError when the model cannot be downloaded, has no room on the disk, or is not a plain base model.
    """
    if Path(model).is_dir():
        return model
    place = scratch_dir / f"{name}_folder"
    has_own_cache = "cache_dir" in (settings.model_init_kwargs or {})  # where the ranks alone look

    def download() -> None:
        folder = download_model(model, settings.model_revision, with_weights=False)
        if broken := list(find_broken_objects(Path(folder))):
            raise UserError(*broken)
        if with_weights and settings.use_snapshot_download:
            download_weights(model, Path(folder))
        elif with_weights and not has_own_cache:
            check_room(model, Path(folder))
        write_verbatim(place, folder)

    run_on_local_rank_zero(scratch_dir / f"{name}.done", download)
    return place.read_text(encoding="utf-8") if settings.use_snapshot_download else model


def read_config(model: str, settings: ModelSettings, is_reward: bool = False) -> PreTrainedConfig:
    """Return the config of a causal language model, or with `is_reward` of a reward model on the same decoder.

    Raise UserError when it cannot be read, or the model is of another kind.
    """
    try:
        options = {**build_source_options(settings), **(settings.model_init_kwargs or {})}
        config, unused = AutoConfig.from_pretrained(model, return_unused_kwargs=True, **options)
    except LOADING_ERRORS as error:
        raise UserError(explain_failure(error, model, "config")) from error
    if unknown := sorted((settings.model_init_kwargs or {}).keys() & unused.keys() - LOADING_OPTIONS):
        raise UserError(
            f"model_init_kwargs has {unknown[0]!r}, which is neither in the model's config nor among "
            f"{', '.join(sorted(LOADING_OPTIONS))}: remove it."
        )
    check_kind(model, config, is_reward)
    if not isinstance(config.get_text_config(), PreTrainedConfig):
        raise UserError(f"The config of {model} has a text_config that is no JSON object: download the model again.")
    if is_reward:
        reward_head.describe_rewards(config)
    return config


def check_kind(model: str, config: PreTrainedConfig, is_reward: bool) -> None:
    """Raise UserError for a model of another kind than the one that is trained."""
    if not is_trainable(config):
        raise UserError(
            f"model_id={model!r} is of type {config.model_type}, which is no causal language model and no image-text "
            "model: give one that is."
        )
    if is_reward:
        reward_head.check_classifier(model, config)
    elif reward_head.is_reward_model(config):
        raise UserError(
            f"model_id={model!r} is a {config.architectures[0]}, which gives numbers and no text: set method=reward, "
            "or give a causal language model."
        )


def explain_failure(error: Exception, model: str, part: str) -> str:
    """Return a sentence about a part of the model, such as its config, that could not be loaded."""
    subject = f"model_id={model!r}"
    if "trust_remote_code=True" in str(error):
        return f"{subject} needs code of its own and trust_remote_code is false: set it to true if you trust that code."
    if "Padding_idx must be within num_embeddings" in str(error):
        return (
            f"{subject} has a pad_token_id in its config.json that its embedding has no row for, so that nothing can "
            "load the model: write null there."
        )
    if unknown := UNKNOWN_TYPE.search(str(error)):
        return (
            f"{subject} is of type {unknown[1]}, which Transformers {transformers.__version__} does not know: "
            "give a model of a type that it knows."
        )
    return find_refusal(error, subject) or f"The {part} of {model} could not be loaded ({quote_error(error)})."


def build_skeleton(model: str, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model without its weights, on the meta device. Raise UserError where its code cannot build it."""
    try:
        skeleton = build_on_meta(config, config.dtype, trust_remote_code)
    except META_ERRORS as error:
        raise UserError(explain_failure(error, model, "code")) from error
    check_texts(model, skeleton)
    check_output_layer(model, skeleton)
    return skeleton


def check_output_layer(model: str, skeleton: PreTrainedModel) -> None:
    """Raise UserError for an encoder such as BERT, which computes a head of its own before its output layer.

    The loss would leave that head out. All encoders have it inside of a module, and no decoder of Transformers does.
    """
    if reward_head.is_reward_model(skeleton.config):
        if not isinstance(reward_head.find_head(skeleton), nn.Linear):
            raise UserError(
                f"method=reward: model_id={model!r} is a {type(skeleton).__name__}, whose head does not read the last "
                "token: give a decoder such as Llama or Qwen."
            )
        return
    output = skeleton.get_output_embeddings()
    name = next((name for name, module in skeleton.named_modules() if module is output), "")
    if "." in name and not has_exposed_backbone(skeleton) and type(skeleton).__module__.startswith("transformers."):
        raise UserError(
            f"model_id={model!r} is a {type(skeleton).__name__}, an encoder with a head of its own ({name}), and "
            "cannot be trained to continue texts: give a decoder such as Llama or Qwen."
        )


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype | None, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model of a config on the meta device. The config's type changes to `dtype`.

    What its code raises is not caught: the caller knows what to say about it.
    """
    with torch.device("meta"):
        skeleton = choose_auto_class(config, reward_head.is_reward_model(config)).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, attn_implementation="eager"
        )
    expose_backbone(skeleton)
    return skeleton


def load_tokenizer(
    model: str, settings: ModelSettings, num_embeddings: int, is_reward: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the chat template and the special tokens that the settings name.

    Its pad token is not the end-of-sequence token where there is another. Collators that mask by pad id would
    otherwise mask that too, and the model would never learn to stop. It is none that the model's embedding has no row
    for: tokenizers are often given a `[PAD]` without the model. Raise UserError for a token that is not there, and
    where a reward model could not tell padding from the end of an answer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **build_source_options(settings))
    except Exception as error:  # the library behind it raises no narrower class
        raise UserError(explain_failure(error, model, "tokenizer")) from error
    if settings.chat_template_path:
        tokenizer.chat_template = read_chat_template(settings.chat_template_path)
    if settings.eos_token:
        tokenizer.eos_token = check_token(tokenizer, "eos_token", settings.eos_token, num_embeddings)
    if tokenizer.eos_token is None:
        raise UserError(f"The tokenizer of {model} has no end-of-sequence token: name one with eos_token.")
    if tokenizer.eos_token_id >= num_embeddings:
        raise UserError(
            f"The tokenizer of {model} ends sequences in {tokenizer.eos_token!r}, the token {tokenizer.eos_token_id}, "
            f"and the model's embedding has {num_embeddings} rows: name another one with eos_token."
        )
    set_pad_token(tokenizer, settings.pad_token, num_embeddings)
    if is_reward:
        check_padding(model, tokenizer)
    return tokenizer


def check_padding(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where a reward model could not tell padding from the end of an answer."""
    if tokenizer.pad_token == tokenizer.eos_token:
        raise UserError(
            f"method=reward: the tokenizer of {model} has no special token but {tokenizer.eos_token!r}, and the last "
            "token that is no padding gives the reward: name a token that no text has with pad_token."
        )


def set_pad_token(tokenizer: PreTrainedTokenizerBase, asked: str | None, num_embeddings: int) -> None:
    """Give a tokenizer the pad token that is asked for, or a fitting one where its own does not fit."""
    if asked:
        tokenizer.pad_token = check_token(tokenizer, "pad_token", asked, num_embeddings)
        if tokenizer.pad_token == tokenizer.eos_token:
            raise UserError(f"pad_token={asked!r} is the end-of-sequence token: name another one.")
    elif tokenizer.pad_token in (None, tokenizer.eos_token) or tokenizer.pad_token_id >= num_embeddings:
        tokenizer.pad_token = choose_pad_token(tokenizer, num_embeddings)


def build_source_options(settings: ModelSettings) -> dict[str, Any]:
    """Return the options of Transformers' `from_pretrained` that say which files to read, and whether to run code."""
    return {"revision": settings.model_revision or "main", "trust_remote_code": settings.trust_remote_code}


def read_chat_template(path: str) -> str | dict[str, str]:
    """Return a Jinja file's text, or the chat template of another tokenizer's folder or Hub id, or all with names.

    Raise UserError when it cannot be read, or the tokenizer has none.
    """
    try:
        if Path(path).is_file():
            return Path(path).read_text(encoding="utf-8")
        template: str | dict[str, str] | None = AutoTokenizer.from_pretrained(path).chat_template
    except LOADING_ERRORS as error:
        refusal = find_refusal(error, f"chat_template_path={path!r}")
        raise UserError(refusal or f"chat_template_path={path!r} could not be read ({quote_error(error)}).") from error
    if template is None:
        raise UserError(f"chat_template_path={path!r} has no chat template: give a .jinja file.")
    return template


def check_token(tokenizer: PreTrainedTokenizerBase, setting: str, token: str, num_embeddings: int) -> str:
    """Return the token that a setting names. Raise UserError where tokenizer or model lack it."""
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        raise UserError(f"{setting}={token!r} is not in the model's vocabulary: name a token that is.")
    if vocabulary[token] >= num_embeddings:
        raise UserError(
            f"{setting}={token!r} is the token {vocabulary[token]} and the model's embedding has {num_embeddings} "
            "rows: name a token below that."
        )
    return token


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> str:
    """Return a special token that ends nothing, or the end-of-sequence token where there is no other.

    Its meaning does not matter: TRL's collator masks padding by length, and never trains on it.
    """
    special = [
        token
        for token in tokenizer.all_special_tokens
        if tokenizer.convert_tokens_to_ids(token) < num_embeddings and not STANDS_FOR_MEDIA.search(token)
    ]
    candidates = [
        *(token for token in special if "pad" in token.lower()),
        *(token for token in special if token == tokenizer.unk_token),
        *special,
    ]
    return next((token for token in candidates if token != tokenizer.eos_token), tokenizer.eos_token)


def find_stop_ids(model: str, tokenizer: PreTrainedTokenizerBase, revision: str | None) -> frozenset[int]:
    """Return the token ids that end a generation, by the tokenizer and by the model's generation config."""
    try:
        stop = GenerationConfig.from_pretrained(model, revision=revision or "main").eos_token_id
    except OSError:  # many models have no generation_config.json
        stop = None
    except LOADING_ERRORS as error:
        raise UserError(explain_failure(error, model, "generation_config.json")) from error
    stops = stop if isinstance(stop, list) else [stop] if stop is not None else []
    if unusable := [stop for stop in stops if not isinstance(stop, int)]:
        raise UserError(
            f"generation_config.json of {model} has the eos_token_id {cut_quote(repr(unusable[0]))}, which is no "
            "token's number: give the number."
        )
    return frozenset([*stops, tokenizer.eos_token_id])


def restore_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Give a model the generation config of its base's folder, as it is there.

    Many published ones have values that contradict each other. Transformers writes one back as it was read, and refuses
    to write one that was changed, as by the pad token of a training.
    """
    own = {"config_file_name": "config.json", "_from_model_config": True}  # what Transformers takes where there is none
    options = {} if (folder / "generation_config.json").is_file() else own
    model.generation_config = GenerationConfig.from_pretrained(folder, **options)


def build_vocabulary(
    model: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings
) -> Vocabulary:
    """Return what the encoding of rows has to agree on with the model.

    Raises UserError where a model of texts alone has options for images.
    """
    images = None
    if sees_images(config):
        token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
        images = ImageProcessing(model, token, settings.trust_remote_code, settings.image_processor_options)
    elif settings.image_processor_options:
        raise UserError(
            f"image_processor_options is given and the model is of type {config.model_type}, which takes texts alone: "
            "leave it out."
        )
    stop_ids = find_stop_ids(model, tokenizer, settings.model_revision)
    return Vocabulary(tokenizer, stop_ids, config.get_text_config().vocab_size, images)


def load_model(
    model: str, settings: ModelSettings, options: LoadOptions, device: torch.device | None, **placement: Any
) -> PreTrainedModel:
    """Return the base model on the device. `placement` overrides that with a `device_map` of Transformers' own.

    Without a device the model has no weights, for a rank that another one sends its shard to.
    Raise UserError when the model's files are broken.
    """
    try:
        if device is None:
            return build_empty_model(model, settings, options)
        arguments: dict[str, Any] = {
            "dtype": options.weights_dtype,
            "attn_implementation": options.attention,
            **build_source_options(settings),
            "device_map": {"": device},
            "use_safetensors": True,
            **placement,
            **(settings.model_init_kwargs or {}),
        }
        if options.quantization is not None:  # None would hide how the checkpoint is stored
            arguments["quantization_config"] = options.quantization
        with replace_bars(choose_bar):
            loaded, _ = load_whole(model, arguments, options.is_reward)
        return keep_trainable(loaded)
    except LOADING_ERRORS as error:
        raise UserError(explain_failure(error, model, "weights")) from error


@contextmanager
def replace_bars(choose: Callable[..., Any]) -> Iterator[None]:
    """Have Transformers show what `choose` returns in place of its own bars, which would spoil a log."""
    previous = transformers.utils.logging.set_tqdm_hook(choose)
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(previous)


def choose_bar(make_bar: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return lines in place of the bar of weights that load, and any other bar as Transformers makes it."""
    return log_tensors(*arguments) if options.get("desc") == LOADING_BAR else make_bar(*arguments, **options)


def log_tensors(tensors: Collection[Any]) -> Iterator[Any]:
    """Yield each tensor's entry. From time to time log how many are done."""
    started = told = time.monotonic()
    for done, tensor in enumerate(tensors):
        now = time.monotonic()
        if now - told >= SECONDS_A_LINE:
            log.info(f"{LOADING_BAR}: {done} of {len(tensors)} tensors in {now - started:.0f} s")
            told = now
        yield tensor


@contextmanager
def silence_report() -> Iterator[None]:
    """Have Transformers not report, within the block, that a new head and an old output layer fit nothing."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def load_whole(model: str, arguments: dict[str, Any], is_reward: bool = False) -> tuple[PreTrainedModel, list[str]]:
    """Return the model, and the names of the files' tensors that are no part of it.

    Raise WrongWeightsError where some are missing or of other shapes: Transformers would begin with random numbers
    there. Only the head of a reward model may begin so, on a base that is none.
    """
    source = {name: value for name, value in arguments.items() if name in SOURCE_OPTIONS}
    auto_class = choose_auto_class(AutoConfig.from_pretrained(model, **source), is_reward)
    arguments = {**(reward_head.CONFIG_VALUES if is_reward else {}), **arguments}
    with silence_report() if is_reward else nullcontext():
        loaded, found = auto_class.from_pretrained(
            model, **arguments, output_loading_info=True, ignore_mismatched_sizes=True
        )
    expose_backbone(loaded)
    missing, mismatched = set(found["missing_keys"]), sorted(found["mismatched_keys"])
    if is_reward and not reward_head.is_reward_model(loaded.config):
        missing -= {f"{reward_head.HEAD}.weight"}
        reward_head.describe_rewards(loaded.config)
    problems, fix = [], "give the whole model, with the config that belongs to its weights."
    if missing:
        problems.append(f"The weights of {model} lack {len(missing)} tensors of the model, first {min(missing)}: {fix}")
    for name, stored, needed in mismatched[:1]:
        shapes = f"{name} has shape {list(stored)} and the model needs {list(needed)}"
        problems.append(f"{len(mismatched)} tensors of {model} do not fit its config, first {shapes}: {fix}")
    if problems:
        raise WrongWeightsError(*problems)
    return loaded, sorted(found["unexpected_keys"])


def check_fit(model: str, config: PreTrainedConfig, settings: ModelSettings) -> list[str]:
    """Read which tensors a folder's files hold, and return the names of those that are no part of the model.

    No weights are read. A quantized checkpoint is checked when it loads, as is a model whose weights are not here.
    Raise UserError where some are missing, or of other shapes.
    """
    if not list_weights(Path(model)) or find_stored_method(config):
        return []
    is_reward = reward_head.is_reward_model(config)
    options = {**build_source_options(settings), **(settings.model_init_kwargs or {})}
    try:
        with replace_bars(lambda make_bar, arguments, options: iter(*arguments)):  # nothing is loaded
            options |= {"device_map": {"": "meta"}, "use_safetensors": True}
            skeleton, unexpected = load_whole(model, options, is_reward)
    except META_ERRORS as error:
        raise UserError(explain_failure(error, model, "weights")) from error
    ignored = re.compile("|".join(skeleton._keys_to_ignore_on_load_unexpected or ["(?!)"]))
    names = {name for file in list_weights(Path(model)) for name in read_header(file)}
    return sorted({*unexpected, *filter(ignored.search, names)})


def build_empty_model(model: str, settings: ModelSettings, options: LoadOptions) -> PreTrainedModel:
    """Return the base model on the meta device, ready to be sent weights that another rank has read.

    That rank has dequantized them, or quantized them in 4 bit.
    """
    config = read_config(model, settings, options.is_reward)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        empty = choose_auto_class(config, options.is_reward).from_config(
            config,
            dtype=options.weights_dtype,
            trust_remote_code=settings.trust_remote_code,
            attn_implementation=options.attention,
        )
    expose_backbone(empty)
    return prepare_layers(empty, options.quantization)
