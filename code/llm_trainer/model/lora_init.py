# SPDX-License-Identifier: Apache-2.0
"""Where an adapter begins that does not begin at zero, and what has to be kept of it.

PiSSA (arXiv:2404.02948) and OLoRA (arXiv:2406.01775) move a part of each matrix from the base into the adapter; LoftQ
(arXiv:2310.08659) has the adapter make up for what quantization took. An adapter that is trained from there belongs to
that base alone. Exported is its difference from the start, an adapter of twice the rank, which belongs to the base as
it is stored.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from safetensors.torch import load_file

from llm_trainer.common.errors import UserError
from llm_trainer.common.ranks import local_rank
from llm_trainer.common.safetensors_files import list_weights
from llm_trainer.config.sections import MOVING_STARTS

INITIAL_ADAPTER = (
    "initial_adapter.safetensors"  # in a checkpoint: PEFT takes a folder with an adapter for another one to load
)
ADAPTER = "default"  # PEFT's name of the only one


def initialize_adapter(model: PeftModel, init: str, base: str, scratch_dir: Path) -> Path | None:
    """Give the adapter its first values where PEFT has not, and keep them: the folder, None for one that adds zero."""
    if init == "loftq":
        initialize_loftq(model, Path(base))
    elif init not in MOVING_STARTS:
        return None
    start = scratch_dir / f"initial_adapter_{local_rank()}"
    model.save_pretrained(start)
    return start


@torch.no_grad()
def initialize_loftq(model: PeftModel, base: Path) -> None:
    """Have each adapter make up for its matrix's quantization error, as far as its rank reaches: one LoftQ step.

    PEFT's replace_lora_weights_loftq leaves the adapter's scale alpha / rank out, by which it would correct too much,
    and needs a GPU. The matrices come from the files one at a time.
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
    """Every adapted layer by the name that it has in the base model."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def list_tensor_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def read_weight(name: str, places: dict[str, Path], prefix: str) -> torch.Tensor:
    """A matrix of the base as it is stored, there perhaps without the prefix that the model's class gives it."""
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
    """Make the start, and what it left of the base, those of the checkpoint's run.

    The same machine decomposes a matrix into the same numbers, and nothing changes here; another one may not.
    Raises UserError when the checkpoint does not hold its start.
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
    """Put the start into a checkpoint."""
    shutil.copyfile(start / SAFETENSORS_WEIGHTS_NAME, checkpoint / INITIAL_ADAPTER)


def save_adapter(
    model: PeftModel,
    folder: Path,
    base: str,
    revision: str | None,
    start: Path | None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter as one of the base as it is stored; `weights` are its own where the model holds but shards.

    `base` is the name by which others find it, where the model knows the folder that it was loaded from.
    """
    initial = None if start is None else str(start)
    model.save_pretrained(folder, state_dict=weights, path_initial_model_for_weight_conversion=initial)
    file = folder / CONFIG_NAME
    config = json.loads(file.read_text(encoding="utf-8")) | {"base_model_name_or_path": base, "revision": revision}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
