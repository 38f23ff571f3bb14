# SPDX-License-Identifier: Apache-2.0
"""A training begins with the base that an earlier adapter was merged into, as PEFT merges them."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_trainer.config.sections import AdapterSettings, ModelSettings
from llm_trainer.merge.whole_model import merge_earlier_adapter, write_tokenizer


def test_the_adapters_own_tokenizer_wins(tmp_path: Path) -> None:
    adapter, base, output = (tmp_path / name for name in ("adapter", "base", "output"))
    for folder in (adapter, base, output):
        folder.mkdir()
    (base / "tokenizer.json").write_text("base")
    (base / "vocab.txt").write_text("base")
    write_tokenizer(adapter, base, output)
    assert {file.name: file.read_text() for file in output.iterdir()} == {"tokenizer.json": "base", "vocab.txt": "base"}
    (adapter / "tokenizer.json").write_text("adapter")
    write_tokenizer(adapter, base, output)
    assert (output / "tokenizer.json").read_text() == "adapter"


def test_the_earlier_adapter_is_merged_once(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    settings = AdapterSettings(adapter_path=str(tmp_path / "adapter"), merge_adapter=True)
    folders = [merge_earlier_adapter(Path(tiny_model), ModelSettings(), settings, tmp_path) for _ in range(2)]
    assert folders[0] == folders[1]
    merged = AutoModelForCausalLM.from_pretrained(folders[0])
    torch.testing.assert_close(merged.state_dict(), adapted.merge_and_unload().state_dict())
    assert AutoTokenizer.from_pretrained(folders[0]).chat_template
