# SPDX-License-Identifier: Apache-2.0
"""The first values of an adapter that does not begin at zero, and their place in checkpoints and the export.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) move a part of each matrix from the base into the adapter. LoftQ
(arXiv:2310.08659) has the adapter make up for the error of quantization. An adapter that is trained from there belongs
to that base alone. The export therefore holds its difference from the first values: an adapter of twice the rank, which
belongs to the base as it is stored.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file

from llm_trainer.common.errors import UserError
from llm_trainer.common.files import write_verbatim
from llm_trainer.common.ranks import local_rank
from llm_trainer.common.safetensors_files import list_weights
from llm_trainer.config.sections import MOVING_STARTS

# In a checkpoint. A folder of its own would make PEFT load it as a second adapter.
INITIAL_ADAPTER = "initial_adapter.safetensors"
ADAPTER = "default"  # PEFT's name of the only adapter
REFERENCE = "ref"  # the name by which TRL's trainers look for a copy of its first values
# Fields that adapter_config.json has in any case: those that readers other than PEFT look for.
SAID_FIELDS = (
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "lora_dropout", "bias"),
    *("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "inference_mode"),
    *("init_lora_weights", "fan_in_fan_out"),
)


@dataclass(frozen=True)
class BaseReference:
    """The base model as an adapter's config names it, for others to find it."""

    name: str  # Hub id or folder
    revision: str | None


def begins_at_zero(init: str) -> bool:
    """Tell whether a new adapter begins with adding zero."""
    return init != "loftq" and init not in MOVING_STARTS


def find_adapter_start(init: str, scratch_dir: Path) -> Path | None:
    """Return the folder for the adapter's first values; None for an adapter that begins with adding zero."""
    return None if begins_at_zero(init) else scratch_dir / f"initial_adapter_{local_rank()}"


def initialize_adapter(model: PeftModel, init: str, base: str, start: Path) -> None:
    """Give the adapter its first values where PEFT has not, and write them to the folder `start`."""
    if init == "loftq":
        initialize_loftq(model, Path(base))
    model.save_pretrained(start)


@torch.no_grad()
def initialize_loftq(model: PeftModel, base: Path) -> None:
    """Have each adapter make up for its matrix's quantization error, as far as its rank reaches.

    This is one step of LoftQ: the truncated SVD of the error, divided by the adapter's scale alpha / rank. PEFT's
    replace_lora_weights_loftq leaves that scale out and corrects too much, and it needs a GPU. The matrices come from
    the files one at a time. Raise UserError where a file holds no such matrix.
    """
    places = {name: file for file in list_weights(base) for name in list_tensor_names(file)}
    for name, layer in list_lora_layers(model):
        whole = read_weight(f"{name}.weight", places, model.get_base_model().base_model_prefix)
        held = dequantize_module_weight(layer.get_base_layer()).float()
        left, values, right = torch.linalg.svd(whole.to(held.device).float() - held, full_matrices=False)
        rank, root = layer.r[ADAPTER], (values / layer.scaling[ADAPTER]).sqrt()[: layer.r[ADAPTER]]
        layer.lora_A[ADAPTER].weight.copy_(root[:, None] * right[:rank])
        layer.lora_B[ADAPTER].weight.copy_(left[:, :rank] * root)


