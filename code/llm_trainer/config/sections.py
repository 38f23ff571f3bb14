# SPDX-License-Identifier: Apache-2.0
"""The sections of the settings: frozen models, one for each part of the code that reads settings.

A section holds settings of this project's own, and the fields of TRL's configs that belong to the same concern.
"""

import re
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, SecretStr, create_model

from llm_trainer.config.trl_config_fields import CONFIG_CLASSES, Argument, read_snapshot

# The training methods, as in CONFIG_CLASSES.
Method = Literal["sft", "dpo", "kto", "reward", "distill", "grpo", "rloo"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
DatasetFormat = Literal[
    "auto",
    "pretokenized",
    "messages",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "text",
    "preference",
    "unpaired_preference",
    "prompt",
]
# method -> the formats of its rows. A row is of the first one whose fields it has.
METHOD_FORMATS: dict[str, tuple[str, ...]] = {
    "sft": ("pretokenized", "messages", "sharegpt", "prompt_completion", "alpaca", "text"),
    "dpo": ("preference",),
    "kto": ("unpaired_preference", "preference"),
    "reward": ("preference",),
    "distill": ("pretokenized", "messages", "sharegpt", "prompt_completion", "alpaca", "text"),
    "grpo": ("prompt",),
    "rloo": ("prompt",),
}
IMAGE_METHODS = ("sft", "dpo")  # methods whose rows may have images
Attention = Literal[
    "auto",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flash_attention_torch",
    "flex_attention",
    "sdpa",
    "eager",
]
AdapterInit = Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq"]


# Other names of our settings, as other tools spell them.
ALIASES = {
    "MaxRuntimeInSeconds": "max_run_seconds",
    "activation_checkpointing": "gradient_checkpointing",
    "adapter_name_or_path": "adapter_path",
    "dataset_name": "train_dataset_path",
    "dataset_text_field": "text_field",
    "dtype": "torch_dtype",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "max_seq_length": "max_length",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    "model_name_or_path": "model_id",
    "warmup_ratio": "warmup_steps",  # since Transformers 5, warmup_steps below 1 is a share of all steps
}


# TRL states no ranges. Without these, a wrong value would fail late, or never.
RANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"gt": 0},
    "num_train_epochs": {"gt": 0},
    "per_device_train_batch_size": {"ge": 1},
    "per_device_eval_batch_size": {"ge": 1},
    "gradient_accumulation_steps": {"ge": 1},
    "warmup_steps": {"ge": 0},
    "weight_decay": {"ge": 0},
    "adam_beta1": {"ge": 0, "lt": 1},
    "adam_beta2": {"ge": 0, "lt": 1},
    "adam_epsilon": {"gt": 0},
    "max_grad_norm": {"ge": 0},
    "label_smoothing_factor": {"ge": 0, "lt": 1},
    "logging_steps": {"gt": 0},
    "eval_steps": {"gt": 0},
    "save_steps": {"gt": 0},
    "save_total_limit": {"ge": 1},
    "dataloader_num_workers": {"ge": 0},
    "ddp_timeout": {"ge": 1},
    "seed": {"ge": 0, "lt": 2**32},  # NumPy takes no larger one
    "beta": {"ge": 0},
    "center_rewards_coefficient": {"ge": 0},
    "label_smoothing": {"ge": 0, "lt": 1},
    "ld_alpha": {"ge": 0},
    "discopop_tau": {"gt": 0},
    "desirable_weight": {"ge": 0},
    "undesirable_weight": {"ge": 0},
    "precompute_ref_batch_size": {"ge": 1},
    "ref_model_mixup_alpha": {"ge": 0},
    "ref_model_sync_steps": {"ge": 1},
    "num_generations": {"ge": 2},
    "num_generations_eval": {"ge": 1},
    "max_completion_length": {"ge": 1},
    "generation_batch_size": {"ge": 1},
    "steps_per_generation": {"ge": 1},
    "num_iterations": {"ge": 1},
    "temperature": {"gt": 0},
    "top_p": {"gt": 0, "le": 1},
    "top_k": {"ge": 0},
    "min_p": {"ge": 0, "le": 1},
    "repetition_penalty": {"gt": 0},
    "epsilon": {"ge": 0},
    "epsilon_high": {"ge": 0},
    "top_entropy_quantile": {"gt": 0, "le": 1},
}

