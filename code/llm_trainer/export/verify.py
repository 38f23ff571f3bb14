# SPDX-License-Identifier: Apache-2.0
"""The check of an export: it is loaded as its consumers load it, and compared with what was trained."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Mxfp4Config, PreTrainedModel

from llm_trainer.common.errors import quote_error
from llm_trainer.common.safetensors_files import count_weights, read_header
from llm_trainer.export.logits_check import (
    ROUNDING,
    CheckPlace,
    Expectation,
    ResultDiffersError,
    choose_place,
    compare_logits,
    compute_logits,
    describe_unproven,
)
from llm_trainer.export.result import TrainingResult
from llm_trainer.model.attention import choose_attention, find_faults, read_needs
from llm_trainer.model.device import Device
from llm_trainer.model.layers.float8 import convert_base
from llm_trainer.model.loading import WrongWeightsError, build_skeleton, load_model
from llm_trainer.model.plan import ModelPlan


@dataclass(frozen=True)
class WrittenModel:
    """A model that was written, as the check names and measures it."""

    what: str
    size_bytes: int  # once it is loaded
    tolerance: float | None  # of its logits, relative to the largest one


def prove_trained(
    trained: TrainingResult, folder: Path, expected: list[torch.Tensor], trained_bytes: int
) -> Iterator[dict[str, Any]]:
    """Load the written adapter on its base, or the whole weights, and compare with the expected logits.

    `trained_bytes` is the size of the trained model. Raises ResultDiffersError where the files are not whole, or the
    logits differ.
    """
    check_files(folder)
    adapter_settings, tolerance = trained.settings.adapter, find_rounding(trained)
    if adapter_settings.init_lora_weights == "loftq":
        # It made up for quantization, and is exported for the base without quantization: the logits may differ.
        check = WrittenModel("The adapter on the original weights", measure_base(trained), None)
    elif adapter_settings.use_peft:
        check = WrittenModel("The adapter on its base", trained_bytes, tolerance)
    else:
        check = WrittenModel("The exported model", measure_weights(folder, trained.plan), tolerance)
    place = choose_place(check.size_bytes, trained.plan.device, trained.places.scratch_dir)
    if place.placement and adapter_settings.use_peft:
        yield describe_unproven(check.what, check.size_bytes)
        return
    expectation = Expectation(trained.rows, expected, check.tolerance)
    if adapter_settings.use_peft:
        model = load_adapted_model(trained, folder, place, adapter_settings.init_lora_weights != "loftq")
        yield from leave_original(trained, model, expectation, place)
    else:
        model = load_whole_model(trained, folder, place)
    yield compare_logits(check.what, expectation, model, place)


def leave_original(
    trained: TrainingResult, model: PeftModel, expectation: Expectation, place: CheckPlace
) -> Iterator[dict[str, Any]]:
    """Have a base multiply in float8 where it did so in the training.

    Yield how far the logits of the original lie from what is expected, which is no mistake.
    """
    if trained.plan.float8_layers:
        what = "The adapter on its base without float8"
        yield compare_logits(what, replace(expectation, tolerance=None), model, place)
        convert_base(model, trained.plan.float8_layers)


def prove_merged(trained: TrainingResult, adapter: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Load the merged weights, and compare them with the adapter on the base that it was merged into.

    A merge into the original of a quantized base also records the difference from the quantized one. That difference is
    no mistake. Raises ResultDiffersError where the files are not whole, or the logits differ.
    """
    check_files(folder)
    plan, rows = trained.plan, trained.rows
    assert trained.logits is not None
    rounding = find_rounding(trained)
    place = choose_place(measure_weights(folder, plan), plan.device, trained.places.scratch_dir)
    if not is_merged_into_other_base(trained):
        # LLM.int8() rounds the inputs of its products too, which no merged weights do.
        expected = Expectation(rows, trained.logits, None if is_in_8_bit(plan) else rounding)
        yield compare_logits("The merged model", expected, load_whole_model(trained, folder, place), place)
        return
    on_original = compute_original_logits(trained, adapter)
    if on_original is None:
        yield describe_unproven("The adapter on the original weights", measure_base(trained))
    merged = load_whole_model(trained, folder, place)
    if on_original is not None:
        yield compare_logits("The merged model", Expectation(rows, on_original, rounding), merged, place)
    what = "The merged model, beside the adapter on its quantized base,"
    yield compare_logits(what, Expectation(rows, trained.logits, None), merged, place)


