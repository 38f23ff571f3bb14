# SPDX-License-Identifier: Apache-2.0
"""What the job leaves in /opt/ml/model: an adapter or whole weights, tokenizer, chat template, manifest."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_trainer.adapter_start import save_adapter
from llm_trainer.errors import UserError
from llm_trainer.launch import Job
from llm_trainer.model import load_model

STAGING = ".llm-trainer-export"  # beside the result, so that moving a finished file there is a rename
MANIFEST = "training_manifest.json"
CHECKED_TOKENS = 256
# Largest difference of logits that rounding explains, relative to the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def export(
    model: PreTrainedModel | PeftModel,
    weights: dict[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    base: str,
    job: Job,
    dtype: torch.dtype,
    train_data: Dataset,
    manifest: dict[str, Any],
    merges: bool,
    adapter_start: Path | None,
) -> None:
    """Write the result whole or not at all, by way of a staging folder. Only global rank 0 calls this.

    `weights` are what was trained where the model holds but shards of it.
    """
    model_dir = job.inputs.model_dir
    staging = model_dir / STAGING
    shutil.rmtree(staging, ignore_errors=True)  # of a job that was killed here
    staging.mkdir(parents=True)
    try:
        if isinstance(model, PeftModel) and merges:
            adapter = job.environment.output_dir / "data" / "adapter"
            # first, so that a merge that fails loses nothing
            save_adapter(model, adapter, adapter_start, weights)
            merged, manifest["merge"] = merge(model, adapter, base, job, dtype, train_data, weights)
            save_whole(merged, staging, dtype)
        elif isinstance(model, PeftModel):
            save_adapter(model, staging, adapter_start, weights)
        else:
            save_whole(rebuild(model, weights) if weights else model, staging, dtype)
        tokenizer.save_pretrained(staging)
        manifest["files"] = sorted([MANIFEST, *(file.name for file in staging.iterdir())])
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        remove_earlier_result(model_dir)
        for file in staging.iterdir():
            make_readable(file)
            file.replace(model_dir / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"Wrote {', '.join(manifest['files'])} to {model_dir}", flush=True)


def remove_earlier_result(model_dir: Path) -> None:
    """What an earlier run in the same tree left, by its manifest: an adapter beside merged weights misleads servers."""
    manifest = model_dir / MANIFEST
    if manifest.is_file():
        for name in json.loads(manifest.read_text(encoding="utf-8"))["files"]:
            (model_dir / name).unlink(missing_ok=True)


def make_readable(path: Path) -> None:
    """safetensors writes files that only their owner can read, and the owner is often the container's root."""
    for file in [path, *path.rglob("*")]:
        file.chmod(0o755 if file.is_dir() else 0o644)


def rebuild(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The sharded model as a plain one, of the same tensors."""
    sharded_class, plain_class = type(model), type(model).__mro__[2]  # `fully_shard` put FSDPModule between them
    assert issubclass(sharded_class, FSDPModule)
    with torch.device("meta"):
        plain = plain_class(model.config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def save_whole(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    model.to(dtype)
    model.config.use_cache = True  # switched off for training, and a serving container reads it
    model.save_pretrained(folder)


def merge(
    model: PeftModel,
    adapter: Path,
    base: str,
    job: Job,
    dtype: torch.dtype,
    train_data: Dataset,
    weights: dict[str, torch.Tensor] | None = None,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The base with the adapter folded in, and by how much its logits differ from those of the adapter on the base.

    Quantized weights cannot take an adapter without rounding it away, and shards no whole one, so such a base is
    loaded anew, whole, on the CPU, since the GPU still holds the other one; what is stored quantized itself is
    dequantized there. Raises UserError when the difference is more than rounding.
    """
    if weights is not None or getattr(model.get_base_model(), "is_quantized", False):
        whole_base = load_model(base, job.settings, None, dtype, torch.device("cpu"), attention="eager")
        if getattr(whole_base, "is_quantized", False):
            whole_base = whole_base.dequantize(dtype)
        model = PeftModel.from_pretrained(whole_base, str(adapter))
    model.eval()
    tokens = torch.tensor([train_data[0]["input_ids"][:CHECKED_TOKENS]], device=model.device)
    before = logits(model, tokens)
    merged = model.merge_and_unload()
    after = logits(merged, tokens)
    difference = ((after - before).abs().max() / before.abs().max()).item()
    if not difference <= TOLERANCE[dtype]:  # not-a-number fails too
        raise UserError(
            f"The merged model's logits differ from the trained model's by {difference:.2e} of their range, more than "
            f"{TOLERANCE[dtype]:.0e}: the adapter is in output/data/adapter; train in float32."
        )
    return merged, {"relative_logit_difference": difference, "tolerance": TOLERANCE[dtype]}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """(sequence, vocabulary), in float32."""
    return model(input_ids=tokens).logits[0].float()