# Fields of SFTConfig whose default is this project's: what it is, in words.
OWN_DEFAULTS = {
    "learning_rate": "2e-4 for an adapter, 2e-5 for all weights; other methods take less",
    "bf16": "as torch_dtype says",
    "fp16": "as torch_dtype says",
    "logging_steps": "10, or a tenth of a run that is shorter than 100 steps",
    "eval_strategy": "epoch with validation data, steps with eval_steps too, no without",
    "save_strategy": "ten times a run and every 15 minutes, steps with save_steps",
    "save_steps": "a tenth of the run",
    "save_total_limit": "2",
    "load_best_model_at_end": "as early_stopping",
    "metric_for_best_model": "eval_loss",
    "greater_is_better": "false for eval_loss",
    "train_sampling_strategy": "group_by_length where rows are padded, random where they are packed",
    "report_to": "the trackers that are configured",
    "hub_strategy": "end",
    "use_cpu": "true where there is no GPU",
    "ddp_backend": "nccl on GPUs, gloo on CPUs",
    "ddp_broadcast_buffers": "false",
    "ddp_find_unused_parameters": "false",
    "accelerator_config": '{"non_blocking": true} on a GPU',
    "dataloader_pin_memory": "true on a GPU",
    "activation_checkpointing_kwargs": '{"use_reentrant": false}',
    "disable_tqdm": "true",
    "prediction_loss_only": "true",
}

MOVING_STARTS = ("pissa", "pissa_niter_16", "olora")  # these move a part of the base into the adapter

METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # of the learning rate: these follow eval_loss

SECRETS = ("token", "wandb_token", "hub_token")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")  # the beginning of one, such as s3://, where a path is asked for
PLAIN_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": float, "str": str, "dict": dict}
PLAIN_TYPES |= {"list": list[str], "list[float]": list[float]}


class Section(BaseModel):
    """A frozen part of the settings, which one package of the code reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), coerce_numbers_to_str=True)

    trl_config_fields: ClassVar[tuple[str, ...]] = ()  # the fields that are those of TRL's configs

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return a field of SFTConfig, whose type mypy does not know."""

    def is_given(self, *names: str) -> bool:
        """Tell whether the user set any of these settings, rather than leaving it at its default."""
        return not self.model_fields_set.isdisjoint(names)

    def value(self, name: str) -> Any:
        """Return the setting of that name."""
        return getattr(self, name)

    def fill_in(self, **values: Any) -> Self:
        """Return a copy with other values of some settings, which are checked already and do not count as given."""
        filled = type(self).model_construct(_fields_set=set(self.model_fields_set), **{**dict(self), **values})
        return cast(Self, filled)

    def replace(self, **values: Any) -> Self:
        """Return a copy with other values of some settings, which count as given."""
        given = {name: self.value(name) for name in self.model_fields_set}
        changed = type(self)(**{**given, **values})
        return changed.fill_in(**{name: value for name, value in self if name not in changed.model_fields_set})


PAIR_METHODS = ("dpo", "reward")  # a row of these holds two answers to a prompt
REFERENCE_METHODS = ("dpo", "kto")  # these compare with the model before the first step
WITHOUT_DIVERGENCE = "apo_zero_unpaired"  # KTO's loss that needs no estimate of a divergence
IMITATION_METHODS = ("sft", "distill")  # a row of these is one text, whose tokens are learnt; rows may be packed
GENERATION_METHODS = ("grpo", "rloo")  # the model writes what these train on, completions of prompts
# Settings of methods that are this project's own -> the methods that have them.
OWN_METHOD_FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("teacher_load_in_4bit", "teacher_load_in_8bit"), ("distill",)),
    **dict.fromkeys(("reward_functions", "reward_options", "reward_timeout_seconds"), GENERATION_METHODS),
}
SHARED_NAMES = ("loss_type",)  # fields of SFTConfig that are another thing in every method's config


SectionType = TypeVar("SectionType", bound=type[Section])


def with_trl_config_fields(*names: str) -> Callable[[SectionType], SectionType]:
    """Return a class decorator that adds these fields of SFTConfig to a section, with their own names and types."""

    def extend(section: SectionType) -> SectionType:
        return add_fields(section, {name: build_field(name) for name in names})

    return extend


def with_method_fields(section: SectionType) -> SectionType:
    """Return the section with the settings that differ between methods, as a class decorator."""
    return add_fields(section, {name: build_method_field(name) for name in METHOD_FIELDS})


