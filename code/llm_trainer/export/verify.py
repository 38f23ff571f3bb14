# SPDX-License-Identifier: Apache-2.0
"""Loads what was exported as its consumers will, and has it proven."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Mxfp4Config, PreTrainedModel

from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import count_weights
from llm_trainer.export.logits_check import (
    ROUNDING,
    CheckPlace,
    Expectation,
    choose_place,
    compare_logits,
    compute_logits,
    describe_unproven,
)
from llm_trainer.export.result import TrainingResult
from llm_trainer.model.loading import LoadOptions, load_model
from llm_trainer.model.plan import ModelPlan

REJECTED = "rejected_export"  # in output/data


def prove_trained(
    trained: TrainingResult, folder: Path, expected: list[torch.Tensor], trained_bytes: int
) -> dict[str, Any]:
    """Load the adapter on its base as it was trained on, or the whole weights, and compare.

    Raises UserError that tells where the folder has been put, so that it is neither lost nor taken for the model.
    """
    plan, settings, rows = trained.plan, trained.settings, trained.rows
    tolerance: float | None = ROUNDING[plan.precision.compute]
    if (
        settings.adapter.init_lora_weights == "loftq"
    ):  # made up for quantization, and is exported for the base without it
        what, model_bytes, tolerance = "The adapter on the original weights", measure_base(trained), None
    elif settings.adapter.use_peft:
        what, model_bytes = "The adapter on its base", trained_bytes
    else:
        what, model_bytes = "The exported model", measure_weights(folder, plan)
    place = choose_place(model_bytes, plan.device, trained.places.scratch_dir)
    if not settings.adapter.use_peft:
        model = load_whole(trained, folder, place)
    elif place.placement:
        return describe_unproven(what, model_bytes)
    else:
        model = load_adapted(trained, folder, place, quantized=settings.adapter.init_lora_weights != "loftq")
    try:
        return compare_logits(what, Expectation(rows, expected, tolerance), model, place)
    except UserError as error:
        rejected = trained.places.output_dir / "data" / REJECTED
        shutil.rmtree(rejected, ignore_errors=True)
        shutil.move(folder, rejected)
        raise UserError(f"{error} What was written is in {rejected}, and the checkpoints are kept.") from error


def prove_merged(trained: TrainingResult, adapter: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Load the merged weights, and compare them with the adapter on the base that it was merged into.

    Where that is another base than the quantized one that was trained on, the difference to the latter is recorded too;
    it is no mistake.
    """
    plan, settings, rows = trained.plan, trained.settings, trained.rows
    assert trained.logits is not None
    what, rounding = "The merged model", ROUNDING[plan.precision.compute]
    # LLM.int8() rounds the inputs of its products too, which no merged weights do.
    tolerance = None if is_in_8_bit(plan) else rounding
    is_other_base = (
        settings.model.load_in_4bit or settings.model.load_in_8bit
    ) and settings.output.merge_base == "bf16"
    place = choose_place(measure_weights(folder, plan), plan.device, trained.places.scratch_dir)
    on_original = None
    if is_other_base:
        base_bytes = measure_base(trained)
        base_place = choose_place(base_bytes, plan.device, trained.places.scratch_dir)
        if base_place.placement:
            yield describe_unproven("The adapter on the original weights", base_bytes)
        else:
            adapted = load_adapted(trained, adapter, base_place, quantized=False)
            on_original = compute_logits(adapted, rows, base_place.device)
            del adapted  # before the other model is loaded
    merged = load_whole(trained, folder, place)
    if on_original is not None:
        yield compare_logits(what, Expectation(rows, on_original, rounding), merged, place)
    if is_other_base:
        what, tolerance = "The merged model, beside the adapter on its quantized base,", None
    yield compare_logits(what, Expectation(rows, trained.logits, tolerance), merged, place)


def is_in_8_bit(plan: ModelPlan) -> bool:
    stored = getattr(plan.config, "quantization_config", None) or {}
    return bool(getattr(plan.quantization, "load_in_8bit", False) or stored.get("load_in_8bit"))


def measure_weights(folder: Path, plan: ModelPlan) -> int:
    """Bytes of a folder's weights in the type of the computation."""
    return plan.precision.compute.itemsize * count_weights(folder)


def measure_base(trained: TrainingResult) -> int:
    return measure_weights(trained.base_folder, trained.plan)


def load_adapted(trained: TrainingResult, adapter: Path, place: CheckPlace, quantized: bool) -> PeftModel:
    """The base, as it was trained on or as it is stored, with the adapter of a folder."""
    plan, settings = trained.plan, trained.settings
    quantization = plan.quantization if quantized or isinstance(plan.quantization, Mxfp4Config) else None
    options = replace(plan.load_options, quantization=quantization)
    base = load_model(plan.folder, settings.model, options, place.device)
    return PeftModel.from_pretrained(base, str(adapter))


def load_whole(trained: TrainingResult, folder: Path, place: CheckPlace) -> PreTrainedModel:
    """Weights that were written, as a consumer loads them."""
    plan, settings = trained.plan, trained.settings
    options = LoadOptions(plan.precision.compute, plan.attention.name)
    return load_model(str(folder), settings.model, options, place.device, **place.placement)
