# SPDX-License-Identifier: Apache-2.0
"""The merge of a LoRA adapter into its base, from disk to disk, one shard after the other.

The whole model is never in memory. The result's tensors have the names of those in the base's files, and lie in files
of the same names, as servers know them. The tokenizer's files are not written here.
"""

import copy
import hashlib
import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import AutoTokenizer, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from llm_trainer.common.errors import UserError
from llm_trainer.common.files import compute_digest
from llm_trainer.common.safetensors_files import SINGLE_FILE, WEIGHTS_INDEX, list_weights
from llm_trainer.host.free_space import find_free_bytes
from llm_trainer.merge import shard_writer
from llm_trainer.merge.plan import FLOATING, MergePlan, MergeRequest, plan_merge
from llm_trainer.merge.shard_writer import MergedShard, write_json
from llm_trainer.model.config_file import write_config
from llm_trainer.model.layers.reward_head import is_reward_model
from llm_trainer.model.precision import show_dtype
from llm_trainer.model.tokenizer_files import PROCESSOR_FILES

# A server reads these of a model's folder beside config.json. The tokenizer comes with the adapter.
SERVED_FILES = (GENERATION_CONFIG_NAME, *PROCESSOR_FILES)


def write_merged_model(request: MergeRequest, output: Path) -> dict[str, Any]:
    """Write the merged model to an empty or new folder, or to one that holds this same merge unfinished.

    Return figures for the manifest. Raise UserError for what does not fit together, before anything is written, and
    where the disk fills up.
    """
    started = time.monotonic()
    plan = plan_merge(request)
    shards = plan.shards
    check_free_space(output, shards)
    shard_writer.claim_output(output, describe_origin(request))
    try:
        write_files(request, plan, output)
    except OSError as error:
        raise UserError(
            f"The merged model could not be written to {output} ({error}): merge again, it goes on."
        ) from error
    return {
        "merge_base": "dequantized" if request.quantization else "bf16",
        "shards": len(shards),
        "merged_tensors": sum(tensor.delta is not None for shard in shards for tensor in shard.tensors),
        "dtype": show_dtype(find_main_dtype(shards)),
        "bytes": sum(shard.num_bytes for shard in shards),
        "seconds": round(time.monotonic() - started, 3),
    }


def write_files(request: MergeRequest, plan: MergePlan, output: Path) -> None:
    """Write all files of the result. Raise OSError where the disk is full."""
    shard_writer.write_shards(output, plan.shards)
    copy_small_files(request, output)
    shard_writer.publish_shards(output, plan.shards)
    write_index(output, plan.shards)
    result = describe_result(request.config, find_main_dtype(plan.shards), plan.is_untied)
    if is_reward_model(result):
        give_pad_token(result, request)
    write_config(output, request.base, result, request.trust_remote_code)
    shard_writer.remove_record(output)


def check_free_space(output: Path, shards: list[MergedShard]) -> None:
    """Raise UserError where the shards that are still to be written do not fit on the disk."""
    finished = shard_writer.find_finished(output, shards)
    needed_bytes = sum(shard.num_bytes for shard in shards if shard.file_name not in finished)
    free_bytes = find_free_bytes(output)
    if needed_bytes > free_bytes:
        raise UserError(
            f"The merged model needs {needed_bytes:,} bytes in {output}, and {free_bytes:,} are free there: "
            "free the rest, or give a folder on a larger disk."
        )


def describe_origin(request: MergeRequest) -> dict[str, Any]:
    """Return what tells one merge from another, as values of JSON."""
    base, adapter, quantization = request.base, request.adapter, request.quantization
    return {
        "base": {file.name: describe_weights(file) for file in list_weights(base)},
        "config": compute_digest(base / "config.json"),
        "adapter": compute_digest(adapter / SAFETENSORS_WEIGHTS_NAME),
        "adapter_config": compute_digest(adapter / "adapter_config.json"),
        "dtype": show_dtype(request.dtype) if request.dtype else None,
        "quantization": json.loads(quantization.to_json_string(use_diff=False)) if quantization else None,
    }


def describe_weights(file: Path) -> list[Any]:
    """Return size, time of the last change, and digest of the header of a file of weights.

    To read all of it would take as long as to merge it.
    """
    status = file.stat()
    with file.open("rb") as stream:
        size = stream.read(8)
        header = size + stream.read(int.from_bytes(size, "little"))
    return [status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest()]


def find_main_dtype(shards: list[MergedShard]) -> torch.dtype:
    """Return the floating type that most of the result's bytes have."""
    sizes: Counter[torch.dtype] = Counter()
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.dtype in FLOATING:
                sizes[tensor.dtype] += tensor.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def copy_small_files(request: MergeRequest, output: Path) -> None:
    """Copy the base's files that a server reads beside the weights, and its code where that is trusted."""
    code = sorted(file.name for file in request.base.glob("*.py")) if request.trust_remote_code else []
    served = SERVED_FILES[is_reward_model(request.config) :]  # which generates nothing
    for name in (*served, *code):
        if (request.base / name).is_file():
            shutil.copyfile(request.base / name, output / name)
    if (request.adapter / GENERATION_CONFIG_NAME).is_file():  # the base's, with the tokens that end a trained answer
        shutil.copyfile(request.adapter / GENERATION_CONFIG_NAME, output / GENERATION_CONFIG_NAME)


def give_pad_token(config: PreTrainedConfig, request: MergeRequest) -> None:
    """Give a reward model's config the pad token of the adapter's tokenizer, by which Transformers finds the end."""
    pad = AutoTokenizer.from_pretrained(request.adapter, trust_remote_code=request.trust_remote_code).pad_token_id
    config.get_text_config().pad_token_id = pad


def write_index(output: Path, shards: list[MergedShard]) -> None:
    """Write the index of the tensors, which a single file does without."""
    if [shard.file_name for shard in shards] == [SINGLE_FILE]:
        return
    files = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    total_bytes = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    write_json(output / WEIGHTS_INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": files})


def describe_result(config: PreTrainedConfig, dtype: torch.dtype, is_untied: bool) -> PreTrainedConfig:
    """Return the base's config with what the merge changed. `dtype` is the result's main type."""
    result = copy.deepcopy(config)
    if hasattr(result, "quantization_config"):
        del result.quantization_config
    for part in {id(part): part for part in (result, result.get_text_config())}.values():
        part.dtype = dtype
        part.use_cache = True
        if is_untied:
            part.tie_word_embeddings = False
    return result