def add_fields(section: SectionType, fields: dict[str, Any]) -> SectionType:
    """Return the section with further fields of TRL's configs, as pydantic's `create_model` takes them."""
    model = create_model(section.__name__, __base__=section, __module__=__name__, **fields)
    extended = cast(SectionType, model)
    extended.__doc__ = section.__doc__
    extended.trl_config_fields = tuple(fields)
    return extended


def list_remaining_fields(*sections: type[Section]) -> list[str]:
    """Return the fields of SFTConfig that no section has, and that no alias stands for."""
    taken = {name for section in sections for name in section.model_fields}
    return [name for name in read_snapshot() if name not in taken and name not in ALIASES]


def find_method_fields() -> dict[str, dict[str, Argument]]:
    """Return the settings that only methods other than sft have, or that mean another thing there.

    Name -> method -> the field of its config.
    """
    fields: dict[str, dict[str, Argument]] = {}
    for method in CONFIG_CLASSES:
        for name, argument in read_snapshot(method).items():
            fields.setdefault(name, {})[method] = argument
    return {name: methods for name, methods in fields.items() if "sft" not in methods or name in SHARED_NAMES}


METHOD_FIELDS = find_method_fields()


def build_method_field(name: str) -> tuple[Any, Any]:
    """Return type and definition of a setting of methods, as `create_model` takes them. None: the method's default."""
    arguments = METHOD_FIELDS[name].values()
    kinds = [build_field_type(name, argument) for argument in arguments]
    definition = Field(None, description=next(iter(arguments)).help, **RANGES.get(name, {}))
    return typing.Union[(*kinds, None)], definition


def build_field(name: str) -> tuple[Any, Any]:
    """Return the type and the definition of a field of SFTConfig, as pydantic's `create_model` takes them."""
    argument = read_snapshot()[name]
    definition = Field(argument.default, description=argument.help, **RANGES.get(name, {}))
    return build_field_type(name, argument), definition


def build_field_type(name: str, argument: Argument) -> Any:
    """Return the type annotation of a field of SFTConfig. Secrets become SecretStr."""
    if name in SECRETS:
        return SecretStr | None
    if argument.choices:
        choice: Any = Literal[tuple(argument.choices)]
        kinds: list[Any] = [choice, list[choice]] if "list" in argument.types else [choice]
    else:
        kinds = [PLAIN_TYPES[kind] for kind in argument.types]
    if argument.nullable:
        kinds.append(None)
    return typing.Union[tuple(kinds)]  # noqa: UP007 - built from a list


@with_trl_config_fields(
    "trust_remote_code",
    "model_init_kwargs",
    "chat_template_path",
    "eos_token",
    "pad_token",
    "liger_kernel_config",
    "use_cache",
)
class ModelSettings(Section):
    """The base model: where it comes from, and how it is loaded."""

    model_id: str | None = Field(
        None, description="Hub id or folder of the base model. Default: the folder of channel `model`."
    )
    model_revision: str | None = Field(
        None, description="Branch, tag or commit of a model on the Hub. Default: its main branch."
    )
    use_snapshot_download: bool = Field(True, description="Download a Hub model once a host, before any rank loads it.")
    token: SecretStr | None = Field(
        None, description="Hugging Face token, or the ARN of a secret. HF_TOKEN in the job's Environment is safer."
    )
    torch_dtype: Dtype = Field(
        "auto", description="Type of the weights and of the computation. auto: 16 bit on a GPU, float32 on a CPU."
    )
    base_compute: Literal["fp8"] | None = Field(
        None,
        description="Type that the linear layers of a frozen base multiply in. fp8: float8, which is faster on a GPU "
        "of compute capability 8.9 or later, and coarser. Default: as torch_dtype.",
    )
    attn_implementation: Attention = Field(
        "auto",
        description="Attention kernel. auto: the fastest one that is right for the model, the type and the device. "
        "flash_attention_torch: PyTorch's own copy of flash attention 2.",
    )
    use_liger_kernel: bool | None = Field(
        None, description="Use Liger's fused kernels. Default: on a GPU, where Liger knows the model."
    )
    load_in_4bit: bool = Field(False, description="Load the base in 4 bit (QLoRA).")
    load_in_8bit: bool = Field(False, description="Load the base in 8 bit (LLM.int8()).")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="Type of the 4-bit weights of `load_in_4bit`."
    )
    bnb_4bit_use_double_quant: bool = Field(True, description="Quantize the scales of `load_in_4bit`, too.")
    use_mxfp4: bool | None = Field(
        None,
        description="The base is an MXFP4 checkpoint such as gpt-oss, and is dequantized for training. Default: as "
        "its config says.",
    )
    image_processor_options: dict[str, Any] = Field(
        {},
        description="Options of the model's image processor in place of those in its files, such as the size that "
        "images are made smaller to. The result has them, too.",
    )


