# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer merge`: an adapter is merged into its base outside a job, and gets the tokenizer's files beside it."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trainer.common.errors import UserError
from llm_trainer.common.files import read_json_object
from llm_trainer.common.hub import download_model, expect_network
from llm_trainer.common.library_noise import silence_libraries
from llm_trainer.common.units import show_bytes
from llm_trainer.config.sections import ModelSettings
from llm_trainer.journal.manifest import MANIFEST, Manifest, read_manifest
from llm_trainer.serving.lmi_files import ADAPTER_FILES

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


@dataclass(frozen=True)
class MergeOptions:
    """The arguments of `llm-trainer merge`."""

    adapter: str  # a folder
    output: str  # a folder: new, empty, or left by a merge that was cut off
    base: str | None = None  # a folder or Hub id; None: the one that the adapter names
    merge_base: str = "bf16"  # or "dequantized"
    dtype: str = "auto"  # "auto": as the base is stored
    model_revision: str | None = None
    trust_remote_code: bool = False


def merge_adapter(options: MergeOptions) -> int:
    """Merge an adapter into its base, and return the exit code; it is 1 after printing why they cannot be merged."""
    output = Path(options.output)
    try:
        base, figures = merge_files(options, Path(options.adapter), output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"Merged {figures['merged_tensors']} tensors of {base}, {figures['dtype']}, into {figures['shards']} shards in "
        f"{output}: {show_bytes(figures['bytes'])} in {figures['seconds']:.0f} s"
    )
    return 0


def merge_files(options: MergeOptions, adapter: Path, output: Path) -> tuple[Path, dict[str, Any]]:
    """Write the merged weights and the tokenizer's files.

    Returns the folder of the base, and the figures that `write_merged_model` returns. Raises UserError where the
    adapter cannot be merged.
    """
    adapter_config, manifest = read_adapter(adapter, options.merge_base)
    name = options.base or adapter_config.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter / 'adapter_config.json'} names no base: give one with --base.")
    base = find_base(name, options.model_revision or adapter_config.get("revision"))
    silence_libraries()
    # Only now: torch and what is built on it take seconds, and mistakes need none of it.
    from llm_trainer.merge.plan import MergeRequest
    from llm_trainer.merge.whole_model import write_whole_model
    from llm_trainer.model.loading import read_config
    from llm_trainer.model.precision import DTYPES

    trusts = options.trust_remote_code
    is_reward = adapter_config.get("task_type") == "SEQ_CLS"
    config = read_config(str(base), ModelSettings.model_validate({"trust_remote_code": trusts}), is_reward)
    quantization = build_quantization(manifest) if options.merge_base == "dequantized" else None
    request = MergeRequest(base, adapter, config, DTYPES.get(options.dtype), quantization, trusts)
    return base, write_whole_model(request, output)


def read_adapter(adapter: Path, merge_base: str) -> tuple[dict[str, Any], Manifest]:
    """Return adapter_config.json, and the manifest of the run that made the adapter, which only "dequantized" needs.

    Raises UserError with all mistakes.
    """
    problems = []
    absent = [name for name in ADAPTER_FILES if not (adapter / name).is_file()]
    if absent:
        problems.append(f"--adapter {adapter} has no {' and no '.join(absent)}: give the folder of an adapter.")
    if merge_base == "dequantized" and not (adapter / MANIFEST).is_file():
        problems.append(
            f"--merge_base dequantized: {adapter} has no {MANIFEST}, which tells how the base was quantized: "
            "give the folder that the training job wrote, or use bf16."
        )
    if problems:
        raise UserError(*problems)
    manifest = read_manifest(adapter) if merge_base == "dequantized" else Manifest()
    return read_json_object(adapter / "adapter_config.json"), manifest


def find_base(name: str, revision: str | None) -> Path:
    """Return the folder of the base, which is downloaded if it is on the Hub. Raises UserError where there is none."""
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"The base {name} has no config.json: give a model's folder with --base.")
        return Path(name)
    if name.startswith((".", "/")):
        raise UserError(f"The base {name} is no folder here: give its folder or Hub id with --base.")
    with expect_network():  # a person waits for the model
        return Path(download_model(name, revision, with_weights=True))


def build_quantization(manifest: Manifest) -> "BitsAndBytesConfig":
    """Return the quantization with which the job of this manifest loaded the base. Raises UserError if it had none."""
    import torch
    from transformers import BitsAndBytesConfig

    settings, arguments = manifest.get("settings", {}), manifest.get("training_arguments", {})
    if settings.get("load_in_8bit"):
        return BitsAndBytesConfig(load_in_8bit=True)
    if not settings.get("load_in_4bit"):
        raise UserError(f"--merge_base dequantized: by {MANIFEST} the base was not quantized: use bf16.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings["bnb_4bit_quant_type"],
        bnb_4bit_use_double_quant=settings["bnb_4bit_use_double_quant"],
        bnb_4bit_compute_dtype=(
            torch.bfloat16 if arguments.get("bf16") else torch.float16 if arguments.get("fp16") else torch.float32
        ),
    )
