# SPDX-License-Identifier: Apache-2.0
"""The plan of a merge: every tensor of the result, its place, and what is added to it. Nothing is written here."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_trainer.common.errors import UserError, quote_error
from llm_trainer.merge import lora_deltas
from llm_trainer.merge.base_tensors import (
    AddedTensor,
    BaseTensor,
    ReplacedTensor,
    RoundedTensor,
    list_shards,
    list_tensors,
)
from llm_trainer.merge.delta_mapping import map_deltas_to_tensors, split_tied_embeddings
from llm_trainer.merge.lora_deltas import WeightDelta
from llm_trainer.merge.shard_writer import MergedShard, MergedTensor
from llm_trainer.merge.weight_layout import WeightLayout
from llm_trainer.model.adapter_file import attach_adapter
from llm_trainer.model.layers.reward_head import HEAD, is_reward_model
from llm_trainer.model.loading import build_on_meta
from llm_trainer.model.quantization import find_stored_method

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class MergeRequest:
    """Base and adapter of a merge, and its options."""

    base: Path  # folder
    adapter: Path  # folder
    config: PreTrainedConfig  # the base's
    dtype: torch.dtype | None = None  # of the floating tensors that are written; None: as each is stored
    # The adapter is added to what this makes of the weights; None: to the weights as they are stored.
    quantization: BitsAndBytesConfig | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, eq=False)
class MergePlan:
    """The files of the result, and whether input and output embeddings no longer are one tensor."""

    shards: list[MergedShard]
    is_untied: bool


def plan_merge(request: MergeRequest) -> MergePlan:
    """Return what is to be written. Raise UserError for what does not fit together."""
    check_stored_method(request)
    dtype = request.dtype
    files = list_shards(request.base)
    tensors = {tensor.name: tensor for tensor in list_tensors(files, dtype or torch.bfloat16)}
    skeleton = build_skeleton(request)
    layout = WeightLayout(skeleton, {name: tensor.shape for name, tensor in tensors.items()})
    check_shapes(request.base, layout)
    if request.quantization is not None:
        tensors |= {tensor.name: tensor for tensor in list_rounded(layout, tensors, request.quantization, dtype)}
    model = attach_adapter(build_skeleton(request), request.adapter)
    deltas = dict(lora_deltas.list_deltas(model))
    replaced = lora_deltas.list_replaced(model)
    is_untied = split_tied_embeddings(layout, tensors, deltas, replaced)
    if is_reward_model(request.config):
        exchange_head(layout, tensors, replaced)
    for parameter, values in replaced.items():
        name = find_tensor(layout, parameter)
        tensors[name] = ReplacedTensor(tensors[name], values)
    stored_deltas = dict(map_deltas_to_tensors(layout, deltas))
    return MergePlan(list_merged_shards(files, tensors, stored_deltas, skeleton, dtype), is_untied)


def exchange_head(layout: WeightLayout, tensors: dict[str, BaseTensor], replaced: dict[str, torch.Tensor]) -> None:
    """Put the adapter's reward head in the place of the base's output layer, where the base is no reward model.

    `tensors` and `replaced` change.
    """
    parameter = f"{HEAD}.weight"
    if parameter in layout.stored:
        return
    for name in tensors.keys() - layout.stored.values() - layout.places.keys():
        del tensors[name]
    last = next(reversed(tensors.values())).file
    tensors[parameter] = AddedTensor(parameter, last, replaced.pop(parameter))


def list_merged_shards(
    files: list[Path],
    tensors: dict[str, BaseTensor],
    deltas: dict[str, WeightDelta],
    skeleton: PreTrainedModel,
    dtype: torch.dtype | None,
) -> list[MergedShard]:
    """Return the files of the result: each tensor in the file of the base that it comes from, without empty files."""
    kept = find_kept_in_float32(skeleton, dtype)
    by_file = {file: MergedShard(file.name, []) for file in files}
    for name, tensor in tensors.items():
        is_converted = tensor.dtype in FLOATING and not (kept and kept.search(name))
        written = dtype if dtype is not None and is_converted else tensor.dtype
        by_file[tensor.file].tensors.append(MergedTensor(name, written, tensor, deltas.get(name)))
    return [shard for shard in by_file.values() if shard.tensors]


def build_skeleton(request: MergeRequest) -> PreTrainedModel:
    """Return the base model on the meta device, in float32, which PEFT then computes in. Raise UserError."""
    try:
        return build_on_meta(copy.deepcopy(request.config), torch.float32, request.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"The base's model cannot be built from its config: {quote_error(error)}.") from error


def check_stored_method(request: MergeRequest) -> None:
    """Raise UserError for a base that is stored in a form that nothing can be merged into, or not as asked."""
    base, stored = request.base, find_stored_method(request.config)
    if stored not in (None, "mxfp4", "bitsandbytes"):
        raise UserError(f"{base} is stored in {stored}, which cannot be merged into: give the weights before that.")
    if stored and request.quantization is not None:
        raise UserError(
            f"merge_base=dequantized: {base} is stored in {stored}, which is dequantized anyway: leave it out."
        )


def check_shapes(base: Path, layout: WeightLayout) -> None:
    """Raise UserError where a tensor of the files has another shape than the config asks for."""
    parameters = layout.skeleton.state_dict()
    for parameter, name in layout.stored.items():
        needed, found = tuple(parameters[parameter].shape), layout.shapes[name]
        if needed != found:
            raise UserError(f"{base}: {name} has shape {list(found)}, and config.json asks for {list(needed)}.")


def list_rounded(
    layout: WeightLayout, tensors: dict[str, BaseTensor], quantization: BitsAndBytesConfig, dtype: torch.dtype | None
) -> Iterator[RoundedTensor]:
    """Yield the matrices that Transformers would quantize, as bitsandbytes rounds them.

    Raise UserError for a matrix that is no tensor of its own in the files.
    """
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


def find_tensor(layout: WeightLayout, parameter: str) -> str:
    """Return the tensor that is this parameter. Raise UserError where there is none."""
    if parameter not in layout.stored:
        raise UserError(f"The adapter replaces {parameter}, which is no tensor of its own in the base's files.")
    return layout.stored[parameter]


def find_kept_in_float32(skeleton: PreTrainedModel, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """Return a pattern of the names that Transformers loads in float32 in any case, such as some routers' bias."""
    dtype_plan = skeleton._get_dtype_plan(dtype) if dtype else {}
    return re.compile("|".join(name.replace("*", ".*") for name in dtype_plan)) if dtype_plan else None