class AdapterSettings(Section):
    """The LoRA adapter that is trained."""

    use_peft: bool = Field(True, description="Train a LoRA adapter. false: fine-tune all weights.")
    adapter_path: str | None = Field(
        None,
        description="Folder or Hub id of an adapter that the training goes on from. Rank, alpha and targets come from "
        "it. Default: the folder of channel `adapter`, if there is one.",
    )
    adapter_revision: str | None = Field(
        None, description="Branch, tag or commit of an adapter on the Hub. Default: its main branch."
    )
    merge_adapter: bool = Field(
        False,
        description="Merge the earlier adapter into the base before the training, which begins with a new adapter or "
        "trains all weights. The result is a whole model.",
    )
    lora_r: int = Field(8, ge=1, description="Rank of the adapter.")
    lora_alpha: float = Field(16, gt=0, description="Scale of the adapter: its output is multiplied by alpha / rank.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the adapter's input. It costs time and memory, for its masks."
    )
    target_modules: str | list[str] = Field(
        "auto",
        description="Modules that get an adapter: their names, or one regular expression. auto: all linear layers "
        "and all experts.",
    )
    target_parameters: list[str] | None = Field(
        None,
        description="Parameters that get an adapter, such as fused experts. Default: all experts where "
        "`target_modules` is auto.",
    )
    train_vision: bool = Field(
        False,
        description="Train also what a model sees images with: its vision tower and projector, which are frozen "
        "otherwise. With an adapter, their linear layers get one.",
    )
    use_rslora: bool = Field(False, description="Scale the adapter by alpha / sqrt(rank) (rsLoRA).")
    use_dora: bool = Field(False, description="Learn magnitude and direction of the weights apart (DoRA).")
    init_lora_weights: AdapterInit = Field(
        "default", description="How the adapter begins. loftq: with the error that 4-bit weights have."
    )
    loraplus_lr_ratio: float | None = Field(
        None,
        ge=1,
        description="Learning rate of the adapter's matrix B, divided by the one of its matrix A (LoRA+). Default: "
        "both are the same.",
    )

    @property
    def goes_on(self) -> bool:
        """True where the values of an earlier adapter are trained on, and not merged into the base."""
        return bool(self.adapter_path) and not self.merge_adapter


