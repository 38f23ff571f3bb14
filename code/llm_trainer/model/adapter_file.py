# SPDX-License-Identifier: Apache-2.0
"""An adapter's config and weights as they are stored: put on a model's skeleton, or into a model that is trained.

Only safetensors are read. A tensor that is missing, or that fits nothing, is never passed over.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    TaskType,
    get_peft_model,
)
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers as convert_names,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from llm_trainer.common.errors import UserError, cut_quote, quote_error
from llm_trainer.common.safetensors_files import read_header
from llm_trainer.config.sections import MOVING_STARTS, AdapterSettings
from llm_trainer.model.lora_init import ADAPTER, SAID_FIELDS

BASE_CHANGING_STARTS = (*MOVING_STARTS, "corda", "lora_ga")
# Fields of an adapter's config that are trained on as they are, or mean nothing for a training.
TAKEN_FIELDS = frozenset(
    {*SAID_FIELDS, "auto_mapping", "peft_version", "target_parameters", "exclude_modules", "layers_to_transform"}
    | {"layers_pattern", "lora_bias", "loftq_config"}
)


def build_trained_config(settings: AdapterSettings) -> LoraConfig:
    """Return PEFT's config of the earlier adapter, with the settings' dropout, for a training that goes on from it.

    Raise UserError for one that cannot be trained here.
    """
    config = read_adapter_config(Path(str(settings.adapter_path)))
    if problems := list(find_untaken_fields(config, settings)):
        raise UserError(*problems)
    config.inference_mode, config.task_type = False, TaskType.CAUSAL_LM
    config.base_model_name_or_path = config.revision = config.auto_mapping = None  # those of this job count
    # PEFT has no dropout for adapters on parameters.
    config.lora_dropout = 0.0 if config.target_parameters else settings.lora_dropout
    return config


def find_untaken_fields(config: LoraConfig, settings: AdapterSettings) -> Iterator[str]:
    """Yield a sentence for each field by which the adapter is of a kind that is not trained here."""
    defaults = LoraConfig().to_dict()
    for name, value in sorted(config.to_dict().items()):
        if name not in TAKEN_FIELDS and value not in (None, [], {}, defaults.get(name)):
            yield (
                f"The adapter in {settings.adapter_path} has {name}={cut_quote(repr(value))}, which is not trained "
                "here: merge it into its base with PEFT, and give the result as the model."
            )


def check_names(config: LoraConfig, settings: AdapterSettings, skeleton: PreTrainedModel) -> None:
    """Raise UserError where PEFT would read a new adapter by other names than those that it writes.

    It renames weights as Transformers does with those of older checkpoints. Some patterns take new names for old ones.
    """
    if get_checkpoint_conversion_mapping(skeleton.config.model_type) is None:
        return
    own = replace(copy.deepcopy(config), init_lora_weights=True)  # other ways to begin read the weights
    with torch.device("meta"):
        model = get_peft_model(copy.deepcopy(skeleton), own)
    written = list_adapter_tensors(model)
    converted = convert_names(model, own, written, ADAPTER)
    read = {f"{name}.".replace(f".{ADAPTER}.", ".").removesuffix(".") for name in converted}
    if lost := sorted(written.keys() - read):
        raise UserError(
            f"target_modules={cut_quote(repr(settings.target_modules))}: PEFT would read {len(lost)} of the "
            f"{len(written)} weights of this adapter by other names than it writes, first {lost[0]}: name other layers "
            "with target_modules, or set use_peft=false."
        )


def load_trained_values(model: PeftModel, settings: AdapterSettings) -> None:
    """Give a model's adapter the values of the earlier one. Raise UserError where they are not the same tensors.

    Every rank calls this. Where the model is sharded later, the first rank's are sent to the others.
    """
    file = Path(str(settings.adapter_path)) / SAFETENSORS_WEIGHTS_NAME
    try:
        weights: dict[str, torch.Tensor] = {name: tensor.float() for name, tensor in load_file(file).items()}
        found = set_peft_model_state_dict(model, weights, ADAPTER)
    except (RuntimeError, KeyError, ValueError, SafetensorError, OSError) as error:
        raise UserError(f"{file} does not fit the model: {quote_error(error)}.") from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wrong = sorted({*found.unexpected_keys, *trained.intersection(found.missing_keys)})
    if wrong:
        raise UserError(f"{file} does not fit the model: {len(wrong)} tensors differ, first {wrong[0]}.")


def attach_adapter(skeleton: PreTrainedModel, adapter: Path) -> PeftModel:
    """Return the skeleton with the adapter of a folder, whose tensors are in float32.

    Raise UserError when they do not fit each other, or the adapter holds numbers that are not finite.
    """
    config = read_adapter_config(adapter)
    fill_with_placeholders(skeleton)
    file = adapter / SAFETENSORS_WEIGHTS_NAME
    try:
        wrap = PeftModelForSequenceClassification if config.task_type == TaskType.SEQ_CLS else PeftModelForCausalLM
        model = wrap(skeleton, config, ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"The adapter in {adapter} does not fit the base: {quote_error(error)}.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in list_adapter_tensors(model).items()}
    try:
        weights = {name: tensor.float() for name, tensor in load_file(file).items()}
        result = set_peft_model_state_dict(model, weights, ADAPTER, low_cpu_mem_usage=True)
    except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(find_difference(file, shapes) or f"{file} does not fit: {quote_error(error)}.") from error
    is_missing = any(parameter.is_meta for name, parameter in model.named_parameters())
    if is_missing or result.unexpected_keys:
        raise UserError(find_difference(file, shapes) or f"{file} does not fit the base: {result.unexpected_keys[:1]}.")
    broken = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if broken:
        raise UserError(f"{file}: {broken} holds numbers that are not finite: the training diverged; train again.")
    return model


def fill_with_placeholders(skeleton: PreTrainedModel) -> None:
    """Make each parameter a single number that looks like a tensor of the right shape.

    On the meta device PEFT would move the adapter there, too.
    """
    for module in skeleton.modules():
        for name, parameter in module.named_parameters(recurse=False):
            placeholder = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(placeholder, requires_grad=False))


def read_adapter_config(adapter: Path) -> LoraConfig:
    """Return PEFT's config of the adapter in a folder. Raise UserError for one that belongs to no base as it is."""
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise UserError(f"{adapter / 'adapter_config.json'} cannot be read: {quote_error(error)}.") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"The adapter in {adapter} is of type {config.peft_type}: only LoRA adapters are read.")
    init = config.init_lora_weights
    if isinstance(init, str) and init.startswith(BASE_CHANGING_STARTS):
        raise UserError(
            f"The adapter in {adapter} began with init_lora_weights={init} and belongs to a base that this changed: "
            "save it with path_initial_model_for_weight_conversion, as PEFT calls it, or export it again here."
        )
    config.init_lora_weights, config.inference_mode = True, True  # the values come from the file
    return config


def list_adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return the tensors that the adapter's file has to hold, by name."""
    return get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)


def find_difference(file: Path, expected: dict[str, tuple[int, ...]]) -> str | None:
    """Return a sentence about the first tensor of the file that is not as this base needs it, or None."""
    found = {name: tuple(tensor["shape"]) for name, tensor in read_header(file).items()}
    fix = "give the base that the adapter was trained on."
    for name, shape in found.items():
        if name in expected and shape != expected[name]:
            return f"{file}: {name} has shape {list(shape)}, and the base needs {list(expected[name])}: {fix}"
    for name, shape in found.items():
        if name not in expected and ".lora_" in name:
            return f"{file}: {name} of shape {list(shape)} fits nothing in the base: {fix}"
    missing = next((name for name in expected if name not in found), None)
    return missing and f"{file} lacks {missing}, of shape {list(expected[missing])}: {fix}"
