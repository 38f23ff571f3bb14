# SPDX-License-Identifier: Apache-2.0
"""The check that an earlier adapter belongs to the model which the training goes on with, before any weights load."""

import re
from collections.abc import Iterator
from pathlib import Path

from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedConfig, PreTrainedModel

from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import compute_sampled_digest, read_header
from llm_trainer.config.sections import AdapterSettings, ModelSettings
from llm_trainer.journal.manifest import MANIFEST, read_leftover_manifest
from llm_trainer.model.adapter_file import attach_adapter, list_adapter_tensors
from llm_trainer.model.kinds.tower import list_tower
from llm_trainer.model.loading import build_skeleton
from llm_trainer.model.lora import (
    build_lora_config,
    choose_targets,
    find_parameter_problems,
    find_refused_targets,
    is_target,
    matches_end,
)

MERGE_FIRST = "merge the adapter with `llm-trainer merge`, and give the result as the model."
OWN_PART = re.compile(r"^base_model\.model\.|(\.base_layer)*\.(weight|bias)$")  # what is not the name of a module


def check_earlier_adapter(
    folder: str, config: PreTrainedConfig, model_settings: ModelSettings, settings: AdapterSettings
) -> str:
    """Return a line for the log on the adapter that the training goes on from.

    `folder` and `config` are the base's. Raise UserError where the adapter belongs to another base, cannot be trained,
    or has other targets than the user asks for.
    """
    adapter = Path(str(settings.adapter_path))
    if problem := find_other_base(Path(folder), adapter):
        raise UserError(problem)
    skeleton = build_skeleton(folder, config, model_settings.trust_remote_code)
    lora = build_lora_config(model_settings, settings, skeleton)
    refused = find_refused_targets(lora, skeleton, MERGE_FIRST)
    problems = [f"The adapter in {adapter} cannot be trained here: {text}" for text in refused]
    problems += find_parameter_problems(lora.target_parameters, settings) if lora.target_parameters else []
    asked = list_asked_targets(model_settings, settings, skeleton)
    attached = attach_adapter(skeleton, adapter)  # changes the skeleton
    problems += find_other_targets(attached, settings, asked)
    problems += find_base_weights(attached, adapter)
    problems += find_other_sight(skeleton, settings)
    if problems:
        raise UserError(*problems)
    return describe_start(lora, adapter)


def find_other_base(base: Path, adapter: Path) -> str | None:
    """Return a sentence where the manifest beside an adapter tells of other weights than the base's, else None."""
    told = read_leftover_manifest(adapter)[0].get("base_digest")
    found = compute_sampled_digest(base) if told else None
    if not found or found == told:
        return None
    return (
        f"The adapter in {adapter} was trained on other weights than those of {base}, by its {MANIFEST}: give the base "
        f"that it was trained on; or remove that {MANIFEST}, if it is the same base in another form."
    )


def list_asked_targets(
    model_settings: ModelSettings, settings: AdapterSettings, skeleton: PreTrainedModel
) -> set[str] | None:
    """Return the names of the modules that the user asks for adapters on; None where the adapter decides that."""
    if not settings.is_given("target_modules") or settings.target_modules == "auto":
        return None
    modules, _ = choose_targets(model_settings, settings, skeleton)
    asked = LoraConfig(target_modules=modules)
    return {name for name, module in skeleton.named_modules() if name and is_target(asked, name, module, skeleton)}


def find_other_targets(attached: PeftModel, settings: AdapterSettings, asked: set[str] | None) -> Iterator[str]:
    """Yield a sentence for each setting that names other targets than the adapter has."""
    tuner, fix = attached.base_model, "which the training goes on from, sits on"
    modules = sorted({name.rpartition(".")[2] for name in tuner.targeted_module_names})
    if asked is not None and asked != set(tuner.targeted_module_names):
        yield (
            f"target_modules={settings.target_modules!r}: the adapter in {settings.adapter_path}, {fix} others "
            f"({', '.join(modules)}); remove target_modules."
        )
    parameters, names = settings.target_parameters, tuner.targeted_parameter_names
    if settings.is_given("target_parameters") and parameters is not None:
        is_same = all(any(matches_end(name, each) for each in parameters) for name in names) and all(
            any(matches_end(name, each) for name in names) for each in parameters
        )
        if not is_same:
            yield (
                f"target_parameters={parameters!r}: the adapter in {settings.adapter_path}, {fix} other parameters; "
                "remove target_parameters."
            )


def find_other_sight(attached: PreTrainedModel, settings: AdapterSettings) -> Iterator[str]:
    """Yield a sentence where an adapter sits on a model's tower and is not to train it, or the other way round."""
    given = f"train_vision={str(settings.train_vision).lower()}: the adapter in {settings.adapter_path}"
    sees = any(".lora_" in name for name in list_tower(attached))
    if sees and not settings.train_vision:
        yield (
            f"{given} sits on the part that sees images, too, and would go on training it: set train_vision=true, or "
            "merge it first with merge_adapter=true."
        )
    if settings.train_vision and not sees:
        yield f"{given} does not sit on the part that sees images: leave train_vision out."


def find_base_weights(attached: PeftModel, adapter: Path) -> Iterator[str]:
    """Yield a sentence where an adapter's file holds weights of the base, which would be changed and not exported."""
    expected = list_adapter_tensors(attached).keys()
    targeted = set(attached.base_model.targeted_module_names)
    for name in sorted(read_header(adapter / SAFETENSORS_WEIGHTS_NAME)):
        if name not in expected and ".lora_" not in name and OWN_PART.sub("", name) not in targeted:
            yield f"The adapter in {adapter} also holds {name}, a weight of the base itself: {MERGE_FIRST}"
            return


def describe_start(lora: LoraConfig, adapter: Path) -> str:
    """Return a line for the log on the adapter that the training goes on from."""
    kind = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    return (
        f"Adapter: {kind} of rank {lora.r} and alpha {lora.lora_alpha:g}, as in {adapter}: the training goes on from "
        "its values, with a new optimizer and a new schedule"
    )