@with_trl_config_fields(
    "completion_only_loss",
    "truncation_mode",
    "packing_strategy",
    "padding_free",
    "eval_packing",
    "pad_to_multiple_of",
    "shuffle_dataset",
    "dataset_kwargs",
)
class DataSettings(Section):
    """The rows that are trained and evaluated on, and how they become sequences."""

    method: Method = Field(
        "sft",
        description="Training method. sft: rows to imitate. dpo: pairs of a preferred and a rejected answer. "
        "kto: answers that are desirable or undesirable. reward: a reward model of such pairs as dpo has. "
        "distill: rows as sft has, and a teacher whose probabilities are learnt. "
        "grpo, rloo: prompts, whose completions are rewarded.",
    )
    train_dataset_path: str | None = Field(
        None,
        description="File, folder or Hub data set to train on. Default: channel `train`, or all channels named "
        "`train_...`.",
    )
    val_dataset_path: str | None = Field(
        None,
        description="File, folder or Hub data set to evaluate on. Default: channel `validation` or `val`, if there "
        "is one.",
    )
    dataset_config: str | None = Field(None, description="Configuration of a Hub data set. Default: its only one.")
    dataset_train_split: str = Field("train", description="Split of a Hub data set to train on.")
    dataset_test_split: str = Field("test", description="Split of a Hub data set to evaluate on.")
    dataset_format: DatasetFormat = Field("auto", description="Format of the rows. auto: told by their fields.")
    text_field: str = Field("text", min_length=1, description="Field that holds a row's text.")
    messages_field: str = Field("messages", min_length=1, description="Field that holds a row's conversation.")
    max_length: int | None = Field(
        2048,
        ge=2,
        description="Length of the longest row, in tokens. null: no limit. Default: less where the model has a table "
        "of positions with fewer, as GPT-2 has.",
    )
    apply_truncation: bool = Field(
        True, description="Cut rows that are longer than `max_length`. false: leave them out."
    )
    assistant_only_loss: bool | None = Field(
        None,
        description="Train only on what the assistant says. Default: in conversations whose chat template marks the "
        "assistant's turns.",
    )
    escape_control_tokens: bool = Field(
        False,
        description="Take control tokens in a row's own texts, such as `<|im_end|>` in a user's message, for plain "
        "characters. Only the chat template writes control tokens then.",
    )
    train_weights: dict[str, float] | None = Field(
        None,
        description="Share of each training channel in the rows of an epoch, by the name of the channel. Default: "
        "each row comes once.",
    )
    max_bad_rows_fraction: float = Field(
        0,
        ge=0,
        lt=1,
        description="Share of rows that may be bad before the job stops. Bad rows are left out and listed.",
    )
    max_image_pixels: int = Field(
        50_000_000,
        ge=1,
        le=150_000_000,
        description="Pixels of the largest image that a row may have: three bytes of memory each. Larger ones make bad "
        "rows.",
    )
    max_images_per_row: int | None = Field(
        None,
        ge=1,
        description="Most images that a row may have, and a request to a server of the result. Rows with more are bad "
        "rows. Default: any number, and twice the most of a row for a server.",
    )
    allow_remote_images: bool = Field(
        False, description="Fetch images that rows name by an address of the internet, once, before the training."
    )
    streaming: bool = Field(
        False, description="Tokenize while training, without a copy on disk. Needs `max_steps`, and excludes `packing`."
    )
    dataset_num_proc: int | None = Field(
        None, ge=1, description="Processes a host that tokenize. Default: one a CPU core."
    )
    packing: bool | None = Field(
        None,
        description="Put several rows into one sequence in place of padding them. Default: the rows of a batch, "
        "where the model keeps them apart. true: rows of the whole data set, and a batch counts "
        "sequences of `max_length` tokens.",
    )

    @property
    def sequences_a_row(self) -> int:
        """The sequences that the model computes for a row: two answers of a pair."""
        return 2 if self.method in PAIR_METHODS else 1

    @property
    def trains_rewards(self) -> bool:
        """True where the result is a reward model, which gives a number and no text."""
        return self.method == "reward"

    @property
    def is_judged(self) -> bool:
        """True where a row's answer is desirable or undesirable."""
        return self.method == "kto"

    @property
    def has_answers(self) -> bool:
        """True where rows are answers to prompts, one or several a row, and have numbers."""
        return self.method in (*PAIR_METHODS, *REFERENCE_METHODS)

    @property
    def generates(self) -> bool:
        """True where the model writes what it is trained on."""
        return self.method in GENERATION_METHODS


@with_trl_config_fields(
    "use_cpu",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "parallelism_config",
    "accelerator_config",
    "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb",
    "ddp_broadcast_buffers",
    "ddp_static_graph",
    "ddp_backend",
    "ddp_timeout",
    "activation_checkpointing_kwargs",
)
class ParallelismSettings(Section):
    """The processes and hosts of the job, and how a model and its step fit on them."""

    distribution: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="Give each GPU a copy of the model (ddp) or a shard of it (fsdp). auto: fsdp where a copy does "
        "not fit.",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Compute activations again in the backward pass, to save memory. Default: in as many layers as "
        "must be. true and false: in all, in none.",
    )
    activation_offloading: bool | None = Field(
        None,
        description="Keep activations in the host's memory until the backward pass. Default: where it is needed.",
    )
    check_memory: bool = Field(
        True, description="Stop before the weights load if the job, by estimate, cannot fit. false: try it."
    )
    nproc_per_node: int | None = Field(
        None, ge=1, description="Worker processes a host. Default: one a GPU, or one on a CPU."
    )
    max_restarts: int = Field(0, ge=0, description="Restarts from the newest checkpoint after a worker has died.")
    min_hosts: int | None = Field(
        None,
        ge=1,
        description="The fewest hosts to train with, where others do not come or are lost. Default: all of the job's, "
        "and a lost host ends it.",
    )
    host_timeout_seconds: int = Field(
        900,
        ge=1,
        description="Seconds to wait for the other hosts at the start, and with min_hosts for another one in the place "
        "of one that is lost.",
    )
    require_efa: bool = Field(
        True,
        description="Stop where several GPU hosts have EFA and the image cannot use it. false: they talk over TCP, "
        "many times slower.",
    )


