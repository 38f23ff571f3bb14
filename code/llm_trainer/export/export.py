# SPDX-License-Identifier: Apache-2.0
"""The result of a job in /opt/ml/model: an adapter or whole weights, proven, with the files that a server needs."""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from llm_trainer.common import log
from llm_trainer.common.activity_notes import note_activity
from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.files import remove_path
from llm_trainer.export.model_card import write_model_card
from llm_trainer.export.publish import Artefacts, advise_compression, publish
from llm_trainer.export.result import TrainingResult
from llm_trainer.export.verify import prove_merged, prove_trained
from llm_trainer.journal.manifest import MANIFEST, Manifest, read_manifest
from llm_trainer.merge.merge import write_merged_model
from llm_trainer.merge.plan import MergeRequest
from llm_trainer.model.lora_init import BaseReference, save_adapter
from llm_trainer.serving.lmi_files import ServedModel, write_serving_files

STAGING = ".llm-trainer-export"  # beside the result, so that moving a finished file there is a rename
ADAPTER = "adapter"  # the folder beside merged weights


def export_result(trained: TrainingResult, manifest: Manifest) -> None:
    """Write the result, prove it, and publish it. Only global rank 0 calls this.

    Raises UserError when the files that were written do not compute what was trained.
    """
    model_dir, settings = trained.places.model_dir, trained.settings
    with note_activity("writing the result", model_dir):
        write_result(trained, manifest)
    if advice := advise_compression(model_dir):
        log.info(advice)
    if not trained.trainer.stopped:
        publish(settings.output, settings.tracking, Artefacts(model_dir, trained.architecture, trained.base))


def write_result(trained: TrainingResult, manifest: Manifest) -> None:
    """Write the result whole or not at all, by way of a staging folder.

    Raises UserError when the files that were written do not compute what was trained.
    """
    model_dir = trained.places.model_dir
    staging = model_dir / STAGING
    # A merge may take longer than the platform waits after a stop.
    merges = trained.settings.output.merge_weights and not trained.trainer.stopped
    shutil.rmtree(staging, ignore_errors=True)  # left by a job that was killed here
    first = staging / ADAPTER if merges else staging
    first.mkdir(parents=True)
    try:
        checks = save_and_prove(trained, first)
        manifest["export"] = {"checks": checks}
        trained.timeline.mark("export")
        write_side_files(first, trained, manifest, is_served=not merges)
        remove_earlier_result(model_dir)
        if merges:
            put_in_place(first, model_dir / ADAPTER)  # so that a merge that fails loses nothing
            manifest["export"] |= merge_adapter(trained, model_dir / ADAPTER, staging, checks)
            trained.timeline.mark("merge")
            write_side_files(staging, trained, manifest, is_served=True)
        put_in_place(staging, model_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_and_prove(trained: TrainingResult, folder: Path) -> list[dict[str, Any]]:
    """Write the weights, free the trained model, and check what was written. Return the records of the checks.

    A stopped job has no logits to compare with, and no check.
    """
    save_weights(trained, folder)
    trained_bytes = trained.trainer.model.get_memory_footprint()
    release_memory(trained)
    return [] if trained.logits is None else [prove_trained(trained, folder, trained.logits, trained_bytes)]


def save_weights(trained: TrainingResult, folder: Path) -> None:
    """Write the adapter, or all weights, to a folder that exists."""
    model, plan, weights = trained.trainer.model, trained.plan, trained.weights
    if isinstance(model, PeftModel):
        base = BaseReference(trained.base_name, trained.base.revision)
        save_adapter(model, folder, base, trained.trainer.run.adapter_start, weights)
        return
    whole = rebuild_plain_model(model, weights) if weights else model
    whole.to(plan.precision.compute)
    whole.config.use_cache = True  # switched off for training, and a serving container reads it
    whole.save_pretrained(folder)


def rebuild_plain_model(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Return a sharded model as a plain one, made of the same tensors."""
    sharded_class, plain_class = type(model), type(model).__mro__[2]  # `fully_shard` put FSDPModule between them
    assert issubclass(sharded_class, FSDPModule)
    with torch.device("meta"):
        plain = plain_class(model.config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def release_memory(trained: TrainingResult) -> None:
    """Free the memory that training took: the written model is loaded next."""
    trainer = trained.trainer
    if trained.weights is not None:
        trained.weights.clear()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    for module in list(trainer.model.modules()):  # emptied, since others still hold the model itself
        module.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def merge_adapter(trained: TrainingResult, adapter: Path, folder: Path, checks: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge shard by shard into a folder, and prove the result. Return figures and checks for the manifest.

    Raises UserError that tells where the adapter is.
    """
    plan, settings = trained.plan, trained.settings
    quantization = plan.quantization if settings.output.merge_base == "dequantized" else None
    try:
        parts = (trained.base_folder, adapter, plan.config, plan.precision.compute, quantization)
        figures = write_merged_model(MergeRequest(*parts, settings.model.trust_remote_code), folder)
        return {"merge": figures, "checks": [*checks, *prove_merged(trained, adapter, folder)]}
    except (UserError, OSError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{quote_error(error)}."
        raise UserError(
            f"merge_weights=true: the merge failed, and nothing is lost: the adapter is in {adapter}, and "
            f"`llm-trainer merge` merges it later. {reason}"
        ) from error


def write_side_files(folder: Path, trained: TrainingResult, manifest: Manifest, is_served: bool) -> None:
    """Write the files beside the weights: tokenizer, serving files, model card and manifest.

    `is_served` tells whether an endpoint gets this folder.
    """
    trained.tokenizer.save_pretrained(folder)
    refusals = write_serving_files(folder, describe_served(folder, trained, manifest)) if is_served else []
    for refusal in refusals:
        log.info(f"Serving: {refusal}")
    manifest["export"]["served_by_vllm"] = not refusals
    write_model_card(folder, manifest, trained.base_folder, trained.base, refusals)
    manifest["files"] = sorted([MANIFEST, *(file.name for file in folder.iterdir())])
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def describe_served(folder: Path, trained: TrainingResult, manifest: Manifest) -> ServedModel:
    """Return the facts by which the serving files are written."""
    is_adapter = (folder / CONFIG_NAME).is_file()
    return ServedModel(
        config=trained.plan.config,
        num_weights=manifest["parameters"],
        dtype=trained.plan.precision.compute,
        chat_template=trained.tokenizer.chat_template,
        lora=LoraConfig.from_pretrained(str(folder)) if is_adapter else None,
        base_id=trained.base.hub_id,
        base_revision=trained.base.revision,
        max_length=trained.settings.data.max_length,
        trust_remote_code=trained.settings.model.trust_remote_code,
    )


def remove_earlier_result(model_dir: Path) -> None:
    """Remove the files that an earlier run in the same tree left, by its manifest.

    An adapter beside merged weights would mislead servers.
    """
    for folder in (model_dir / ADAPTER, model_dir):
        for name in read_manifest(folder).get("files", []):
            remove_path(folder / name)
    if (model_dir / ADAPTER).is_dir() and not any((model_dir / ADAPTER).iterdir()):
        (model_dir / ADAPTER).rmdir()


def put_in_place(folder: Path, target: Path) -> None:
    """Move the content of a finished folder to the place that SageMaker uploads."""
    target.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in folder.iterdir())
    for path in folder.rglob("*"):  # safetensors writes files that only the container's root can read
        path.chmod(0o755 if path.is_dir() else 0o644)
    for name in names:
        remove_path(target / name)
        (folder / name).replace(target / name)
    folder.rmdir()
    log.info(f"Wrote {', '.join(names)} to {target}")
