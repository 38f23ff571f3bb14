# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer merge` as a process: killed in the middle it goes on, and ends with the same files."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from llm_trainer.cli.main import main
from llm_trainer.merge.shard_writer import UNFINISHED
from support.tiny_model import build_tokenizer

# Kills itself when the third shard has got its name.
MERGE_UNTIL_KILLED = """
import os, pathlib, signal, sys
from llm_trainer.cli.main import main

def replace(part, file, replace=pathlib.Path.replace):
    replace(part, file)
    if len([*pathlib.Path(file).parent.glob("*.safetensors")]) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

pathlib.Path.replace = replace
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base of some forty shards, and an adapter that names it."""
    folder = tmp_path_factory.mktemp("merge")
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=40,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base.save_pretrained(folder / "base", max_shard_size="80KB")
    build_tokenizer().save_pretrained(folder / "base")
    base.name_or_path = str(folder / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_killed_merge_goes_on(folders: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, adapter = folders
    command = [sys.executable, "-c", MERGE_UNTIL_KILLED, "merge", "--adapter", str(adapter)]
    killed = subprocess.run([*command, "--output", str(tmp_path / "out")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [file.name for file in (tmp_path / "out").iterdir()] == [UNFINISHED]
    assert len([*(tmp_path / "out" / UNFINISHED).glob("*.safetensors")]) == 3
    again = ["--base", str(base), "--adapter", str(adapter)]
    assert main(["merge", *again, "--output", str(tmp_path / "out")]) == 0
    assert main(["merge", *again, "--output", str(tmp_path / "whole")]) == 0
    output = capfd.readouterr().out
    assert "Merge: 3 of " in output and "shards were merged before" in output and "Merged 80 tensors of" in output
    assert read(tmp_path / "out") == read(tmp_path / "whole")
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= read(tmp_path / "out").keys()


def test_mistakes(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = folders
    output = ["--output", str(tmp_path / "out")]
    assert main(["merge", "--adapter", str(base), *output, "--merge_base", "dequantized"]) == 1
    told = capsys.readouterr().err
    assert "has no adapter_config.json and no adapter_model.safetensors" in told and "training_manifest.json" in told
    assert main(["merge", "--adapter", str(adapter), "--base", "/nowhere", *output]) == 1
    assert "The base /nowhere is no folder here" in capsys.readouterr().err
    assert main(["merge", "--adapter", str(adapter), "--base", str(tmp_path), *output]) == 1
    assert f"The base {tmp_path} has no config.json: give a model's folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["merge", "--adapter", str(adapter), *output, "--dtype", "int4"])


def test_dequantized_by_the_manifest(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    manifest = adapter / "training_manifest.json"
    manifest.write_text(json.dumps({"settings": settings}))
    try:
        arguments = ["--adapter", str(adapter), "--output", str(tmp_path / "out"), "--merge_base", "dequantized"]
        assert main(["merge", *arguments]) == 0
    finally:
        manifest.unlink()
    weights = "model.layers.0.self_attn.k_proj.weight"
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(each).get_parameter(weights) for each in (tmp_path / "out", base)
    )
    assert not torch.equal(ours, theirs)
