# SPDX-License-Identifier: Apache-2.0
"""What `llm-trainer merge` needs is looked for before anything heavy is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llm_trainer.cli.merge import build_quantization, find_base, read_adapter
from llm_trainer.common.errors import UserError


def test_an_adapter_without_its_files_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        read_adapter(tmp_path, "dequantized")
    assert [problem.split(":")[0] for problem in refusal.value.problems] == [
        f"--adapter {tmp_path} has no adapter_config.json and no adapter_model.safetensors",
        "--merge_base dequantized",
    ]


def test_the_manifest_is_read_only_where_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "training_manifest.json").write_text('{"settings": {}}')
    assert read_adapter(tmp_path, "bf16") == ({"base_model_name_or_path": "a/b"}, {})
    assert read_adapter(tmp_path, "dequantized")[1] == {"settings": {}}


def test_a_base_is_a_folder_with_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        find_base(str(tmp_path), None)
    with pytest.raises(UserError, match="is no folder here"):
        find_base("./nowhere", None)
    (tmp_path / "config.json").touch()
    assert find_base(str(tmp_path), None) == tmp_path


def test_a_base_that_was_not_quantized_is_not_dequantized() -> None:
    with pytest.raises(UserError, match="the base was not quantized: use bf16"):
        build_quantization({"settings": {"load_in_4bit": False}})
    assert build_quantization({"settings": {"load_in_8bit": True}}).load_in_8bit


def test_a_mistake_needs_no_torch(tmp_path: Path) -> None:
    words = json.dumps(["merge", "--adapter", str(tmp_path), "--output", str(tmp_path / "out")])
    code = f"import sys; from llm_trainer.cli.main import main; print(main({words}), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["1", "False"]
    assert "has no adapter_config.json" in result.stderr
