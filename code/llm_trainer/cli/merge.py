# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer merge`: an adapter into its base outside a job. Adds the tokenizer's files to what merge.py writes."""

import argparse
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trainer.common.errors import UserError
from llm_trainer.common.findings import show_bytes
from llm_trainer.common.hub import download_model
from llm_trainer.config.environment import read_json_object
from llm_trainer.config.schema import Settings
from llm_trainer.journal.journal import MANIFEST
from llm_trainer.serving.lmi_files import ADAPTER_FILES

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

DTYPES = ("bfloat16", "float16", "float32")
TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


def run(arguments: Sequence[str]) -> int:
    """The exit code: 1 for what cannot be merged, one sentence each; argparse itself leaves with 2."""
    asked = parse(arguments)
    try:
        adapter, output = Path(asked.adapter), Path(asked.output)
        adapter_config, manifest = read_adapter(adapter, asked.merge_base)
        name = asked.base or adapter_config.get("base_model_name_or_path")
        if not name:
            raise UserError(f"{adapter / 'adapter_config.json'} names no base: give one with --base.")
        base = find_base(name, asked.model_revision or adapter_config.get("revision"))
        trusts = asked.trust_remote_code == "true"
        warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' words to each other, not to the user
        # Only now: torch and what is built on it take seconds, and mistakes need none of it.
        from llm_trainer.merge.merge import write_merged_model
        from llm_trainer.model.loading import read_config
        from llm_trainer.model.precision import DTYPES

        config = read_config(str(base), Settings.model_validate({"trust_remote_code": trusts}))
        quantization = build_quantization(manifest) if asked.merge_base == "dequantized" else None
        figures = write_merged_model(base, adapter, output, config, DTYPES.get(asked.dtype), quantization, trusts)
        copy_tokenizer(adapter, base, output)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"Merged {figures['merged_tensors']} tensors of {base}, {figures['dtype']}, into {figures['shards']} shards in "
        f"{output}: {show_bytes(figures['bytes'])} in {figures['seconds']:.0f} s"
    )
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("llm-trainer merge", description=__doc__, allow_abbrev=False)
    parser.add_argument("--base", help="folder or Hub id of the base; default: the one that the adapter names")
    parser.add_argument("--adapter", required=True, help="folder of the adapter")
    parser.add_argument("--output", required=True, help="empty or new folder, or one that an ended merge left")
    parser.add_argument("--merge_base", choices=["bf16", "dequantized"], default="bf16")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: as the base is stored")
    parser.add_argument("--model_revision", help="of a base from the Hub")
    parser.add_argument("--trust_remote_code", choices=["true", "false"], default="false")
    return parser.parse_args(arguments)


def read_adapter(adapter: Path, merge_base: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """adapter_config.json, and the manifest of the run that made the adapter. Raises UserError with all mistakes."""
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
    manifest = read_json_object(adapter / MANIFEST) if merge_base == "dequantized" else {}
    return read_json_object(adapter / "adapter_config.json"), manifest


def find_base(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"The base {name} has no config.json: give a model's folder with --base.")
        return Path(name)
    if name.startswith((".", "/")):
        raise UserError(f"The base {name} is no folder here: give its folder or Hub id with --base.")
    return Path(download_model(name, revision, with_weights=True))


def build_quantization(manifest: dict[str, Any]) -> "BitsAndBytesConfig":
    """As the job loaded the base, which this tells of."""
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


def copy_tokenizer(adapter: Path, base: Path, output: Path) -> None:
    """The adapter's, which may have a template or tokens of its own, else the base's."""
    source = adapter if list(adapter.glob("tokenizer*")) else base
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, output / file.name)