def find_rounding(trained: TrainingResult) -> float:
    """Return the difference of logits that rounding explains, relative to the largest logit.

    The settings bf16 and fp16 had the training compute in a coarser type than the written model's.
    """
    arguments, compute = trained.trainer.args, trained.plan.precision.compute
    mixed = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else compute
    return max(ROUNDING[compute], ROUNDING[mixed])


def is_merged_into_other_base(trained: TrainingResult) -> bool:
    """Tell whether the training rounded its base, and the merge took the original one."""
    model_settings, output_settings = trained.settings.model, trained.settings.output
    is_quantized = model_settings.load_in_4bit or model_settings.load_in_8bit
    return bool(trained.plan.float8_layers) or (is_quantized and output_settings.merge_base == "bf16")


def compute_original_logits(trained: TrainingResult, adapter: Path) -> list[torch.Tensor] | None:
    """Return the logits of the adapter on the base as it is stored; None where no memory holds that base."""
    place = choose_place(measure_base(trained), trained.plan.device, trained.places.scratch_dir)
    if place.placement:
        return None
    return compute_logits(load_adapted_model(trained, adapter, place, False), trained.rows, place.device)


def is_in_8_bit(plan: ModelPlan) -> bool:
    """Tell whether the base is in 8 bit, quantized for the training or as it is stored."""
    stored = getattr(plan.config, "quantization_config", None) or {}
    return bool(getattr(plan.quantization, "load_in_8bit", False) or stored.get("load_in_8bit"))


def measure_weights(folder: Path, plan: ModelPlan) -> int:
    """Return the bytes of a folder's weights in the type of the computation."""
    return plan.precision.compute.itemsize * count_weights(folder)


def measure_base(trained: TrainingResult) -> int:
    """Return the bytes of the original base in the type of the computation."""
    return measure_weights(trained.base_folder, trained.plan)


def check_files(folder: Path) -> None:
    """Raise ResultDiffersError for weights in a folder that cannot be read: no library could load them."""
    for file in folder.glob("*.safetensors"):
        try:
            read_header(file)
        except ValueError as error:
            raise ResultDiffersError(f"{file.name} was not written whole ({quote_error(error)}).") from error


def load_adapted_model(trained: TrainingResult, adapter: Path, place: CheckPlace, quantized: bool) -> PeftModel:
    """Return the base with the adapter of a folder: quantized as it was trained on, or as it is stored."""
    plan, settings = trained.plan, trained.settings
    quantization = plan.quantization if quantized or isinstance(plan.quantization, Mxfp4Config) else None
    options = replace(plan.load_options, attention=choose_kernel(trained, place), quantization=quantization)
    base = load_model(plan.folder, settings.model, options, place.device)
    if plan.is_reward:  # as the model card has it: by the base's pad token, Transformers may miss the last one
        base.config.get_text_config().pad_token_id = trained.tokenizer.pad_token_id
    return PeftModel.from_pretrained(base, str(adapter))


def load_whole_model(trained: TrainingResult, folder: Path, place: CheckPlace) -> PreTrainedModel:
    """Return the model of a folder of weights, as a consumer loads it.

    Raises ResultDiffersError where the files lack a part of it.
    """
    plan = trained.plan
    options = replace(plan.load_options, weights_dtype=plan.precision.compute, quantization=None)
    options = replace(options, attention=choose_kernel(trained, place))
    try:
        return load_model(str(folder), trained.settings.model, options, place.device, **place.placement)
    except WrongWeightsError as error:
        raise ResultDiffersError(*error.problems) from error


def choose_kernel(trained: TrainingResult, place: CheckPlace) -> str:
    """Return the attention kernel of the training, or on another device the fastest one there.

    A model that fits no GPU beside others is checked on the CPU, for which flash attention has no code.
    """
    plan = trained.plan
    if place.device == plan.device.torch:
        return plan.attention.name
    skeleton = build_skeleton(plan.folder, plan.config, trained.settings.model.trust_remote_code)
    device = Device(place.device)
    return choose_attention(read_needs(skeleton), "auto", plan.precision.compute, device, find_faults(device)).name
