# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of the other kind: sharded by FSDP2 where this run's weights are whole, or whole where it shards them.

Both are read into the tensors that the run has already, so that no rank holds more than them and one tensor of a file.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from llm_trainer.common.errors import UserError

WEIGHT_SHARDS, OPTIMIZER_SHARDS = "pytorch_model_fsdp_0", "optimizer_0"  # folders, as Accelerate names them
WHOLE_OPTIMIZER = "optimizer.pt"  # as Transformers names it


def is_sharded(checkpoint: Path) -> bool:
    """Tell whether each rank of the run that wrote a checkpoint wrote a share of it."""
    return (checkpoint / WEIGHT_SHARDS).is_dir()


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load the trained weights of a checkpoint of either kind. Every rank must call this.

    Raises UserError where the checkpoint lacks one of them.
    """
    trained = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else find_untied(model)
    if is_sharded(checkpoint):
        read_shards(checkpoint / WEIGHT_SHARDS, {"model": trained})
        return
    missing = set(trained)
    for name, whole in read_tensors(checkpoint):
        if name in missing:
            copy_whole(whole, trained[name])
            missing.remove(name)
    if missing:
        raise UserError(
            f"{checkpoint} was written without FSDP, and lacks {len(missing)} weights that this job shards, such as "
            f"{min(missing)}: set distribution=ddp."
        )


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Load the optimizer's state of a checkpoint of either kind. Every rank must call this."""
    if is_sharded(checkpoint):
        state = get_optimizer_state_dict(model, optimizer)
        read_shards(checkpoint / OPTIMIZER_SHARDS, {"optimizer": state})
        set_optimizer_state_dict(model, optimizer, state)
        return
    whole = torch.load(checkpoint / WHOLE_OPTIMIZER, map_location="cpu", mmap=True, weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, optimizer, name_states(whole, model, optimizer), options=options)


def find_untied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's weights and saved buffers by name, those that several names share once."""
    tied = {id(weight): name for name, weight in reversed([*model.named_parameters(remove_duplicate=False)])}
    names = {name for name, weight in model.named_parameters(remove_duplicate=False) if tied[id(weight)] != name}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in names}


def read_shards(folder: Path, state: dict[str, Any]) -> None:
    """Read what ranks have written into a state of the same names, of whole tensors or other shards."""
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def read_tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the values of each weight in the files of a checkpoint."""
    for file in sorted(checkpoint.glob("*model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - the file is no mapping
                yield name, tensors.get_tensor(name)


@torch.no_grad()
def copy_whole(whole: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a whole tensor into another one, or into this rank's shard of one."""
    if isinstance(target, DTensor):
        own = whole.to(target.device_mesh.device_type)
        target.copy_(distribute_tensor(own, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(whole)


def name_states(whole: Mapping[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's saved state with the names of weights in place of their numbers, which count its groups."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    order = [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]
    groups = [{**group, "params": [order[number] for number in group["params"]]} for group in whole["param_groups"]]
    return {"state": {order[number]: state for number, state in whole["state"].items()}, "param_groups": groups}
