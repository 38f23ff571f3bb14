# SPDX-License-Identifier: Apache-2.0
"""The plan of how a model is loaded and computed, made from its config alone, before data are read or weights load."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from peft import LoraConfig
from transformers import PreTrainedConfig, PreTrainedModel

from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import world_size
from llm_trainer.config.sections import AdapterSettings, ModelSettings, OutputSettings, ParallelismSettings
from llm_trainer.model.adapter_file import check_names
from llm_trainer.model.adapter_fit import check_earlier_adapter
from llm_trainer.model.attention import AttentionChoice, choose_attention, find_faults, read_needs
from llm_trainer.model.device import Device
from llm_trainer.model.kinds.text_pass import find_token_types
from llm_trainer.model.kinds.tower import check_tower, describe_tower
from llm_trainer.model.layers.float8 import check_float8
from llm_trainer.model.layers.reward_head import is_reward_model
from llm_trainer.model.liger import LigerChoice, choose_liger, find_known_types, leave_out_experts, try_on
from llm_trainer.model.loading import LoadOptions, build_skeleton, check_fit, read_config
from llm_trainer.model.lora import build_lora_config, has_idle_layers, list_trained_layers
from llm_trainer.model.parameter_roles import has_experts
from llm_trainer.model.positions import count_positions
from llm_trainer.model.precision import Precision, find_stored_dtype
from llm_trainer.model.quantization import (
    Quantization,
    build_quantization,
    describe_quantization,
    find_quantization_problems,
    keep_tower,
)
from llm_trainer.serving.limits import find_placement_refusals


@dataclass(frozen=True)
class PlanSettings:
    """The sections of the settings that the plan of a model depends on."""

    model: ModelSettings
    adapter: AdapterSettings
    parallelism: ParallelismSettings
    output: OutputSettings
    trains_rewards: bool = False  # whether the result is a reward model


@dataclass(frozen=True, eq=False)
class ModelPlan:
    """Decisions on how the model of a folder is loaded and computed."""

    folder: str
    config: PreTrainedConfig
    device: Device
    precision: Precision
    quantization: Quantization | None
    attention: AttentionChoice
    liger: LigerChoice
    lora: LoraConfig | None  # None for full fine-tuning
    token_types: str | None = None  # name of an input that a training has to give, and that texts say nothing by
    float8_layers: tuple[str, ...] = ()  # names of the linear layers of the base that multiply in float8
    num_positions: int | None = None  # of its table, which no row may exceed; None where positions are computed
    leaves_idle: bool = False  # whether a batch may give some of the trained weights no gradient, as ranks have to know
    reasons: tuple[str, ...] = ()  # lines for the log

    @property
    def load_options(self) -> LoadOptions:
        """Options to load the base for training."""
        return LoadOptions(self.precision.weights, self.attention.name, self.quantization, self.is_reward)

    @property
    def is_reward(self) -> bool:
        """True for a reward model."""
        return is_reward_model(self.config)

    @property
    def num_embeddings(self) -> int:
        """The rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)


def plan_model(folder: str, settings: PlanSettings, device: Device, precision: Precision) -> ModelPlan:
    """Return the plan for the model of a folder.

    Raise UserError for what the settings ask of this model and it cannot do.
    """
    model_settings = settings.model
    config = read_config(folder, model_settings, settings.trains_rewards)
    sections = (model_settings, settings.adapter, settings.parallelism)
    if problems := list(find_quantization_problems(folder, config, *sections)):
        raise UserError(*problems)
    left_out = check_fit(folder, config, model_settings)
    quantization = build_quantization(config, model_settings, precision.compute, device)
    skeleton = build_skeleton(folder, config, model_settings.trust_remote_code)
    check_tower(folder, skeleton, settings.adapter.train_vision)
    quantization = keep_tower(quantization, skeleton)
    asked, faults = model_settings.attn_implementation, find_faults(device)
    attention = choose_attention(read_needs(skeleton), asked, precision.compute, device, faults)
    liger = choose_liger(config, model_settings, device, find_known_types(device))
    liger = leave_out_experts(liger, model_settings, has_experts(skeleton))
    liger = try_on(liger, model_settings, skeleton) if device.is_here else liger
    lora, start = plan_adapter(folder, model_settings, settings.adapter, skeleton)
    float8_layers = choose_float8_layers(model_settings, skeleton, device, precision)
    found = find_token_types(skeleton), float8_layers, count_positions(skeleton)
    plan = ModelPlan(folder, config, device, precision, quantization, attention, liger, lora, *found)
    idle = settings.adapter.train_vision or (lora is None and world_size() > 1 and has_idle_layers(skeleton))
    reasons = [*describe_left_out(left_out), *describe_plan(plan, skeleton, settings), *start]
    return replace(plan, leaves_idle=idle, reasons=tuple(reasons))


def plan_adapter(
    folder: str, model_settings: ModelSettings, settings: AdapterSettings, skeleton: PreTrainedModel
) -> tuple[LoraConfig | None, list[str]]:
    """Return PEFT's config of the adapter, None for full fine-tuning, and lines for the log on an earlier adapter.

    Raise UserError for an adapter that cannot be put on the model, or could not be read again.
    """
    if not settings.use_peft:
        return None, []
    lora = build_lora_config(model_settings, settings, skeleton)
    if settings.goes_on:
        return lora, [check_earlier_adapter(folder, skeleton.config, model_settings, settings)]
    check_names(lora, settings, skeleton)
    return lora, []


def choose_float8_layers(
    settings: ModelSettings, skeleton: PreTrainedModel, device: Device, precision: Precision
) -> tuple[str, ...]:
    """Return the names of the linear layers that multiply in float8. Raise UserError where the device cannot."""
    if settings.base_compute is None:
        return ()
    check_float8(device, precision.compute)
    return tuple(list_trained_layers(skeleton))


def describe_left_out(names: list[str]) -> Iterator[str]:
    """Yield a line for the log about tensors of the files that Transformers makes no use of."""
    if names:
        yield (
            f"Weights: {len(names)} tensors of the files are no part of the model, such as {names[0]}: they are not "
            "trained, and an export of all weights has none of them"
        )


def describe_plan(plan: ModelPlan, skeleton: PreTrainedModel, settings: PlanSettings) -> Iterator[str]:
    """Yield the plan's lines for the log. An adapter that is merged is not served, and gets no warnings about it."""
    yield from describe_tower(skeleton, settings.adapter.train_vision)
    yield plan.precision.describe(find_stored_dtype(plan.folder, plan.config))
    if plan.quantization is not None:
        yield describe_quantization(plan.folder, skeleton, plan.quantization, plan.precision.weights)
    yield str(plan.attention)
    yield str(plan.liger)
    if plan.num_positions is not None:
        yield f"Positions: a table of {plan.num_positions}, so that no row may be longer"
    if plan.lora is not None and not settings.output.merge_weights:
        refusals = find_placement_refusals(plan.lora, plan.config.get_text_config().model_type)
        yield from (f"Warning: {text}" for text in refusals)