def list_lora_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """Yield every layer that has an adapter, by its name in the base model."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def list_tensor_names(file: Path) -> list[str]:
    """Return the names of the tensors in a .safetensors file."""
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def read_weight(name: str, places: dict[str, Path], prefix: str) -> torch.Tensor:
    """Return a matrix of the base as it is stored. `places` tells the file of each tensor.

    The files may leave out the prefix that the model's class gives the name. Raise UserError where they lack it.
    """
    stored = next((key for key in (name, name.removeprefix(f"{prefix}.")) if key in places), None)
    if stored is None:
        raise UserError(
            f"init_lora_weights=loftq needs each matrix as a tensor of its own in the model's files, and {name} is "
            "none there: use init_lora_weights=default."
        )
    with safe_open(places[stored], framework="pt") as tensors:
        return tensors.get_tensor(stored)


@torch.no_grad()
def restore_initial_adapter(checkpoint: Path, model: PeftModel, start: Path) -> None:
    """Make the first values, and what they left of the base, those of the run that wrote the checkpoint.

    The same machine decomposes a matrix into the same numbers, and then nothing changes. Another machine may not.
    `start` is the folder of `initialize_adapter`. Raise UserError when the checkpoint does not hold first values.
    """
    kept = checkpoint / INITIAL_ADAPTER
    if not kept.is_file():
        raise UserError(
            f"{checkpoint} does not hold the values that its adapter began with, which init_lora_weights needs: name "
            "a checkpoint of this program, or set resume_from_checkpoint=false."
        )
    ours, theirs = load_file(start / SAFETENSORS_WEIGHTS_NAME), load_file(kept)
    moved = model.peft_config[ADAPTER].init_lora_weights in MOVING_STARTS
    for name, layer in list_lora_layers(model):
        keys = [f"base_model.model.{name}.lora_{part}.weight" for part in "BA"]
        if moved and not all(torch.equal(ours[key], theirs[key]) for key in keys):
            weight = layer.get_base_layer().weight
            ours_b, ours_a, theirs_b, theirs_a = (
                values[key].to(weight.device).float() for values in (ours, theirs) for key in keys
            )
            change = (ours_b @ ours_a - theirs_b @ theirs_a) * layer.scaling[ADAPTER]
            weight.copy_(weight.float() + (change.T if layer.fan_in_fan_out else change))
    shutil.copyfile(kept, start / SAFETENSORS_WEIGHTS_NAME)


def save_initial_adapter(start: Path, checkpoint: Path) -> None:
    """Copy the adapter's first values into a checkpoint."""
    shutil.copyfile(start / SAFETENSORS_WEIGHTS_NAME, checkpoint / INITIAL_ADAPTER)


def save_adapter(
    model: PeftModel,
    folder: Path,
    base: BaseReference,
    start: Path | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter as one that belongs to the base as it is stored.

    `start` holds the adapter's first values, or is None. `weights` are the adapter's where the model is sharded.
    The model itself knows only the folder that the base was loaded from, so that `base` names it for others.
    """
    initial = None if start is None else str(start)
    model.save_pretrained(folder, state_dict=weights, path_initial_model_for_weight_conversion=initial)
    file = folder / CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base.name, "revision": base.revision}
    if saved := config.get("modules_to_save"):  # PEFT adds all names that the head of a classifier may have
        ends = {name.rpartition(".")[2] for name, _ in model.get_base_model().named_modules()}
        config["modules_to_save"] = sorted(ends.intersection(saved))
    config = leave_out_defaults(config)
    write_verbatim(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def leave_out_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return an adapter's config without fields that are empty or PEFT's default, but for those readers look for.

    PEFT before 0.15 refuses every field that it does not know, and each release brings some.
    """
    defaults = LoraConfig().to_dict()
    return {
        name: value
        for name, value in config.items()
        if name in SAID_FIELDS or (name != "peft_version" and value not in (None, [], {}, defaults.get(name)))
    }


@torch.no_grad()
def copy_adapter(model: PeftModel) -> None:
    """Give the model a frozen copy of its adapter, for the reference of an adapter that does not begin at zero."""
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.init_lora_weights = True  # its values come from the adapter, and the base stays as it is
    model.add_adapter(REFERENCE, config)
    for name, parameter in model.named_parameters():
        if f".{ADAPTER}." in name:
            kept = model.get_parameter(name.replace(f".{ADAPTER}.", f".{REFERENCE}."))
            kept.data = parameter.detach().clone()
            kept.requires_grad_(False)


@contextmanager
def hide_copy(model: Any) -> Iterator[None]:
    """Have PEFT write the trained adapter alone in this context."""
    configs = model.peft_config if isinstance(model, PeftModel) else {}
    config = configs.pop(REFERENCE, None)
    try:
        yield
    finally:
        if config is not None:
            configs[REFERENCE] = config