@with_trl_config_fields(
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
)
class TrackingSettings(Section):
    """The trackers that see the run, and what the report shows."""

    mlflow_uri: str | None = Field(None, description="Address of an MLflow tracking server. It switches MLflow on.")
    mlflow_experiment_name: str | None = Field(None, description="Name of the MLflow experiment.")
    wandb_project: str | None = Field(
        None, description="Name of the Weights & Biases project. W&B is on where there is a key."
    )
    wandb_token: SecretStr | None = Field(
        None, description="W&B key, or the ARN of a secret. WANDB_API_KEY in the job's Environment is safer."
    )
    track_model: bool = Field(False, description="Upload the exported files to the trackers, too.")
    sample_prompts: int = Field(
        3,
        ge=0,
        description="Number of held-out prompts that the model answers before and after the training. The report "
        "shows the answers.",
    )


@with_trl_config_fields(
    "push_to_hub",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_strategy",
    "hub_always_push",
    "hub_revision",
)
class OutputSettings(Section):
    """The files that the job leaves, and their places."""

    output_dir: str | None = Field(
        None, description="Folder of the exported model, as a whole path. Default: /opt/ml/model."
    )
    checkpoint_dir: str | None = Field(
        None,
        description="Folder of the checkpoints, as a whole path. Default: CheckpointConfig's, or /opt/ml/checkpoints.",
    )
    merge_weights: bool = Field(False, description="Export the merged model, with the adapter beside it.")
    merge_base: Literal["bf16", "dequantized"] = Field(
        "bf16",
        description="What a QLoRA adapter is merged into: the original weights (bf16), or the dequantized ones.",
    )
    mlflow_register_model: str | None = Field(
        None,
        min_length=1,
        description="Name under which the result is registered in MLflow. Default: it is not registered.",
    )


@with_method_fields
class MethodSettings(Section):
    """The settings that not all training methods have, or that differ between them. None: the method's default."""

    teacher_load_in_4bit: bool = Field(
        False, description="Load the teacher of distill in 4 bit, as `bnb_4bit_quant_type` says."
    )
    teacher_load_in_8bit: bool = Field(False, description="Load the teacher of distill in 8 bit (LLM.int8()).")

    reward_functions: list[str] = Field(
        [],
        description="Rewards of grpo and rloo: built-in ones by name, such as exact_match, and functions of yours as "
        "FILE.py:NAME.",
    )
    reward_options: dict[str, dict[str, Any]] = Field(
        {}, description="Options of the rewards of grpo and rloo, by the names in `reward_functions`."
    )
    reward_timeout_seconds: float = Field(
        60, gt=0, description="Seconds that a call of a reward function may take before the job ends."
    )

    def find_value(self, name: str, method: str) -> Any:
        """Return a setting of the method, its default where it is not given."""
        given = self.value(name)
        return METHOD_FIELDS[name][method].default if given is None else given

    def count_written(self, method: str) -> int:
        """Return the tokens that a completion of a prompt has at most, 0 where the model writes none."""
        return int(self.find_value("max_completion_length", method)) if method in GENERATION_METHODS else 0


@with_trl_config_fields(
    *list_remaining_fields(
        *(ModelSettings, AdapterSettings, DataSettings, MethodSettings, ParallelismSettings, TrackingSettings),
        OutputSettings,
    )
)
class TrainingSettings(Section):
    """The steps of the training: their length, checkpoints and end."""

    use_checkpoints: bool = Field(
        True, description="Save checkpoints, ten times a run unless `save_steps` says otherwise, and resume from them."
    )
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="Rows of a step on all devices together, or sequences that `packing=true` filled. The job derives "
        "`per_device_train_batch_size`, the largest whose memory fits, and `gradient_accumulation_steps` from it.",
    )
    global_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="The same for `packing=true`, as the tokens of a step's sequences: a multiple of `max_length`.",
    )
    max_run_seconds: int | None = Field(
        None,
        ge=1,
        description="Save, export and end before so many seconds are over. Give the job's MaxRuntimeInSeconds.",
    )
    early_stopping: bool = Field(False, description="Stop when eval_loss no longer falls, and keep the best weights.")
    early_stopping_patience: int = Field(
        3, ge=1, description="Evaluations without a fall of eval_loss before the training stops."
    )
