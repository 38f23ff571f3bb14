# SPDX-License-Identifier: Apache-2.0
"""Merges a LoRA adapter into its base from disk to disk, a shard after the other and never the whole model in memory.

The result's tensors have the names, and lie in the shards, of the base's files, as servers know them. Not done here:
the tokenizer's files.
"""

import copy
import hashlib
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.common.files import compute_digest
from llm_trainer.common.safetensors_files import WEIGHTS_INDEX, list_weights
from llm_trainer.config.schema import Settings
from llm_trainer.host.free_space import find_free_bytes
from llm_trainer.merge import lora_deltas, shard_writer
from llm_trainer.merge.base_tensors import (
    SINGLE_FILE,
    BaseTensor,
    CopiedTensor,
    ReplacedTensor,
    RoundedTensor,
    list_shards,
    list_tensors,
)
from llm_trainer.merge.lora_deltas import ConvertedDelta, LowRankDelta, WeightDelta
from llm_trainer.merge.shard_writer import MergedShard, MergedTensor, write_json
from llm_trainer.merge.weight_layout import WeightLayout
from llm_trainer.model.loading import build_on_meta
from llm_trainer.model.precision import show_dtype
from llm_trainer.model.quantization import find_stored_method

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Beside config.json, what a server reads of a model's folder; the tokenizer comes with the adapter.
SERVED_FILES = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def write_merged_model(
    base: Path,
    adapter: Path,
    output: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | None = None,
    quantization: BitsAndBytesConfig | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the merged model to `output`, an empty or new folder, or one with this same merge unfinished.

    dtype: of the floating tensors that are written; None: as each is stored. quantization: the adapter is added to
    what this makes of the weights, else to the weights as they are stored. Returns figures for the manifest. Raises
    UserError for what does not fit together, before anything is written, and where the disk fills up.
    """
    started = time.monotonic()
    settings = Settings.model_validate({"trust_remote_code": trust_remote_code})
    shards, is_untied = plan_merge(base, adapter, config, dtype, quantization, settings)
    check_free_space(output, shards)
    shard_writer.claim_output(output, describe_origin(base, adapter, dtype, quantization))
    try:
        shard_writer.write_shards(output, shards)
        written_dtype = find_main_dtype(shards)
        copy_small_files(base, output, trust_remote_code)
        shard_writer.publish_shards(output, shards)
        write_index(output, shards)
        write_config(base, output, written_dtype, is_untied)
        shard_writer.remove_record(output)
    except OSError as error:
        raise UserError(
            f"The merged model could not be written to {output} ({error}): merge again, it goes on."
        ) from error
    return {
        "merge_base": "dequantized" if quantization else "bf16",
        "shards": len(shards),
        "merged_tensors": sum(tensor.change is not None for shard in shards for tensor in shard.tensors),
        "dtype": show_dtype(written_dtype),
        "bytes": sum(shard.num_bytes for shard in shards),
        "seconds": round(time.monotonic() - started, 3),
    }


def plan_merge(
    base: Path,
    adapter: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype | None,
    quantization: BitsAndBytesConfig | None,
    settings: Settings,
) -> tuple[list[MergedShard], bool]:
    """What is to be written, and whether input and output embeddings no longer are one tensor. Writes nothing."""
    check_stored_method(base, config, quantization)
    files = list_shards(base)
    tensors = {tensor.name: tensor for tensor in list_tensors(files, dtype or torch.bfloat16)}
    skeleton = build_skeleton(config, settings)
    layout = WeightLayout(skeleton, {name: tensor.shape for name, tensor in tensors.items()})
    check_shapes(base, layout)
    if quantization is not None:
        tensors |= {tensor.name: tensor for tensor in list_rounded(layout, tensors, quantization, dtype)}
    model = lora_deltas.attach_adapter(build_skeleton(config, settings), adapter)
    changes = dict(lora_deltas.list_deltas(model))
    replaced = lora_deltas.list_replaced(model)
    is_untied = split_tied_embeddings(layout, tensors, changes, replaced)
    for parameter, values in replaced.items():
        name = find_tensor(layout, parameter)
        tensors[name] = ReplacedTensor(tensors[name], values)
    stored_changes = dict(map_deltas_to_tensors(layout, changes))
    kept = find_kept_in_float32(skeleton, dtype)
    shards = [MergedShard(file.name, []) for file in files]
    by_file = dict(zip(files, shards, strict=True))
    for name, tensor in tensors.items():
        floating = tensor.dtype in FLOATING and not (kept and kept.search(name))
        written = dtype if dtype is not None and floating else tensor.dtype
        by_file[tensor.file].tensors.append(MergedTensor(name, written, tensor, stored_changes.get(name)))
    return [shard for shard in shards if shard.tensors], is_untied


def build_skeleton(config: PreTrainedConfig, settings: Settings) -> PreTrainedModel:
    """The model on the meta device, in float32, so that PEFT computes in it."""
    try:
        return build_on_meta(copy.deepcopy(config), settings, torch.float32)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"The base's model cannot be built from its config: {quote_error(error)}.") from error


def check_stored_method(base: Path, config: PreTrainedConfig, quantization: BitsAndBytesConfig | None) -> None:
    stored = find_stored_method(config)
    if stored not in (None, "mxfp4", "bitsandbytes"):
        raise UserError(f"{base} is stored in {stored}, which cannot be merged into: give the weights before that.")
    if stored and quantization is not None:
        raise UserError(
            f"merge_base=dequantized: {base} is stored in {stored}, which is dequantized anyway: leave it out."
        )


def check_shapes(base: Path, layout: WeightLayout) -> None:
    parameters = layout.skeleton.state_dict()
    for parameter, name in layout.stored.items():
        needed, found = tuple(parameters[parameter].shape), layout.shapes[name]
        if needed != found:
            raise UserError(f"{base}: {name} has shape {list(found)}, and config.json asks for {list(needed)}.")


def list_rounded(
    layout: WeightLayout, tensors: dict[str, BaseTensor], quantization: BitsAndBytesConfig, dtype: torch.dtype | None
) -> Iterator[RoundedTensor]:
    """The matrices that Transformers would quantize, as it would."""
    # They import bitsandbytes, which takes seconds, and may be broken where nobody needs it.
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    skeleton = copy.deepcopy(layout.skeleton)
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(
        skeleton, quantization.llm_int8_skip_modules, skeleton._keep_in_fp32_modules
    )
    for path, module in replace_with_bnb_linear(skeleton, kept, quantization).named_modules():
        if hasattr(module, "source_cls"):
            name = layout.stored.get(f"{path}.weight")
            if name is None:
                raise UserError(
                    f"merge_base=dequantized: {path} is no tensor of its own in the base's files: use bf16."
                )
            loaded = quantization.bnb_4bit_compute_dtype if quantization.load_in_4bit else dtype or tensors[name].dtype
            yield RoundedTensor(tensors[name], quantization, loaded, issubclass(module.source_cls, Conv1D))


def split_tied_embeddings(
    layout: WeightLayout,
    tensors: dict[str, BaseTensor],
    changes: dict[str, WeightDelta],
    replaced: dict[str, torch.Tensor],
) -> bool:
    """Give input and output embeddings, where they are one tensor, one each if the adapter changes them differently.

    While training, PEFT changes only the one that it is asked for, or both alike with ensure_weight_tying.
    """
    skeleton = layout.skeleton
    paths = {module: name for name, module in skeleton.named_modules()}
    modules = [skeleton.get_input_embeddings(), skeleton.get_output_embeddings()]
    if modules[1] is None or modules[0].weight is not modules[1].weight:
        return False
    ends = [f"{paths[module]}.weight" for module in modules]
    if not any(end in changes or end in replaced for end in ends):
        return False
    absent = next((end for end in ends if end not in layout.stored), None)
    first, second = (changes.get(end) for end in ends)
    if isinstance(first, LowRankDelta) and isinstance(second, LowRankDelta) and first.equals(second):
        if absent:
            del changes[absent]
            replaced.pop(absent, None)  # PEFT saves the base's embeddings beside an adapter on them
        return False
    if absent:
        present = layout.stored[ends[1 - ends.index(absent)]]
        layout.stored[absent] = name = next(iter(layout.try_revert([absent])))
        layout.shapes[name] = tensors[present].shape
        tensors[name] = CopiedTensor(tensors[present], name)
    return True


def map_deltas_to_tensors(layout: WeightLayout, changes: dict[str, WeightDelta]) -> Iterator[tuple[str, WeightDelta]]:
    """The changed tensors, and what is done to each. Raises UserError for a parameter that cannot be turned back."""
    groups: dict[tuple[str, ...], dict[str, WeightDelta]] = {}
    for parameter, change in changes.items():
        if parameter in layout.stored:
            yield layout.stored[parameter], change
        else:
            groups.setdefault(tuple(layout.find_group(parameter)), {})[parameter] = change
    for group, own in groups.items():
        yield from convert_to_checkpoint_layout(layout, {parameter: own.get(parameter) for parameter in group})


def convert_to_checkpoint_layout(
    layout: WeightLayout, changes: dict[str, WeightDelta | None]
) -> Iterator[tuple[str, WeightDelta]]:
    """The changes of parameters that are converted together, on the tensors that these are made of."""
    parameter = next(name for name, change in changes.items() if change is not None)
    fix = "serve the adapter on the base instead."
    low_rank = {name: change if isinstance(change, LowRankDelta) else None for name, change in changes.items()}
    if low_rank != changes:
        raise UserError(
            f"{parameter} lies in the base's files in another form, which DoRA cannot be merged into: {fix}"
        )
    try:
        shapes = layout.try_revert(changes)
    except ValueError as error:
        raise UserError(f"{parameter} lies in the base's files in a form that is not known ({error}): {fix}") from error
    for name, shape in shapes.items():
        if name not in layout.shapes:
            raise UserError(f"The base's files lack {name}, of which the adapter changes {parameter}.")
        if layout.shapes[name] != shape:
            raise UserError(
                f"{name} has shape {list(layout.shapes[name])} in the base's files, and a change of {parameter} would "
                f"have {list(shape)} there: {fix}"
            )
    num_rows = {len(layout.skeleton.get_parameter(name)) for name in changes}
    row = find_row_shapes(layout, changes)
    for name, shape in shapes.items():
        first, place, number = layout.places.get(name, (name, 0, 1))
        if row == {each: (1, *shape[1:]) for each, shape in shapes.items()}:
            yield name, ConvertedDelta(layout, low_rank, name, is_whole=False)
        elif row.get(first) == shape and num_rows == {number}:
            yield name, ConvertedDelta(layout, low_rank, name, place)
        else:
            yield name, ConvertedDelta(layout, low_rank, name)


def find_row_shapes(layout: WeightLayout, parameters: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The shapes that a row (an expert) of each parameter becomes; nothing where rows are not converted apart."""
    if any(layout.skeleton.get_parameter(name).ndim < 3 for name in parameters):
        return {}
    try:
        return layout.try_revert(parameters, num_rows=1)
    except ValueError:
        return {}


def find_tensor(layout: WeightLayout, parameter: str) -> str:
    if parameter not in layout.stored:
        raise UserError(f"The adapter replaces {parameter}, which is no tensor of its own in the base's files.")
    return layout.stored[parameter]


def find_kept_in_float32(skeleton: PreTrainedModel, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """The names of what Transformers would not load in a short type, such as the bias of some routers."""
    plan_merge = skeleton._get_dtype_plan(dtype) if dtype else {}
    return re.compile("|".join(name.replace("*", ".*") for name in plan_merge)) if plan_merge else None


def check_free_space(output: Path, shards: list[MergedShard]) -> None:
    finished = shard_writer.find_finished(output, shards)
    needed_bytes = sum(shard.num_bytes for shard in shards if shard.file_name not in finished)
    free_bytes = find_free_bytes(output)
    if needed_bytes > free_bytes:
        raise UserError(
            f"The merged model needs {needed_bytes:,} bytes in {output}, and {free_bytes:,} are free there: "
            "free the rest, or give a folder on a larger disk."
        )


def describe_origin(
    base: Path, adapter: Path, dtype: torch.dtype | None, quantization: BitsAndBytesConfig | None
) -> dict[str, Any]:
    """What tells one merge from another, ready for JSON."""
    return {
        "base": {file.name: describe_weights(file) for file in list_weights(base)},
        "config": compute_digest(base / "config.json"),
        "adapter": compute_digest(adapter / SAFETENSORS_WEIGHTS_NAME),
        "adapter_config": compute_digest(adapter / "adapter_config.json"),
        "dtype": show_dtype(dtype) if dtype else None,
        "quantization": json.loads(quantization.to_json_string(use_diff=False)) if quantization else None,
    }


def describe_weights(file: Path) -> list[Any]:
    """Size, time of the last change, and digest of the header: to read all would take as long as to merge."""
    status = file.stat()
    with file.open("rb") as stream:
        size = stream.read(8)
        header = size + stream.read(int.from_bytes(size, "little"))
    return [status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest()]


def find_main_dtype(shards: list[MergedShard]) -> torch.dtype:
    """The floating type of most of the result."""
    sizes: Counter[torch.dtype] = Counter()
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.dtype in FLOATING:
                sizes[tensor.dtype] += tensor.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def copy_small_files(base: Path, output: Path, trust_remote_code: bool) -> None:
    code = sorted(file.name for file in base.glob("*.py")) if trust_remote_code else []
    for name in (*SERVED_FILES, *code):
        if (base / name).is_file():
            shutil.copyfile(base / name, output / name)


def write_index(output: Path, shards: list[MergedShard]) -> None:
    if [shard.file_name for shard in shards] == [SINGLE_FILE]:
        return
    files = {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors}
    total_bytes = sum(tensor.num_bytes for shard in shards for tensor in shard.tensors)
    write_json(output / WEIGHTS_INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": files})


def write_config(base: Path, output: Path, dtype: torch.dtype, is_untied: bool) -> None:
    """The base's, with what the merge changed."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    for part in (config, config.get("text_config") or {}):
        if part is config or "dtype" in part or "torch_dtype" in part:
            part.pop("torch_dtype", None)
            part["dtype"] = show_dtype(dtype)
        if part is config or "use_cache" in part:
            part["use_cache"] = True
        if is_untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    write_json(output / "config.json", config)
